"""Wire schemas of sales: shoppers' and operators' view, definition, audit, explanation."""

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.http.schemas.base import PARAGRAPHS, WORDS, RequestModel, ResponseModel
from reservation.adapters.sql.sale_changes import SaleChange
from reservation.application.audit.audit import AuditReport
from reservation.application.reservations.explain import SkuWhy, Waiting
from reservation.application.sales.listing import SalePage
from reservation.domain.clock import as_ms, as_wire
from reservation.domain.errors import InvalidSale
from reservation.domain.ids import SKU
from reservation.domain.sale import AMOUNT_MAX, TOTAL_MAX, Item, Sale
from reservation.domain.sale_settings import SaleDefinition
from reservation.domain.states import HoldPolicy, Visibility

__all__ = [
    "AuditAnswer",
    "HolderAnswer",
    "ReasonRequest",
    "RestockRequest",
    "SaleAnswer",
    "SaleChangeAnswer",
    "SaleHistoryAnswer",
    "SaleRequest",
    "SalesAnswer",
    "SkuWhyAnswer",
    "WaitingAnswer",
]


class ItemAnswer(ResponseModel, frozen=True, kw_only=True, omit_defaults=True):
    """An item as a shopper sees it."""

    sku: str
    name: str
    price: int
    total: int
    available: int
    held: int
    sold: int
    limit_per_buyer: int
    description: str = ""
    #: An https address, or a path on the storefront's own origin.
    image_url: str = ""


class SaleAnswer(ResponseModel, frozen=True, kw_only=True, omit_defaults=True):
    """A sale as a shopper sees it; operators see its version as well."""

    sale_id: str
    name: str
    currency: str
    status: str
    opens_at: str
    closes_at: str
    hold_seconds: int
    hold_policy: HoldPolicy
    virtual_accounts: bool
    require_admission: bool
    visibility: Visibility
    server_time: str
    items: list[ItemAnswer]
    description: str = ""
    #: Sent with prepare in `X-Sale-Admission` if the sale requires it.
    admission: str | None = None

    @classmethod
    def of(cls, sale: Sale, *, now_ms: int, admission: str | None = None) -> "SaleAnswer":
        """The sale on the wire."""
        return cls(
            sale_id=sale.sale_id,
            name=sale.name,
            currency=sale.currency,
            status=sale.status(now_ms).value,
            opens_at=as_wire(sale.opens_at_ms),
            closes_at=as_wire(sale.closes_at_ms),
            hold_seconds=sale.hold_seconds,
            hold_policy=sale.hold_policy,
            virtual_accounts=sale.virtual_accounts,
            require_admission=sale.require_admission,
            visibility=sale.visibility,
            description=sale.description,
            server_time=as_wire(now_ms),
            items=msgspec.convert(sale.items, list[ItemAnswer], from_attributes=True),
            admission=admission,
        )


class SalesAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of sales: live ones first, then upcoming, then past."""

    sales: list[SaleAnswer]
    #: Of the next page; null at the end.
    next_cursor: str | None

    @classmethod
    def of(cls, page: SalePage, *, now_ms: int) -> "SalesAnswer":
        """The page on the wire."""
        sales = [SaleAnswer.of(sale, now_ms=now_ms) for sale in page.sales]
        return cls(sales=sales, next_cursor=page.next_cursor)


class ItemRequest(RequestModel, frozen=True, kw_only=True):
    """An item of an operator's sale definition."""

    sku: Annotated[str, Meta(pattern=SKU)]
    name: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]
    price: Annotated[int, Meta(ge=1, le=AMOUNT_MAX, description="minor units")]
    total: Annotated[int, Meta(ge=0, le=TOTAL_MAX)]
    limit_per_buyer: Annotated[int, Meta(ge=1, le=TOTAL_MAX)]
    description: Annotated[str, Meta(max_length=500, pattern=PARAGRAPHS)] = ""
    image_url: Annotated[
        str,
        Meta(max_length=500, description="an https address, or a path on the storefront's origin"),
    ] = ""


class SaleRequest(RequestModel, frozen=True, kw_only=True):
    """An operator's definition of a sale."""

    name: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]
    items: list[ItemRequest]
    opens_at: datetime
    closes_at: datetime
    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$(?!\\n)")] = "KRW"
    hold_seconds: int = 300
    hold_policy: HoldPolicy = HoldPolicy.PREPARE
    virtual_accounts: bool = False
    require_admission: bool = False
    visibility: Visibility = Visibility.PUBLIC
    description: Annotated[str, Meta(max_length=2_000, pattern=PARAGRAPHS)] = ""

    def change(self) -> SaleDefinition:
        """The definition as the domain's type.

        Raises:
            InvalidSale: a time has no offset, which makes it ambiguous.
        """
        return SaleDefinition(
            name=self.name,
            currency=self.currency,
            opens_at_ms=_instant("opensAt", self.opens_at),
            closes_at_ms=_instant("closesAt", self.closes_at),
            hold_seconds=self.hold_seconds,
            hold_policy=self.hold_policy,
            virtual_accounts=self.virtual_accounts,
            require_admission=self.require_admission,
            visibility=self.visibility,
            description=self.description,
            items=msgspec.convert(self.items, tuple[Item, ...], from_attributes=True),
        )


