"""An operator's sale definition: its validation and its stored forms."""

import hashlib
import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from reservation.domain.clock import as_ms
from reservation.domain.errors import InvalidSale
from reservation.domain.payment_gateway import GatewayLimits
from reservation.domain.sale import AMOUNT_MAX, TOTAL_MAX, Item, SaleTerms
from reservation.domain.states import HoldPolicy, Visibility

__all__ = [
    "SaleDefinition",
    "change_of",
    "digest_of",
    "document_of",
    "event_data_of",
    "needs_upgrade",
    "presentation_of",
    "restock_digest_of",
    "settings_of",
]

#: Items in one sale: all of them are read with the sale.
ITEMS_MAX = 200
#: The shortest hold in which a buyer can type a card number, and the longest of use in a flash
#: sale: the PG's own page lives 30 minutes and its authentication 10.
HOLD_SECONDS_LEAST = 1
HOLD_SECONDS_MOST = 24 * 3600
#: Range of a sale's times: a time outside it is a default or a typo, and close to the calendar's
#: ends an instant has no date in every zone.
TIME_LEAST_MS = as_ms(datetime(2000, 1, 1, tzinfo=UTC))
TIME_END_MS = as_ms(datetime(2201, 1, 1, tzinfo=UTC))
#: The address of a picture: https, or a path on the storefront's own origin. `//` would name
#: another origin, and a backslash is read as a slash by browsers.
_IMAGE_URL = re.compile(r"(?:https://[^/\s\\]+(?:/[^\s\\]*)?|/(?![/\\])[^\s\\]*)?")


class SaleDefinition(SaleTerms, frozen=True, kw_only=True):
    """An operator's definition of a sale."""

    items: tuple[Item, ...]

    def check(self, payments: GatewayLimits) -> None:
        """Raises `InvalidSale`, naming the first error.

        Args:
            payments: the payments that the sale's gateway accepts.
        """
        least = payments.minimum_amounts.get(self.currency)
        if least is None:
            taken = ", ".join(sorted(payments.minimum_amounts))
            raise InvalidSale(f"The payment gateway does not accept {self.currency}, only {taken}.")
        if self.virtual_accounts:
            least = max(least, payments.minimum_account_amounts.get(self.currency, least))
        for name, at_ms in (("opensAt", self.opens_at_ms), ("closesAt", self.closes_at_ms)):
            if not TIME_LEAST_MS <= at_ms < TIME_END_MS:
                raise InvalidSale(f"{name} must be in the years 2000 to 2200.")
        if self.closes_at_ms <= self.opens_at_ms:
            raise InvalidSale("closesAt must be later than opensAt.")
        if not HOLD_SECONDS_LEAST <= self.hold_seconds <= HOLD_SECONDS_MOST:
            raise InvalidSale(
                f"holdSeconds must be from {HOLD_SECONDS_LEAST} to {HOLD_SECONDS_MOST}."
            )
        if not 1 <= len(self.items) <= ITEMS_MAX:
            raise InvalidSale(f"A sale must have from 1 to {ITEMS_MAX} items.")
        if len({item.sku for item in self.items}) != len(self.items):
            raise InvalidSale("Each sku must be unique within the sale.")
        for item in self.items:
            if not 0 <= item.total <= TOTAL_MAX:
                raise InvalidSale(f"total must be from 0 to {TOTAL_MAX}.", sku=item.sku)
            if not least <= item.price <= AMOUNT_MAX:
                raise InvalidSale(
                    f"price must be from {least} to {AMOUNT_MAX}: the payment gateway takes"
                    f" payments{' into a virtual account' if self.virtual_accounts else ''}"
                    f" of {least} {self.currency} or more.",
                    sku=item.sku,
                )
            if _IMAGE_URL.fullmatch(item.image_url) is None:
                raise InvalidSale(
                    "imageUrl must begin with https:// or with a single slash.", sku=item.sku
                )
            if not 1 <= item.limit_per_buyer <= TOTAL_MAX:
                raise InvalidSale(f"limitPerBuyer must be from 1 to {TOTAL_MAX}.", sku=item.sku)


class _EventItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    sku: str
    name: str
    price: int
    total: int
    limit_per_buyer: int = msgspec.field(name="limit")
    description: str = ""
    image_url: str = msgspec.field(default="", name="imageUrl")


