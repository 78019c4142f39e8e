"""Redis hashes as domain values. Instants are Unix milliseconds as text in Redis."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import msgspec

from reservation.domain.errors import BrokenInvariant
from reservation.domain.events import Event
from reservation.domain.reservation import Line, Reservation
from reservation.domain.sale import Item, Sale
from reservation.domain.sale_settings import Texts, presentation_of
from reservation.domain.states import HoldPolicy, SaleStatus, Status, Visibility

__all__ = ["as_event", "as_items", "as_mapping", "as_number", "as_reservation", "as_sale"]

_ATTEMPT = "attempt:"
#: Built once: a decoder for a type that is not a struct takes longer to build than to use.
_ITEMS = msgspec.json.Decoder(list[tuple[str, int, int]])
#: Decoded `items` texts in the cache: most orders of a sale are alike.
_TEXTS_MAX: Final = 1_024
#: Digits of the largest number in Redis; `int` refuses a text of thousands of digits.
_DIGITS_MAX: Final = 19


def as_mapping(flat: Sequence[str]) -> dict[str, str]:
    """HGETALL's flat reply as a mapping."""
    return {flat[i]: flat[i + 1] for i in range(0, len(flat), 2)}


def as_number(text: str | None) -> int | None:
    """A field that holds a natural number; None if it is missing or damaged."""
    if text is None or len(text) > _DIGITS_MAX or not (text.isascii() and text.isdecimal()):
        return None
    return int(text)


@lru_cache(maxsize=_TEXTS_MAX)
def as_items(text: str) -> tuple[Line, ...]:
    """The `items` field of an order: a JSON array of [sku, quantity, price]."""
    return tuple(
        [
            Line(sku=sku, quantity=quantity, price=price)
            for sku, quantity, price in _ITEMS.decode(text)
        ]
    )


def as_reservation(
    sale_id: str, order_id: str, fields: Mapping[str, str], *, currency: str
) -> Reservation:
    """An order's hash as a reservation; its currency is its sale's.

    Before the first change after prepare, the hash has neither `updated_at` nor `fence`; after a
    claim the fence must be there. `hold` is in seconds.
    """
    created_at_ms = int(fields["expires_at"]) - 1000 * int(fields["hold"])
    claimed_at = fields.get("claimed_at")
    status = Status(fields["status"])
    # A virtual account is open until its due date; the hold's deadline has passed by then.
    deadline = "due_at" if status is Status.AWAITING_DEPOSIT else "expires_at"
    return Reservation(
        order_id=order_id,
        sale_id=sale_id,
        buyer_id=fields["buyer"],
        status=status,
        lines=as_items(fields["items"]),
        amount=int(fields["amount"]),
        currency=currency,
        order_name=fields["name"],
        created_at_ms=created_at_ms,
        updated_at_ms=int(fields.get("updated_at", created_at_ms)),
        expires_at_ms=int(fields[deadline]),
        seq=int(fields["seq"]),
        fence=int(fields["fence"] if claimed_at else fields.get("fence", "0")),
        payment_key=fields.get("payment_key"),
        claimed_at_ms=int(claimed_at) if claimed_at else None,
        digest=fields.get("digest", ""),
        attempts={
            name.removeprefix(_ATTEMPT): outcome
            for name, outcome in fields.items()
            if name.startswith(_ATTEMPT)
        },
    )


def as_sale(
    sale_id: str, fields: Mapping[str, str], stocks: Mapping[str, Mapping[str, str]]
) -> Sale:
    """A sale's hash and its stock hashes (by SKU) as a sale."""
    presentation = presentation_of(fields.get("presentation"))
    texts = {sku: presentation.items.get(sku, Texts()) for sku in stocks}
    return Sale(
        sale_id=sale_id,
        name=fields["name"],
        currency=fields["currency"],
        opens_at_ms=int(fields["opens_at"]),
        closes_at_ms=int(fields["closes_at"]),
        hold_seconds=int(fields["hold_seconds"]),
        hold_policy=HoldPolicy(fields["hold_policy"]),
        virtual_accounts=fields["virtual_accounts"] == "1",
        require_admission=fields["require_admission"] == "1",
        visibility=Visibility(fields.get("visibility", Visibility.PUBLIC)),
        description=presentation.description,
        switched=SaleStatus(fields["status"]),
        version=int(fields["version"]),
        epoch=fields["epoch"],
        seq=int(fields["seq"]),
        items=tuple(
            Item(
                sku=sku,
                name=stock["name"],
                price=int(stock["price"]),
                total=int(stock["total"]),
                limit_per_buyer=int(stock["limit"]),
                available=int(stock["available"]),
                held=int(stock["held"]),
                sold=int(stock["sold"]),
                description=texts[sku].description,
                image_url=texts[sku].image_url,
            )
            for sku, stock in stocks.items()
        ),
    )


def as_event(sale_id: str, entry_id: str, flat: Sequence[str]) -> Event:
    """A stream entry as an event; its id is `SEQ-0`.

    Raises:
        BrokenInvariant: no script wrote it: a manual edit or a damaged disk.
    """
    try:
        fields = as_mapping(flat)
        return Event(
            sale_id=sale_id,
            seq=int(entry_id.partition("-")[0]),
            event=fields["event"],
            order_id=fields["order"],
            at_ms=int(fields["at"]),
            data=fields["data"],
            chain=fields["chain"],
        )
    except (IndexError, KeyError, ValueError) as error:
        raise BrokenInvariant(
            f"event {entry_id} in the outbox of {sale_id} cannot be read: {error!r}"
        ) from error
