"""Refusals: the expected errors of a request.

    ReservationError              code, detail and facts; no HTTP in here
     +- MalformedRequest  Unauthenticated  Forbidden  InvalidToken  InvalidAdmission
     +- SaleNotFound  SkuNotFound  ReservationNotFound
     +- SaleNotOpen  SaleClosed  SalePaused  SaleRecovering  SaleNotSettled
     +- SoldOut  BuyerLimitExceeded  AmountMismatch  IdempotencyKeyReused
     +- ReservationExpired  HoldLost  PaymentInProgress  AlreadyConfirmed  PaymentDeclined
     +- RateLimited  TooManyOrders  Unavailable (PartitionDry)  OutcomeUnknown
     +- InvalidSale  TotalTooLow  InsufficientAvailable  NotRefundable  RefundPending
     +- RefundAccountRequired
     +- InvalidWebhookEndpoint  WebhookEndpointNotFound  WebhookDeliveryNotFound
     +- WebhookEndpointDisabled
     +- PreconditionRequired  PreconditionFailed  UpgradeInProgress
     +- KeyNotFound  TooManyKeys

A broken invariant is not a refusal: it raises `BrokenInvariant`, which is never caught to continue.
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
    "InvalidWebhookEndpoint",
    "KeyNotFound",
    "MalformedRequest",
    "NotRefundable",
    "OutcomeUnknown",
    "PartitionDry",
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
    "SaleNotSettled",
    "SalePaused",
    "SaleRecovering",
    "SkuNotFound",
    "SoldOut",
    "TooManyKeys",
    "TooManyOrders",
    "TotalTooLow",
    "Unauthenticated",
    "Unavailable",
    "UpgradeInProgress",
    "WebhookDeliveryNotFound",
    "WebhookEndpointDisabled",
    "WebhookEndpointNotFound",
]

#: A member of a refusal in addition to its sentence; JSON can carry each of these types.
Fact = str | int | None | Mapping[str, object] | list[str]


class BrokenInvariant(Exception):
    """An invariant is broken (a bug or a manual edit). Never caught to continue."""


class ReservationError(Exception):
    """A request that is refused: nothing changed.

    Args:
        detail: a sentence that helps the caller; the class's own if absent.
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
    sentence = "The request is invalid."


class Unauthenticated(ReservationError):
    code = "unauthenticated"
    sentence = "A valid bearer token is required."


class Forbidden(ReservationError):
    code = "forbidden"
    sentence = "This credential lacks the required permission."


class InvalidToken(ReservationError):
    code = "invalid_token"
    sentence = "The token belongs to another reservation or has expired."


class InvalidAdmission(ReservationError):
    code = "invalid_admission"
    sentence = "This sale requires an admission token: reload the sale page and retry."


class SaleNotFound(ReservationError):
    code = "sale_not_found"
    sentence = "The sale does not exist."


class SkuNotFound(ReservationError):
    code = "sku_not_found"
    sentence = "The sale has no such item."


class ReservationNotFound(ReservationError):
    code = "reservation_not_found"
    sentence = "This caller has no such reservation."


class SaleNotOpen(ReservationError):
    code = "sale_not_open"
    sentence = "The sale is not open yet."


class SaleClosed(ReservationError):
    code = "sale_closed"
    sentence = "The sale has ended."


class SalePaused(ReservationError):
    code = "sale_paused"
    sentence = "The sale is paused; try again shortly."


class SaleRecovering(ReservationError):
    code = "sale_recovering"
    sentence = "The sale is being restored; no stock was held."


class SaleNotSettled(ReservationError):
    code = "sale_not_settled"
    sentence = "The sale is open, or some of its orders are in progress."


class SoldOut(ReservationError):
    code = "sold_out"
    sentence = "Not enough units are available."


class BuyerLimitExceeded(ReservationError):
    code = "buyer_limit_exceeded"
    sentence = "The quantity exceeds the limit per buyer."