class _EventData(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The data of a `sale_put` event, in the order in which it is written."""

    version: int = 0
    name: str
    currency: str
    opens_at_ms: int = msgspec.field(name="opensAt")
    closes_at_ms: int = msgspec.field(name="closesAt")
    hold_seconds: int = msgspec.field(name="holdSeconds")
    hold_policy: HoldPolicy = msgspec.field(name="holdPolicy")
    virtual_accounts: bool = msgspec.field(name="virtualAccounts")
    require_admission: bool = msgspec.field(name="requireAdmission")
    visibility: Visibility = Visibility.PUBLIC
    description: str = ""
    items: list[_EventItem]
    epoch: str = ""
    operator: str


def change_of(data: str) -> tuple[SaleDefinition, str]:
    """The definition and operator of a `sale_put` event: the reverse of `event_data_of`."""
    event = msgspec.json.decode(data, type=_EventData)
    return msgspec.convert(event, SaleDefinition, from_attributes=True), event.operator


def digest_of(change: SaleDefinition, operator: str) -> str:
    """Distinguishes a repeat of this change from another change."""
    return hashlib.sha256(msgspec.json.encode([_plain(change), operator])).hexdigest()[:32]


def document_of(change: SaleDefinition) -> str:
    """The definition as JSON, as SQL keeps it; equal definitions have equal texts."""
    return msgspec.json.encode(_plain(change)).decode()


#: The members that came after release 0.1.0, of a sale and of an item, with their defaults.
_LATER = {"visibility": Visibility.PUBLIC.value, "description": ""}
_LATER_OF_ITEM = {"description": "", "image_url": ""}


def _plain(change: SaleDefinition) -> dict[str, Any]:
    """The members of a definition without later ones that have their default.

    Digests and documents of definitions that release 0.1.0 stored therefore stay the same.
    """
    plain = msgspec.to_builtins(change)
    for members, later in ((plain, _LATER), *((item, _LATER_OF_ITEM) for item in plain["items"])):
        for name, default in later.items():
            if members[name] == default:
                del members[name]
    return plain


def needs_upgrade(change: SaleDefinition) -> bool:
    """Whether the definition has members that release 0.1.0 cannot read."""
    plain = _plain(change)
    return not _LATER.keys().isdisjoint(plain) or any(
        not _LATER_OF_ITEM.keys().isdisjoint(item) for item in plain["items"]
    )


def restock_digest_of(sku: str, delta: int, reason: str) -> str:
    """Distinguishes a repeat of this restock from another one under the same key."""
    return hashlib.sha256(msgspec.json.encode([sku, delta, reason])).hexdigest()[:32]


class Texts(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The description and the picture of an item."""

    description: str = ""
    image_url: str = ""


class Presentation(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The texts and pictures of a sale: one field of the sale's hash."""

    description: str = ""
    #: By SKU, those that have any.
    items: dict[str, Texts] = {}


def presentation_of(text: str | None) -> Presentation:
    """The presentation in the sale's hash; None, a missing field, is an empty one."""
    return msgspec.json.decode(text, type=Presentation) if text else Presentation()


def _presentation_text(change: SaleDefinition) -> str:
    items = {item.sku: Texts(item.description, item.image_url) for item in change.items}
    shown = Presentation(
        change.description, {sku: texts for sku, texts in items.items() if texts != Texts()}
    )
    return "" if shown == Presentation() else msgspec.json.encode(shown).decode()


def settings_of(change: SaleDefinition) -> dict[str, str]:
    """The fields of the sale's hash that the change sets; an empty value removes the field."""
    is_public = change.visibility is Visibility.PUBLIC
    return {
        "name": change.name,
        "currency": change.currency,
        "opens_at": str(change.opens_at_ms),
        "closes_at": str(change.closes_at_ms),
        "hold_seconds": str(change.hold_seconds),
        "hold_policy": change.hold_policy.value,
        "virtual_accounts": str(int(change.virtual_accounts)),
        "require_admission": str(int(change.require_admission)),
        "visibility": "" if is_public else change.visibility.value,
        "presentation": _presentation_text(change),
    }


def event_data_of(change: SaleDefinition, *, version: int, epoch: str, operator: str) -> str:
    """The data of its `sale_put` event."""
    terms = {name: getattr(change, name) for name in SaleTerms.__struct_fields__}
    items = msgspec.convert(change.items, list[_EventItem], from_attributes=True)
    data = _EventData(version=version, **terms, items=items, epoch=epoch, operator=operator)
    return msgspec.json.encode(data).decode()
