"""Alarms: every event that needs an operator, by its name in metrics, log and runbook."""

from enum import StrEnum
from typing import Final

__all__ = ["TICKETS", "Alarm"]


class Alarm(StrEnum):
    """One alarm; docs/operations.md has a row for each.

    `reservation.telemetry.metrics.alarm` takes only these: a series that first appears at its
    first count is invisible to `increase()`, so each process exports every name from its start on.
    """

    # Payments.
    GATEWAY_MISCONFIGURED = "gateway_misconfigured"
    ANSWER_FOR_ANOTHER_ORDER = "answer_for_another_order"
    UNEXPECTED_PAYMENT_STATUS = "unexpected_payment_status"
    PAYMENT_UNDECIDED = "payment_undecided"
    AUTOMATIC_CANCEL_FAILED = "automatic_cancel_failed"
    CANCELLED_AT_THE_PG = "cancelled_at_the_pg"
    PARTLY_CANCELLED_AT_THE_PG = "partly_cancelled_at_the_pg"
    DEPOSIT_REVERSED = "deposit_reversed"
    BANK_REFUND_FAILED = "bank_refund_failed"
    SECOND_PAYMENT = "second_payment"
    PAYMENT_WITHOUT_ORDER = "payment_without_order"
    # Refunds.
    REFUND_PENDING = "refund_pending"
    REFUND_REFUSED = "refund_refused"
    REFUND_PAYMENT_MISSING = "refund_payment_missing"
    REFUND_WITHOUT_ORDER = "refund_without_order"
    REFUND_OF_UNSOLD_ORDER = "refund_of_unsold_order"
    # Redis.
    PREFLIGHT = "preflight"
    PREFLIGHT_OF_SALE = "preflight_of_sale"
    SALE_RECOVERING = "sale_recovering"
    REBUILD_UNCERTAIN = "rebuild_uncertain"
    SALE_UNREADABLE = "sale_unreadable"
    SALE_NOT_RETIRED = "sale_not_retired"
    # The worker's clock and Redis' differ, or one of them has jumped: nothing expires.
    WORKER_CLOCK = "worker_clock"
    # The flusher.
    FLUSH_GAP = "flush_gap"
    FLUSH_BROKEN_CHAIN = "flush_broken_chain"
    FLUSH_CONFLICT = "flush_conflict"
    FLUSH_POISON = "flush_poison"
    FLUSH_UNKNOWN_SALE = "flush_unknown_sale"
    # Webhooks to shops.
    WEBHOOK_ENDPOINT_FAILING = "webhook_endpoint_failing"
    WEBHOOK_ENDPOINT_DISABLED = "webhook_endpoint_disabled"
    # The program itself.
    WORKER_BUG = "worker_bug"
    BROKEN_INVARIANT = "broken_invariant"


#: Alarms without urgency: the money is safe, and no buyer is refused. deploy/alerts.yml opens a
#: ticket for these and pages for all others.
TICKETS: Final = frozenset(
    {
        Alarm.CANCELLED_AT_THE_PG,
        Alarm.PARTLY_CANCELLED_AT_THE_PG,
        Alarm.DEPOSIT_REVERSED,
        Alarm.BANK_REFUND_FAILED,
        Alarm.SECOND_PAYMENT,
        Alarm.REFUND_PENDING,
        Alarm.REFUND_REFUSED,
        Alarm.REFUND_WITHOUT_ORDER,
        Alarm.REFUND_OF_UNSOLD_ORDER,
        Alarm.WEBHOOK_ENDPOINT_FAILING,
        Alarm.WEBHOOK_ENDPOINT_DISABLED,
    }
)
