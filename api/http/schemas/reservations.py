"""Wire schemas: camelCase structs with their limits in their types."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.http.schemas.accounts import RefundAnswer, VirtualAccountAnswer
from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from reservation.application.audit.audit import AuditReport
from reservation.application.reservations.queries import DepositAccount
from reservation.domain.clock import as_ms, as_wire
from reservation.domain.errors import InvalidSale
from reservation.domain.ids import SKU
from reservation.domain.reservation import Line, Reservation
from reservation.domain.sale import AMOUNT_MAX, TOTAL_MAX, Item, Sale
from reservation.domain.sale_settings import SaleDefinition
from reservation.domain.states import HoldPolicy, Status

__all__ = [
    "AuditAnswer",
    "GuestAnswer",
    "PrepareRequest",
    "ReasonRequest",
    "ReservationAnswer",
    "ReservationsAnswer",
    "RestockRequest",
    "SaleAnswer",
    "SaleRequest",
    "SalesAnswer",
]

#: Lines of one basket: enough for one person's purchase, and a bound on the script's run time.
LINES_MAX = 20
#: Units of one line: above any buyer's limit that makes sense.
QUANTITY_MAX = 10_000
#: Cached lines of orders in their wire form.
_LINES_KEPT_MAX = 1_024


class PrepareLine(RequestModel, frozen=True, kw_only=True):
    """A quantity of one item."""

    sku: Annotated[str, Meta(pattern=SKU)]
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX)]


class PrepareRequest(RequestModel, frozen=True, kw_only=True):
    """The buyer's basket, and the total that the page showed."""

    items: Annotated[list[PrepareLine], Meta(min_length=1, max_length=LINES_MAX)]
    amount: Annotated[
        int, Meta(ge=1, le=AMOUNT_MAX, description="sum of price x quantity, minor units")
    ]
    order_name: Annotated[str, Meta(min_length=1, max_length=100, pattern=WORDS)] | None = None


class LineAnswer(ResponseModel, frozen=True, kw_only=True):
    """One line of a reservation, at its promised price."""

    sku: str
    quantity: int
    price: int


class PaymentAnswer(ResponseModel, frozen=True, kw_only=True):
    """The members that the storefront needs to open the PG's page."""

    provider: str
    client_key: str
    customer_key: str
    success_url: str
    fail_url: str
    #: The page's address, or null if the PG's own SDK opens it.
    checkout_url: str | None


class ReservationAnswer(ResponseModel, frozen=True, kw_only=True, omit_defaults=True):
    """A reservation as its buyer sees it."""

    order_id: str
    sale_id: str
    status: Status
    items: list[LineAnswer]
    amount: int
    currency: str
    order_name: str
    created_at: str
    updated_at: str
    expires_at: str
    #: Only in prepare's response: reads and releases this reservation.
    token: str | None = None
    #: Only for its buyer, while the payment has not begun.
    payment: PaymentAnswer | None = None
    #: While AWAITING_DEPOSIT.
    virtual_account: VirtualAccountAnswer | None = None

    @classmethod
    def of(
        cls,
        order: Reservation,
        *,
        now_ms: int,
        token: str | None = None,
        payment: PaymentAnswer | None = None,
        account: DepositAccount | None = None,
    ) -> "ReservationAnswer":
        """The reservation on the wire."""
        return cls(
            order_id=order.order_id,
            sale_id=order.sale_id,
            status=order.shown_status(now_ms),
            items=_line_answers(order.lines),
            amount=order.amount,
            currency=order.currency,
            order_name=order.order_name,
            created_at=as_wire(order.created_at_ms),
            updated_at=as_wire(order.updated_at_ms),
            expires_at=as_wire(order.expires_at_ms),
            token=token,
            payment=payment,
            virtual_account=VirtualAccountAnswer.of(account) if account else None,
        )


@lru_cache(maxsize=_LINES_KEPT_MAX)
def _line_answers(lines: tuple[Line, ...]) -> list[LineAnswer]:
    """The lines on the wire, cached: most orders of a sale have the same."""
    return [LineAnswer(sku=line.sku, quantity=line.quantity, price=line.price) for line in lines]


class ReservationsAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer's reservations in one sale, newest first."""

    reservations: list[ReservationAnswer]


class ItemAnswer(ResponseModel, frozen=True, kw_only=True):
    """An item as a shopper sees it."""

    sku: str
    name: str
    price: int
    total: int
    available: int
    held: int
    sold: int
    limit_per_buyer: int


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
    server_time: str
    items: list[ItemAnswer]
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
            server_time=as_wire(now_ms),
            items=[_item(item) for item in sale.items],
            admission=admission,
        )


def _item(item: Item) -> ItemAnswer:
    return ItemAnswer(
        sku=item.sku,
        name=item.name,
        price=item.price,
        total=item.total,
        available=item.available,
        held=item.held,
        sold=item.sold,
        limit_per_buyer=item.limit_per_buyer,
    )


class SalesAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of sales: live ones first, then upcoming, then past."""

    sales: list[SaleAnswer]
    #: Of the next page; null at the end.
    next_cursor: str | None


class GuestAnswer(ResponseModel, frozen=True, kw_only=True):
    """A buyer without an account."""

    buyer_id: str
    token: str


class ItemRequest(RequestModel, frozen=True, kw_only=True):
    """An item of an operator's sale definition."""

    sku: Annotated[str, Meta(pattern=SKU)]
    name: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]
    price: Annotated[int, Meta(ge=1, le=AMOUNT_MAX, description="minor units")]
    total: Annotated[int, Meta(ge=0, le=TOTAL_MAX)]
    limit_per_buyer: Annotated[int, Meta(ge=1, le=TOTAL_MAX)]


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
            items=tuple(
                Item(
                    sku=item.sku,
                    name=item.name,
                    price=item.price,
                    total=item.total,
                    limit_per_buyer=item.limit_per_buyer,
                )
                for item in self.items
            ),
        )


def _instant(name: str, at: datetime) -> int:
    if at.tzinfo is None:
        raise InvalidSale(f"{name} needs an offset, such as +09:00 or Z.")
    return as_ms(at)


class RestockRequest(RequestModel, frozen=True, kw_only=True):
    """Units to add, or, negative, to withdraw."""

    sku: Annotated[str, Meta(pattern=SKU)]
    delta: Annotated[int, Meta(ge=-TOTAL_MAX, le=TOTAL_MAX)]
    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]


class ReasonRequest(RequestModel, frozen=True, kw_only=True):
    """The operator's reason for a change."""

    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]


class OrderAnswer(ResponseModel, frozen=True, kw_only=True):
    """An order as operators see it, from SQL."""

    order_id: str
    sale_id: str
    buyer_id: str
    status: str
    items: list[LineAnswer]
    amount: int
    currency: str
    payment_key_last4: str | None = msgspec.field(name="paymentKeyLast4", default=None)
    created_at: str
    updated_at: str
    seq: int


class OrdersAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of orders."""

    orders: list[OrderAnswer]
    next_cursor: str | None


class HistoryEntry(ResponseModel, frozen=True, kw_only=True):
    """One event of an order."""

    at: str
    kind: str
    what: str
    facts: dict[str, Any]


class OrderHistoryAnswer(OrderAnswer, frozen=True, kw_only=True):
    """An order with all its events, in order of time, and its next step."""

    next: str
    #: The payment provider's name for it; null until known.
    payment_method: str | None = None
    #: Of a refund to an account: the payment provider's status of the bank's transfer.
    account_refund_status: str | None = None
    #: While AWAITING_DEPOSIT.
    virtual_account: VirtualAccountAnswer | None = None
    refund: RefundAnswer | None = None
    history: list[HistoryEntry]


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


class HealthAnswer(ResponseModel, frozen=True, kw_only=True):
    """Whether the service is ready, and the missing dependencies if not."""

    status: str
    missing: Sequence[str] = ()
    #: Sales that wait for a rebuild, and the data that Redis lacks of each.
    recovering: Mapping[str, str] = {}
    #: Conditions that need attention but leave the service ready.
    warnings: Sequence[str] = ()
    #: Redis settings that cannot be read and that an operator vouches for.
    trusted: Sequence[str] = ()
