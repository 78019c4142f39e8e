"""The results of claim.lua: a claim, an earlier outcome, or a refusal."""

from collections.abc import Sequence

from reservation.adapters.redis.script_results import ClaimWord, dry, limit_exceeded, sold_out
from reservation.domain.errors import ReservationExpired
from reservation.domain.payment import Claimed, Present
from reservation.domain.states import Status

__all__ = ["claim_answer"]


def claim_answer(word: ClaimWord, facts: Sequence[str], claim_id: str) -> Claimed | Present:
    """The script's answer to a claim, except `due`, which its caller repeats.

    Raises:
        SoldOut, PartitionDry, BuyerLimitExceeded, ReservationExpired: nothing was claimed.
    """
    match word:
        case ClaimWord.CLAIMED:
            return Claimed(int(facts[0]), int(float(facts[1])), claim_id)
        case ClaimWord.PRESENT:
            return Present(Status(facts[0]), facts[1])
        case ClaimWord.EXPIRED:
            raise ReservationExpired
        case ClaimWord.ATTEMPTS_EXHAUSTED:
            raise ReservationExpired("This order has no payment attempts left; start a new order.")
        case ClaimWord.LIMIT_EXCEEDED:
            raise limit_exceeded(facts)
        case ClaimWord.SOLD_OUT:
            raise sold_out(facts)
        case ClaimWord.DRY:
            raise dry(facts)
        case (
            ClaimWord.TOO_LATE
            | ClaimWord.RECOVERING
            | ClaimWord.WENT_BACK
            | ClaimWord.NOT_FOUND
            | ClaimWord.DUE
        ):
            raise AssertionError(word)
