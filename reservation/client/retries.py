"""When a call is made once more, and after what pause."""

import random
from typing import Final

import msgspec

from reservation.client.errors import ClientError, NoAnswer, Refused

__all__ = ["Retries"]

#: What passes by itself: the store is away, its answer was lost, or this caller was too quick.
_PASSING: Final = frozenset({"unavailable", "outcome_unknown", "rate_limited"})


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long a call is tried.

    Attributes:
        attempts: calls in all; 1 turns repeats off.
        first_seconds: the pause before the second; each later one may be twice as long.
        longest_seconds: no pause is longer, unless the service asks for one by `Retry-After`.
        patience_seconds: a `Retry-After` above this is not waited for: the refusal is raised.
    """

    attempts: int = 5
    first_seconds: float = 0.1
    longest_seconds: float = 2.0
    patience_seconds: float = 10.0

    def pause(self, error: ClientError, made: int) -> float | None:
        """Seconds to wait after so many calls, or None if the error stands.

        The pause is drawn at random below its bound, so that callers who failed together do not
        come back together.
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
