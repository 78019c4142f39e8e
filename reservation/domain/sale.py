"""A sale, its items and their counters."""

import msgspec

from reservation.domain.states import HoldPolicy, SaleStatus, Visibility
from reservation.domain.tokens import Page

__all__ = ["AMOUNT_MAX", "TOTAL_MAX", "Item", "Sale", "SaleTerms"]

#: The largest amount in minor units that Lua prints whole and SQL and JSON carry without loss.
AMOUNT_MAX = 9_999_999_999_999
#: The largest total of one item: beyond it a sale is not a flash sale.
TOTAL_MAX = 1_000_000_000

#: Characters of the epoch in a sale's ETag: after a data loss other changes get the same versions.
ETAG_EPOCH_CHARS = 8


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One thing on sale, with its counters: total = available + held + sold."""

    sku: str
    name: str
    price: int
    total: int
    limit_per_buyer: int
    available: int = 0
    held: int = 0
    sold: int = 0
    #: Shown by the storefront; empty for none.
    description: str = ""
    #: An https address, or a path on the storefront's own origin; empty for none.
    image_url: str = ""


class SaleTerms(msgspec.Struct, frozen=True, kw_only=True):
    """The terms of a sale, which an operator sets."""

    name: str
    currency: str
    opens_at_ms: int
    closes_at_ms: int
    hold_seconds: int
    hold_policy: HoldPolicy
    virtual_accounts: bool
    require_admission: bool
    visibility: Visibility = Visibility.PUBLIC
    #: Shown by the storefront; empty for none.
    description: str = ""


class Sale(SaleTerms, frozen=True, kw_only=True):
    """One flash sale as stored in Redis."""

    sale_id: str
    #: An operator's switch: open, paused or closed.
    switched: SaleStatus
    #: Rises with each change that a PUT can make: settings and totals.
    version: int
    epoch: str
    seq: int
    items: tuple[Item, ...]

    @property
    def etag(self) -> str:
        """Required by an update: the version, and the epoch in which it is counted."""
        return f"v{self.version}.{self.epoch[:ETAG_EPOCH_CHARS]}"

    def status(self, now_ms: int) -> SaleStatus:
        """The status for shoppers; `now_ms` by the server's clock."""
        if self.switched is SaleStatus.CLOSED or now_ms >= self.closes_at_ms:
            return SaleStatus.CLOSED
        if now_ms < self.opens_at_ms:
            return SaleStatus.SCHEDULED
        if self.switched is SaleStatus.PAUSED:
            return SaleStatus.PAUSED
        if all(item.available == 0 for item in self.items):
            return SaleStatus.SOLD_OUT
        return SaleStatus.OPEN

    def item(self, sku: str) -> Item | None:
        """The item with this id, if the sale has it."""
        for item in self.items:
            if item.sku == sku:
                return item
        return None

    @property
    def page(self) -> Page:
        """The content that an admission covers: every price of the page that issued it."""
        prices = ",".join(f"{item.sku}={item.price}" for item in self.items)
        return Page(self.sale_id, prices, self.opens_at_ms)
