"""Retry policy: when a call is repeated, and the back-off."""

import random
from typing import Final

import msgspec

from reservation.client.errors import ClientError, NoAnswer, Refused

__all__ = ["Retries"]

#: Temporary refusals: the store is unreachable, its answer was lost, or the rate limit applied.
_PASSING: Final = frozenset({"unavailable", "outcome_unknown", "rate_limited"})


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long a call is retried.

    Attributes:
        attempts: calls in all; 1 turns retries off.
        first_seconds: the pause before the second; each later one may be twice as long.
        longest_seconds: no pause is longer, unless the service asks for one by `Retry-After`.
        patience_seconds: above this `Retry-After` there is no retry: the refusal is raised.
    """

    attempts: int = 5
    first_seconds: float = 0.1
    longest_seconds: float = 2.0
    patience_seconds: float = 10.0

    def pause(self, error: ClientError, made: int) -> float | None:
        """Seconds to wait after so many calls, or None to raise the error.

        The pause is random below its bound, so that callers that failed together do not retry
        together.
        """
        if made >= self.attempts or not _passes(error):
            return None
        asked = _retry_after(error)
        if asked > self.patience_seconds:
            return None
        bound = min(self.longest_seconds, self.first_seconds * 2 ** (made - 1))
        return asked + random.uniform(0, bound)  # noqa: S311 - spreads load, guards nothing


def _passes(error: ClientError) -> bool:
    return isinstance(error, NoAnswer) or (isinstance(error, Refused) and error.code in _PASSING)


def _retry_after(error: ClientError) -> float:
    asked = error.facts.get("retryAfter") if isinstance(error, Refused) else None
    return float(asked) if isinstance(asked, int | float) else 0.0
