"""Expected records: the hashes in Redis as SQL would restore them; pure, no I/O."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec

from reservation.adapters.redis.tombstones import Tombstone, tombstone_text
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.sales import ItemRow, SaleRow
from reservation.adapters.sql.transfers import LastTransfer
from reservation.domain.events import Event, EventName
from reservation.domain.payment import FORGOTTEN, Attempt, Reason
from reservation.domain.sale_settings import (
    SaleDefinition,
    digest_of,
    restock_digest_of,
    settings_of,
)
from reservation.domain.states import Status

__all__ = [
    "ENDED_KEPT_MS",
    "has_payment_history",
    "item_fields",
    "order_fields",
    "restock_fields",
    "sale_fields",
    "tombstone_of",
    "transfer_fields",
    "with_codes",
]

#: How long after the sale's end its ended orders stay in Redis.
ENDED_KEPT_MS: Final = 24 * 3600 * 1000
_ATTEMPT: Final = "attempt:"
_EVENT: Final = msgspec.json.Decoder(dict[str, Any])


class _Data(msgspec.Struct, rename="camel"):
    origin: Status = msgspec.field(name="from")
    fence: int | None = None
    payment_key: str = ""
    due_at: int | None = None


class _Payments:
    """The fields of an order's hash that its payment events write."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.claimed = False
        self.attempts = 0

    def add(self, event: Event) -> None:
        data = msgspec.json.decode(event.data, type=_Data)
        if event.event == EventName.CLAIMED:
            self.claimed = True
            self.attempts += 1
            self.fields["payment_key"] = data.payment_key
            self.fields["claimed_at"] = str(event.at_ms)
        elif event.event != EventName.TAKEN_OVER and data.fence is not None:
            self._end(event, data)

    def _end(self, event: Event, data: _Data) -> None:
        if event.event == EventName.REFUNDED and data.origin is Status.CONFIRMED:
            # An operator's refund: the attempt stays confirmed.
            return
        self.fields["finished"] = f"{event.event}:{data.fence}"
        if data.due_at is not None:
            self.fields["due_at"] = str(data.due_at)
        key = self.fields.get("payment_key")
        if key is None:
            return
        reason = Reason.read(event.event, _EVENT.decode(event.data))
        if reason is not None and reason.cause in FORGOTTEN:
            self.fields.pop(_ATTEMPT + key, None)
            del self.fields["payment_key"]
            self.attempts -= 1
        else:
            self.fields[_ATTEMPT + key] = Attempt(event.event, reason).text()


class _Put(msgspec.Struct):
    version: int


class _Restock(msgspec.Struct):
    sku: str
    delta: int
    reason: str
    operation: str


def sale_fields(
    row: SaleRow, change: SaleDefinition, operator: str, skus: Collection[str]
) -> dict[str, str]:
    """The fields of the sale's hash, except its epoch, `seq` and chain.

    Args:
        row: the sale after its last event.
        change: its settings, as last put.
        operator: who put them.
        skus: the items on sale now; listed in the order of the settings.
    """
    listed = [item.sku for item in change.items if item.sku in skus]
    version = row.version or 1
    # A change of a total since the last PUT also cleared its digest (lib/version.lua).
    put_version = msgspec.json.decode(row.settings, type=_Put).version if row.settings else 1
    settings = {name: value for name, value in settings_of(change).items() if value}
    return settings | {
        "version": str(version),
        "digest": digest_of(change, operator) if version == put_version else "",
        "skus": msgspec.json.encode(listed).decode(),
        "status": row.switched,
        "created_at": str(row.created_at_ms),
    }


def transfer_fields(last: Mapping[tuple[str, int, str], LastTransfer]) -> dict[str, str]:
    """The fields of a partition's transfers, from the last of each direction, peer and SKU."""
    fields: dict[str, str] = {}
    for (direction, peer, sku), one in last.items():
        text = f"{one.number} {one.up_to}"
        if direction == "lent":
            text += f" {one.units} {one.operation}"
        fields[f"{direction}:{peer}:{sku}"] = text
    return fields


def item_fields(item: ItemRow) -> dict[str, str]:
    """The fields of an item's hash that no order changes."""
    return {"name": item.name, "price": str(item.price), "limit": str(item.limit_per_buyer)}


def restock_fields(restocks: Sequence[str]) -> Mapping[str, str]:
    """The hash of idempotent operations.

    Args:
        restocks: the data of every restock event.
    """
    done = [msgspec.json.decode(data, type=_Restock) for data in restocks]
    return {one.operation: restock_digest_of(one.sku, one.delta, one.reason) for one in done}


def with_codes(fields: Mapping[str, str]) -> dict[str, str]:
    """An order's fields, with attempts of earlier releases in the current format."""
    return {
        name: Attempt.read(text).text() if name.startswith(_ATTEMPT) else text
        for name, text in fields.items()
    }


def has_payment_history(row: OrderRow) -> bool:
    """Whether it has payment events: a claim, or money that came without one."""
    return row.fence > 0 or row.status == Status.REFUNDED


def order_fields(row: OrderRow, payment_events: Sequence[Event]) -> dict[str, str]:
    """The fields of the order's hash.

    A new order has no `updated_at`, and one never claimed has neither `fence` nor `attempts`.

    Args:
        row: the order after its last event.
        payment_events: its payment events, in order.
    """
    payments = _Payments()
    for event in payment_events:
        payments.add(event)
    items = [[line.sku, line.quantity, line.price] for line in row.lines]
    fields = {
        "status": row.status,
        "buyer": row.buyer_id,
        "items": msgspec.json.encode(items).decode(),
        "amount": str(row.amount),
        "name": row.order_name,
        "digest": row.digest,
        "hold": str((row.expires_at_ms - row.created_at_ms) // 1000),
        "expires_at": str(row.expires_at_ms),
        "seq": str(row.seq),
        **payments.fields,
    }
    if payments.claimed:
        fields |= {"fence": str(row.fence), "attempts": str(payments.attempts)}
    if payments.claimed or row.status not in (Status.HELD, Status.PREPARED):
        fields["updated_at"] = str(row.updated_at_ms)
    return fields


def tombstone_of(row: OrderRow) -> Tombstone | None:
    """The order's tombstone; None for an order that has none in this state."""
    text = tombstone_text(row.status, row.seq, row.digest)
    if not text or row.fence > 0 or row.payment_key is not None:
        return None
    return Tombstone(order_id=row.order_id, buyer_id=row.buyer_id, text=text)
