"""Payment time-outs, in one place because they depend on each other."""

from typing import Final

import msgspec

__all__ = ["DEFAULT_LIMITS", "PaymentTimeouts"]


class PaymentTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits of the steps of a payment. Tests shorten them together."""

    #: A confirm at the PG, in all. The PG requires at least 60 s for its slow calls.
    confirm_seconds: float = 60.0
    #: A lookup or a cancel.
    look_up_seconds: float = 10.0
    #: Added to `confirm_seconds` it makes the lease, so that none ends during its call.
    lease_margin_seconds: float = 15.0
    #: Minimum rest of the lease beyond `confirm_seconds` right before the call is sent.
    lease_left_seconds: float = 5.0
    #: Time-out of the buyer's request; the confirm continues without it.
    answer_seconds: float = 10.0
    #: Time-out of an operator's refund request; the refund continues without it.
    refund_answer_seconds: float = 10.0
    #: Delay until the settler may take over a payment that its own process could not decide.
    hand_over_seconds: float = 1.0
    #: The same if its process ends during the call, which may still reach the PG.
    cut_short_seconds: float = 5.0
    #: The PG lets a payment be confirmed for 10 minutes after its authentication, which is older
    #: than the buyer's return; a minute is left for the call itself.
    confirm_again_seconds: float = 9 * 60.0
    #: Those 10 minutes and 2 more for a confirm in progress: after this, and a lookup that shows
    #: no money, no confirm can succeed any more.
    window_closed_seconds: float = 12 * 60.0
    #: Minimum interval between two lookups, with only 404 between them, to accept the result.
    missing_apart_seconds: float = 2 * 60.0
    #: Delay of the second check of an attempt that ended without a proof of the PG.
    recheck_seconds: float = 15 * 60.0
    #: Poll interval of an open virtual account in its first hour; six times that later.
    deposit_check_seconds: float = 10 * 60.0
    #: A payment undecided for longer raises an alarm.
    alarm_seconds: float = 15 * 60.0
    #: The settler's back-off grows with the payment's age, between these two.
    pause_least_seconds: float = 1.0
    pause_most_seconds: float = 30.0

    @property
    def lease_ms(self) -> int:
        """Length of the lease under which one process alone may ask for the money."""
        return round((self.confirm_seconds + self.lease_margin_seconds) * 1000)


DEFAULT_LIMITS: Final = PaymentTimeouts()