def _instant(name: str, at: datetime) -> int:
    if at.tzinfo is None:
        raise InvalidSale(f"{name} must have a UTC offset, such as +09:00 or Z.")
    return as_ms(at)


class RestockRequest(RequestModel, frozen=True, kw_only=True):
    """Units to add, or, negative, to withdraw."""

    sku: Annotated[str, Meta(pattern=SKU)]
    delta: Annotated[int, Meta(ge=-TOTAL_MAX, le=TOTAL_MAX)]
    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]


class ReasonRequest(RequestModel, frozen=True, kw_only=True):
    """The operator's reason for a change."""

    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]


class SaleChangeAnswer(ResponseModel, frozen=True, kw_only=True):
    """A change of a sale: who, when and why."""

    at: str
    #: `sale_put`, `sale_switched`, `restocked`, `rebuilt`, `archive`, `retired` or `purged`.
    what: str
    #: Null if no operator requested it.
    operator: str | None
    #: Null if none was given.
    reason: str | None
    #: Further members of the change's event.
    facts: dict[str, Any]

    @classmethod
    def of(cls, change: SaleChange) -> "SaleChangeAnswer":
        """The change on the wire."""
        return cls(
            at=as_wire(change.at_ms),
            what=change.what,
            operator=change.operator or None,
            reason=change.reason or None,
            facts=change.facts,
        )


class SaleHistoryAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of a sale's changes, newest first."""

    changes: list[SaleChangeAnswer]
    #: Of the next page; null at the end.
    next_cursor: str | None


class SkuAuditAnswer(ResponseModel, frozen=True, kw_only=True):
    """One item of an audit."""

    sku: str
    total: int
    available: int
    held: int
    confirming: int
    sold: int
    ok: bool


class AuditAnswer(ResponseModel, frozen=True, kw_only=True):
    """The findings of an audit."""

    ok: bool
    checked_at: str
    lag: int
    skus: list[SkuAuditAnswer]
    problems: list[str]

    @classmethod
    def of(cls, report: AuditReport) -> "AuditAnswer":
        """The report on the wire."""
        return cls(
            ok=report.ok,
            checked_at=as_wire(report.checked_at_ms),
            lag=report.lag,
            skus=[
                msgspec.convert(row, SkuAuditAnswer, from_attributes=True) for row in report.skus
            ],
            problems=list(report.problems),
        )


class HolderAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer who holds units of an item."""

    buyer_id: str
    quantity: int
    orders: int
    since: str


class WaitingAnswer(ResponseModel, frozen=True, kw_only=True):
    """An order that holds units of an item, and the earliest time at which that may change."""

    order_id: str
    buyer_id: str
    status: str
    quantity: int
    since: str
    until: str

    @classmethod
    def of(cls, order: Waiting) -> "WaitingAnswer":
        """The order on the wire."""
        return cls(
            order_id=order.order_id,
            buyer_id=order.buyer_id,
            status=order.status.value,
            quantity=order.quantity,
            since=as_wire(order.since_ms),
            until=as_wire(order.until_ms),
        )


class SkuWhyAnswer(ResponseModel, frozen=True, kw_only=True):
    """The units of one item, and when they return or are settled."""

    sale_id: str
    sku: str
    total: int
    available: int
    held: int
    sold: int
    #: Most units first; sold units are not held.
    holders: list[HolderAnswer]
    next_deadlines: list[WaitingAnswer]
    #: Payments in progress; `until` is when the settler checks again.
    undecided: list[WaitingAnswer]

    @classmethod
    def of(cls, why: SkuWhy) -> "SkuWhyAnswer":
        """The explanation on the wire."""
        return cls(
            sale_id=why.sale_id,
            sku=why.item.sku,
            total=why.item.total,
            available=why.item.available,
            held=why.item.held,
            sold=why.item.sold,
            holders=[
                HolderAnswer(
                    buyer_id=holder.buyer_id,
                    quantity=holder.quantity,
                    orders=holder.orders,
                    since=as_wire(holder.since_ms),
                )
                for holder in why.holders
            ],
            next_deadlines=[WaitingAnswer.of(order) for order in why.next_deadlines],
            undecided=[WaitingAnswer.of(order) for order in why.undecided],
        )
