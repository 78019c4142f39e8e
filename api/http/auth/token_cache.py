"""Good tokens and whose they are, so that each is verified once and not at every request.

They stand in two generations: the elder is let go as one when the younger is full, which costs
less than to look for the eldest each time. When a token ends is not kept beside each: as soon as
the first of them does, all are forgotten and verified anew when they come again.
"""

import time
from typing import Final

__all__ = ["TokenCache"]

#: Tokens of one generation; a surge of buyers who each ask several times fits into two.
GENERATION_MAX: Final = 100_000
#: A token that ends sooner is not kept, so that all are forgotten once a minute at most.
LIFE_SECONDS_MIN: Final = 60.0


class TokenCache:
    """Remembers tokens that were verified; by the wall clock, as tokens end by it."""

    def __init__(self) -> None:
        # Texts alone: the collector does not look into such dictionaries.
        self._young: dict[str, str] = {}
        self._old: dict[str, str] = {}
        #: When the first of them ends, in Unix seconds.
        self._good_until = float("inf")

    def buyer(self, token: str) -> str | None:
        """Whose token it is; None where that must be verified."""
        buyer_id = self._young.get(token) or self._old.get(token)
        if buyer_id is not None and time.time() >= self._good_until:
            self.forget()
            return None
        return buyer_id

    def forget(self) -> None:
        """Let go of all tokens: a key that signed some of them is no longer good."""
        self._young, self._old, self._good_until = {}, {}, float("inf")

    def keep(self, token: str, buyer_id: str, ends_at: float) -> None:
        """Remember a token that was verified, and ends at this Unix time."""
        if ends_at - time.time() < LIFE_SECONDS_MIN:
            return
        if len(self._young) >= GENERATION_MAX:
            self._old, self._young = self._young, {}
        self._young[token] = buyer_id
        self._good_until = min(self._good_until, ends_at)
