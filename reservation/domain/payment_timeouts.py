"""The times that a payment hangs on, in one place because they hang on each other."""

from typing import Final

import msgspec

__all__ = ["DEFAULT_LIMITS", "PaymentTimeouts"]


class PaymentTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long each step of a payment may take. Tests shorten them together."""

    #: A confirm at the PG, in all. The PG asks for at least 60 s on its slow calls.
    confirm_seconds: float = 60.0
    #: A look-up or a cancel.
    look_up_seconds: float = 10.0
    #: Added to `confirm_seconds` it makes the lease, so that none ends while its call is under way.
    lease_margin_seconds: float = 15.0
    #: What must be left of the lease beyond `confirm_seconds` right before the call leaves.
    lease_left_seconds: float = 5.0
    #: How long the buyer's request waits; the confirm goes on without it.
    answer_seconds: float = 10.0
    #: How long an operator's request for a refund waits; the refund goes on without it.
    refund_answer_seconds: float = 10.0
    #: When the settler may look at a payment that its own process could not decide.
    hand_over_seconds: float = 1.0
    #: The same where its process ends in the middle of the call, which may still reach the PG.
    cut_short_seconds: float = 5.0
    #: The PG lets a payment be confirmed for 10 minutes after its authentication, which is older
    #: than the buyer's return; a minute is left for the call itself.
    confirm_again_seconds: float = 9 * 60.0
    #: Those 10 minutes and 2 more for a confirm that is already running: after this, and a look-up
    #: that shows no money, nobody can take it any more.
    window_closed_seconds: float = 12 * 60.0
    #: How far apart two look-ups must be, with nothing but 404 between them, to believe in it.
    missing_apart_seconds: float = 2 * 60.0
    #: When an attempt that ended without a proof of the PG is looked at once more.
    recheck_seconds: float = 15 * 60.0
    #: Between two looks at an open virtual account, in its first hour; six times that later.
    deposit_look_seconds: float = 10 * 60.0
    #: Undecided for longer than this is a person's business.
    alarm_seconds: float = 15 * 60.0
    #: The settler's pause before its next look grows with the payment's age, between these two.
    pause_least_seconds: float = 1.0
    pause_most_seconds: float = 30.0

    @property
    def lease_ms(self) -> int:
        """How long one process alone may ask for the money."""
        return round((self.confirm_seconds + self.lease_margin_seconds) * 1000)


DEFAULT_LIMITS: Final = PaymentTimeouts()
