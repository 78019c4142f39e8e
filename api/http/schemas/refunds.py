"""Wire schemas of refunds: an operator's request, and the state of each."""

from typing import Annotated

from msgspec import Meta

from api.http.schemas.accounts import RefundAccountRequest, RefundAnswer
from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from api.http.schemas.reservations import ReservationAnswer

__all__ = ["PendingRefundAnswer", "RefundRequest", "RefundsAnswer"]


class RefundRequest(RequestModel, frozen=True, kw_only=True):
    """A refund in full."""

    reason: Annotated[str, Meta(min_length=1, max_length=200, pattern=WORDS)]
    restock: bool
    refund_receive_account: RefundAccountRequest | None = None


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
