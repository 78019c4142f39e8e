"""Refusals: the expected errors of a request.

    ReservationError              code, detail and facts; no HTTP in here
     +- MalformedRequest  Unauthenticated  Forbidden  InvalidToken  InvalidAdmission
     +- SaleNotFound  SkuNotFound  ReservationNotFound
     +- SaleNotOpen  SaleClosed  SalePaused  SaleRecovering
     +- SoldOut  BuyerLimitExceeded  AmountMismatch  IdempotencyKeyReused
     +- ReservationExpired  HoldLost  PaymentInProgress  AlreadyConfirmed  PaymentDeclined
     +- RateLimited  TooManyOrders  Unavailable  OutcomeUnknown
     +- InvalidSale  TotalTooLow  InsufficientAvailable  NotRefundable  RefundPending
     +- RefundAccountRequired
     +- PreconditionRequired  PreconditionFailed

A broken invariant is no refusal: it raises `BrokenInvariant`, which is never caught to continue.
The HTTP status of each code is in `api.http.problem_details`, and nowhere else.
"""

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "AlreadyConfirmed",
    "AmountMismatch",
    "BrokenInvariant",
    "BuyerLimitExceeded",
    "Forbidden",
    "HoldLost",
    "IdempotencyKeyReused",
    "InsufficientAvailable",
    "InvalidAdmission",
    "InvalidSale",
    "InvalidToken",
    "MalformedRequest",
    "NotRefundable",
    "OutcomeUnknown",
    "PaymentDeclined",
    "PaymentInProgress",
    "PreconditionFailed",
    "PreconditionRequired",
    "RateLimited",
    "RefundAccountRequired",
    "RefundPending",
    "ReservationError",
    "ReservationExpired",
    "ReservationNotFound",
    "SaleClosed",
    "SaleNotFound",
    "SaleNotOpen",
    "SalePaused",
    "SaleRecovering",
    "SkuNotFound",
    "SoldOut",
    "TooManyOrders",
    "TotalTooLow",
    "Unauthenticated",
    "Unavailable",
]

#: A member of a refusal beside its sentence; JSON can carry each of these types.
Fact = str | int | None | Mapping[str, object] | list[str]


class BrokenInvariant(Exception):
    """An invariant is broken (a bug or a manual edit). Never caught to continue."""


class ReservationError(Exception):
    """A request that is refused: nothing changed.

    Args:
        detail: a sentence that helps the caller; the class's own where absent.
        facts: extra members of the problem document, in the wire's camelCase.
    """

    code: ClassVar[str]
    sentence: ClassVar[str]

    def __init__(self, detail: str | None = None, **facts: Fact) -> None:
        self.detail = detail or self.sentence
        self.facts = facts
        super().__init__(self.detail)


class MalformedRequest(ReservationError):
    code = "malformed_request"
    sentence = "The request is not what this endpoint takes."


class Unauthenticated(ReservationError):
    code = "unauthenticated"
    sentence = "A valid bearer token is needed."


class Forbidden(ReservationError):
    code = "forbidden"
    sentence = "This credential may not do that."


class InvalidToken(ReservationError):
    code = "invalid_token"
    sentence = "The token is not this reservation's or is no longer valid."


class InvalidAdmission(ReservationError):
    code = "invalid_admission"
    sentence = "This sale is entered from its page: load the sale again and try once more."


class SaleNotFound(ReservationError):
    code = "sale_not_found"
    sentence = "There is no such sale."


class SkuNotFound(ReservationError):
    code = "sku_not_found"
    sentence = "This sale does not have that item."


class ReservationNotFound(ReservationError):
    code = "reservation_not_found"
    sentence = "There is no such reservation for this caller."


class SaleNotOpen(ReservationError):
    code = "sale_not_open"
    sentence = "The sale has not opened yet."


class SaleClosed(ReservationError):
    code = "sale_closed"
    sentence = "The sale is over."


class SalePaused(ReservationError):
    code = "sale_paused"
    sentence = "The sale is paused; try again shortly."


class SaleRecovering(ReservationError):
    code = "sale_recovering"
    sentence = "The sale is being restored; nothing was taken."


class SoldOut(ReservationError):
    code = "sold_out"
    sentence = "Not enough pieces are left."


class BuyerLimitExceeded(ReservationError):
    code = "buyer_limit_exceeded"
    sentence = "This is more than one buyer may have of this item."


class AmountMismatch(ReservationError):
    code = "amount_mismatch"
    sentence = "The amount is not the price of these items."


class IdempotencyKeyReused(ReservationError):
    code = "idempotency_key_reused"
    sentence = "This Idempotency-Key was used with another body."


class ReservationExpired(ReservationError):
    code = "reservation_expired"
    sentence = "The hold ran out and the pieces are gone."


class HoldLost(ReservationError):
    code = "hold_lost"
    sentence = "The hold was lost in a failure of the store."


class PaymentInProgress(ReservationError):
    code = "payment_in_progress"
    sentence = "A payment is under way for this reservation."


class AlreadyConfirmed(ReservationError):
    code = "already_confirmed"
    sentence = "This reservation is paid for."


class PaymentDeclined(ReservationError):
    code = "payment_declined"
    sentence = "The payment was declined, and the pieces were given back."


class RateLimited(ReservationError):
    code = "rate_limited"
    sentence = "Too many requests; slow down."


class TooManyOrders(ReservationError):
    code = "too_many_orders"
    sentence = "Too many orders of this buyer in this sale ended unpaid; nothing was charged."


class Unavailable(ReservationError):
    code = "unavailable"
    sentence = "The service cannot answer now; nothing was taken."


class OutcomeUnknown(ReservationError):
    code = "outcome_unknown"
    sentence = "It cannot be told whether the hold was taken: send the same key and body again."


class InvalidSale(ReservationError):
    code = "invalid_sale"
    sentence = "The sale cannot be like that."


class TotalTooLow(ReservationError):
    code = "total_too_low"
    sentence = "The total would fall below what is held and sold."


class InsufficientAvailable(ReservationError):
    code = "insufficient_available"
    sentence = "Not that many pieces are available to withdraw."


class NotRefundable(ReservationError):
    code = "not_refundable"
    sentence = "Only a confirmed order can be refunded."


class RefundPending(ReservationError):
    code = "refund_pending"
    sentence = "Another refund of this order is pending; `refund` shows it. Nothing was changed."


class RefundAccountRequired(ReservationError):
    code = "refund_account_required"
    sentence = "A deposit goes back to an account: name it in refundReceiveAccount."


class PreconditionRequired(ReservationError):
    code = "precondition_required"
    sentence = "Changing a sale needs If-Match with the ETag of its GET."


class PreconditionFailed(ReservationError):
    code = "precondition_failed"
    sentence = "The sale changed since it was read; read it again."
