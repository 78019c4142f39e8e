"""Wire schemas of orders as operators see them, with their history."""

from typing import Any

import msgspec

from api.http.schemas.accounts import RefundAnswer, VirtualAccountAnswer
from api.http.schemas.base import ResponseModel
from api.http.schemas.reservations import LineAnswer

__all__ = ["HistoryEntry", "OrderAnswer", "OrderHistoryAnswer", "OrdersAnswer"]


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
