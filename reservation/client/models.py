"""Response models, named as in the service's OpenAPI document; unknown members are ignored."""

from collections.abc import Mapping
from datetime import datetime

import msgspec

__all__ = [
    "Guest",
    "Item",
    "Line",
    "Payment",
    "Reservation",
    "Reservations",
    "Sale",
    "Sales",
    "VirtualAccount",
]


class Answer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of every response."""


class Line(Answer, frozen=True, kw_only=True):
    """A quantity of one item, at the promised unit price."""

    sku: str
    quantity: int
    price: int


class Payment(Answer, frozen=True, kw_only=True):
    """Opens the payment page: by the PG's SDK with these members, or by `checkout_url` alone."""

    provider: str
    client_key: str
    customer_key: str
    success_url: str
    fail_url: str
    checkout_url: str | None = None


class VirtualAccount(Answer, frozen=True, kw_only=True):
    """The account to pay in to: a transfer of the whole amount until `due_at` sells the order."""

    #: The bank's name in Korean, and in English.
    bank: str
    bank_english: str
    account_number: str
    holder_name: str
    due_at: datetime


class Reservation(Answer, frozen=True, kw_only=True):
    """One buyer's basket in one sale; `order_id` is also the payment's.

    `amount` and prices are in the currency's minor unit (KRW: won). `token` and `payment` are
    present only while the reservation is HELD or PREPARED, and only for the buyer who made it;
    `virtual_account` is present while it is AWAITING_DEPOSIT.
    """

    order_id: str
    sale_id: str
    status: str
    items: tuple[Line, ...]
    amount: int
    currency: str
    order_name: str
    created_at: datetime
    updated_at: datetime
    expires_at: datetime
    token: str | None = None
    payment: Payment | None = None
    virtual_account: VirtualAccount | None = None


class Reservations(Answer, frozen=True, kw_only=True):
    """A buyer's reservations in one sale, newest first."""

    reservations: tuple[Reservation, ...]


class Item(Answer, frozen=True, kw_only=True):
    """One thing on sale: `total` = `available` + `held` + `sold`."""

    sku: str
    name: str
    price: int
    total: int
    available: int
    held: int
    sold: int
    limit_per_buyer: int
    description: str = ""
    #: An https address, or a path on the storefront's own origin; empty for none.
    image_url: str = ""


class Sale(Answer, frozen=True, kw_only=True):
    """One sale; `status` is scheduled, open, paused, sold_out or closed."""

    sale_id: str
    name: str
    currency: str
    status: str
    opens_at: datetime
    closes_at: datetime
    hold_seconds: int
    hold_policy: str
    virtual_accounts: bool
    require_admission: bool
    server_time: datetime
    items: tuple[Item, ...]
    #: `public`, or `unlisted`: a draft is shown to operators alone.
    visibility: str = "public"
    description: str = ""
    #: Passed to `prepare` if the sale requires it; good for ten minutes.
    admission: str | None = None

    def price_of(self, basket: Mapping[str, int]) -> int:
        """The cost of a basket by this response's prices.

        Raises:
            KeyError: an item is not in the sale.
        """
        prices = {item.sku: item.price for item in self.items}
        return sum(prices[sku] * quantity for sku, quantity in basket.items())


class Sales(Answer, frozen=True, kw_only=True):
    """A page of the list of sales."""

    sales: tuple[Sale, ...]
    #: Of the next page; None at the end.
    next_cursor: str | None = None


class Guest(Answer, frozen=True, kw_only=True):
    """A buyer without an account."""

    buyer_id: str
    token: str
