"""Retry policy: when a call is repeated, and the back-off."""

import random
from typing import Final

import msgspec

from reservation.client.errors import ClientError, NoAnswer, Refused

__all__ = ["Attempts", "Retries"]

_OUTCOME_UNKNOWN: Final = "outcome_unknown"
_TOO_MANY_REQUESTS: Final = 429
_SERVER_ERROR: Final = 500
#: Temporary refusals: the store is unreachable, its answer was lost, or the rate limit applied.
_TRANSIENT: Final = frozenset({"unavailable", _OUTCOME_UNKNOWN, "rate_limited"})


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long a call is retried.

    Attributes:
        attempts: maximum number of calls; 1 disables retries.
        first_seconds: maximum pause before the second call; it doubles with each further call.
        longest_seconds: maximum pause, unless `Retry-After` is longer.
        patience_seconds: maximum `Retry-After`; above it the refusal is raised without a retry.
    """

    attempts: int = 5
    first_seconds: float = 0.1
    longest_seconds: float = 2.0
    patience_seconds: float = 10.0

    def pause(self, error: ClientError, made: int) -> float | None:
        """Seconds to wait after this many calls, or None to raise the error.

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


class Attempts:
    """The attempts of one call.

    Args:
        retries: when and how often it is repeated.
    """

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._made = 0
        #: The last attempt that may have taken effect.
        self._lost: ClientError | None = None

    def pause_after(self, error: ClientError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            ClientError: there is none. A temporary refusal is certain of its own attempt only: if
                an earlier one may have taken effect, that one's error is raised instead.
        """
        self._made += 1
        if _may_have_taken_effect(error):
            self._lost = error
        pause = self._retries.pause(error, self._made)
        if pause is not None:
            return pause
        if self._lost is None or self._lost is error or _decides_all(error):
            raise error
        raise self._lost from error


def _may_have_taken_effect(error: ClientError) -> bool:
    return isinstance(error, NoAnswer) or (
        isinstance(error, Refused) and error.code == _OUTCOME_UNKNOWN
    )


def _decides_all(error: ClientError) -> bool:
    """Whether it holds for all attempts: a repeat is answered by the effect of the first."""
    return isinstance(error, Refused) and (
        error.status < _SERVER_ERROR and error.status != _TOO_MANY_REQUESTS
    )


def _passes(error: ClientError) -> bool:
    return isinstance(error, NoAnswer) or (isinstance(error, Refused) and error.code in _TRANSIENT)


def _retry_after(error: ClientError) -> float:
    asked = error.facts.get("retryAfter") if isinstance(error, Refused) else None
    return float(asked) if isinstance(asked, int | float) else 0.0