class AmountMismatch(ReservationError):
    code = "amount_mismatch"
    sentence = "The amount differs from the price of the items."


class IdempotencyKeyReused(ReservationError):
    code = "idempotency_key_reused"
    sentence = "This Idempotency-Key was already used with a different body."


class ReservationExpired(ReservationError):
    code = "reservation_expired"
    sentence = "The hold expired and its units are no longer available."


class HoldLost(ReservationError):
    code = "hold_lost"
    sentence = "The hold was lost in a failure of Redis."


class PaymentInProgress(ReservationError):
    code = "payment_in_progress"
    sentence = "A payment for this reservation is in progress."


class AlreadyConfirmed(ReservationError):
    code = "already_confirmed"
    sentence = "This reservation has already been paid."


class PaymentDeclined(ReservationError):
    code = "payment_declined"
    sentence = "The payment was declined and the stock was released."


class RateLimited(ReservationError):
    code = "rate_limited"
    sentence = "Too many requests; reduce the request rate."


class TooManyOrders(ReservationError):
    code = "too_many_orders"
    sentence = "Too many of this buyer's orders in this sale ended unpaid; nothing was charged."


class Unavailable(ReservationError):
    code = "unavailable"
    sentence = "The service is temporarily unavailable; no stock was held."


class PartitionDry(Unavailable):
    """The partition lacks units, which other partitions of the sale may have.

    Args:
        detail: as for every refusal.
        available: the partition's units of each wanted SKU.
        facts: as for every refusal.
    """

    def __init__(
        self,
        detail: str | None = None,
        *,
        available: Mapping[str, int] | None = None,
        **facts: Fact,
    ) -> None:
        self.available = dict(available or {})
        super().__init__(detail, **facts)


class OutcomeUnknown(ReservationError):
    code = "outcome_unknown"
    sentence = "The outcome of the hold is unknown: repeat the request with the same key and body."


class InvalidSale(ReservationError):
    code = "invalid_sale"
    sentence = "The sale definition is invalid."


class TotalTooLow(ReservationError):
    code = "total_too_low"
    sentence = "The total would fall below held plus sold."


class InsufficientAvailable(ReservationError):
    code = "insufficient_available"
    sentence = "Not enough available units to withdraw."


class NotRefundable(ReservationError):
    code = "not_refundable"
    sentence = "Only a CONFIRMED order can be refunded."


class RefundPending(ReservationError):
    code = "refund_pending"
    sentence = "Another refund of this order is pending (see `refund`); nothing was changed."


class RefundAccountRequired(ReservationError):
    code = "refund_account_required"
    sentence = "The refund of a deposit requires a bank account in refundReceiveAccount."


class UpgradeInProgress(ReservationError):
    code = "upgrade_in_progress"
    sentence = "The installation's level is too low: raise it with reservation migrate --level."


class KeyNotFound(ReservationError):
    code = "key_not_found"
    sentence = "There is no such operator's key."


class TooManyKeys(ReservationError):
    code = "too_many_keys"
    sentence = "Too many operators' keys are valid: revoke those that are not used."


class InvalidWebhookEndpoint(ReservationError):
    code = "invalid_webhook_endpoint"
    sentence = "The webhook endpoint is invalid."


class WebhookEndpointNotFound(ReservationError):
    code = "webhook_endpoint_not_found"
    sentence = "The webhook endpoint does not exist."


class WebhookDeliveryNotFound(ReservationError):
    code = "webhook_delivery_not_found"
    sentence = "The delivery does not exist, or the log no longer has it."


class WebhookEndpointDisabled(ReservationError):
    code = "webhook_endpoint_disabled"
    sentence = "The webhook endpoint is disabled: enable it first."


class PreconditionRequired(ReservationError):
    code = "precondition_required"
    sentence = "Changing a sale requires If-Match with the ETag of the GET response."


class PreconditionFailed(ReservationError):
    code = "precondition_failed"
    sentence = "The ETag is outdated: the sale has changed; read it again."
