"""Cache of verified buyer tokens, in two generations.

When the younger generation is full, the older one is dropped as a whole, which costs less than
evicting the oldest entry. Expiry is not stored per token: when the first token expires, the whole
cache is cleared, and the tokens are verified again on their next use.
"""

import time
from typing import Final

__all__ = ["TokenCache"]

#: Tokens of one generation; two generations hold the tokens of a surge of buyers.
GENERATION_MAX: Final = 100_000
#: A token that expires sooner is not cached, so the cache is cleared once a minute at most.
LIFE_SECONDS_MIN: Final = 60.0


class TokenCache:
    """Caches verified tokens; expiry is by the wall clock."""

    def __init__(self) -> None:
        # Strings only: the garbage collector does not track such dictionaries.
        self._new: dict[str, str] = {}
        self._old: dict[str, str] = {}
        #: The earliest expiry among them, in Unix seconds.
        self._good_until = float("inf")

    def buyer(self, token: str) -> str | None:
        """The buyer of a cached token; None if it must be verified."""
        buyer_id = self._new.get(token) or self._old.get(token)
        if buyer_id is not None and time.time() >= self._good_until:
            self.forget()
            return None
        return buyer_id

    def forget(self) -> None:
        """Clear the cache: a key that signed some of the tokens is no longer valid."""
        self._new, self._old, self._good_until = {}, {}, float("inf")

    def keep(self, token: str, buyer_id: str, ends_at: float) -> None:
        """Cache a verified token that expires at this Unix time."""
        if ends_at - time.time() < LIFE_SECONDS_MIN:
            return
        if len(self._new) >= GENERATION_MAX:
            self._old, self._new = self._new, {}
        self._new[token] = buyer_id
        self._good_until = min(self._good_until, ends_at)
