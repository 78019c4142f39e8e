"""Wire schemas of orders and refunds as operators see them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.http.schemas.accounts import (
    RefundAccountAnswer,
    RefundAccountRequest,
    VirtualAccountAnswer,
)
from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from api.http.schemas.reservations import LineAnswer, ReservationAnswer
from reservation.adapters.sql.refunds import RefundRecord
from reservation.application.payments.refunds import facts_of

__all__ = [
    "HistoryEntry",
    "OrderAnswer",
    "OrderHistoryAnswer",
    "OrdersAnswer",
    "PendingRefundAnswer",
    "RefundAnswer",
    "RefundRequest",
    "RefundsAnswer",
]


class RefundRequest(RequestModel, frozen=True, kw_only=True):
    """A refund in full."""

    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]
    restock: bool
    refund_receive_account: RefundAccountRequest | None = None


class RefundAnswer(ResponseModel, frozen=True, kw_only=True):
    """A refund in its current state."""

    order_id: str
    #: pending, done or refused.
    status: str
    reason: str
    restock: bool
    operator: str
    refund_receive_account: RefundAccountAnswer | None
    #: The payment provider's latest code while it is pending, or its refusal; ORDER_NOT_PAID if
    #: the order ended without any money to refund.
    provider_code: str | None
    created_at: str
    updated_at: str

    @classmethod
    def of(cls, record: RefundRecord) -> "RefundAnswer":
        """The refund on the wire."""
        return msgspec.convert(facts_of(record), cls)


class PendingRefundAnswer(ReservationAnswer, frozen=True, kw_only=True):
    """The reservation of a pending refund, which continues automatically."""

    #: Always `refund_pending`.
    code: str
    #: The payment provider's latest code for it.
    provider_code: str | None = None


class RefundsAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of refunds."""

    refunds: list[RefundAnswer]
    next_cursor: str | None


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
    #: The payment provider's status of a refund to a bank account; null for other refunds.
    account_refund_status: str | None = None
    #: While AWAITING_DEPOSIT.
    virtual_account: VirtualAccountAnswer | None = None
    refund: RefundAnswer | None = None
    history: list[HistoryEntry]
