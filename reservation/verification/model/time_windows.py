"""Time windows: each call in numbers of events, from the head before it to the head after it."""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Final

__all__ = ["NEVER", "Windows"]

#: A number above that of any event.
NEVER: Final = 1 << 62


class Windows:
    """The heads that calls have seen, and the bounds they set for all other calls."""

    def __init__(self) -> None:
        self._at_least: list[tuple[int, int]] = []
        self._at_most: list[tuple[int, int]] = []
        self._at_least_ns: list[int] = []
        self._at_most_ns: list[int] = []
        self._at_least_seq: list[int] = []
        self._at_most_seq: list[int] = []

    def reached(self, at_ns: int, seq: int) -> None:
        """From this time on the head is at least here."""
        self._at_least.append((at_ns, seq))

    def not_past(self, at_ns: int, seq: int) -> None:
        """Until this time the head was here at most."""
        self._at_most.append((at_ns, seq))

    def close(self) -> None:
        """The history is complete."""
        self._at_least.sort()
        self._at_most.sort()
        self._at_least_ns = [at_ns for at_ns, _ in self._at_least]
        self._at_most_ns = [at_ns for at_ns, _ in self._at_most]
        self._at_least_seq = list(accumulate((seq for _, seq in self._at_least), max))
        later = accumulate((seq for _, seq in reversed(self._at_most)), min)
        self._at_most_seq = list(later)[::-1]

    def of(self, invoked_ns: int, answered_ns: int) -> tuple[int, int]:
        """The first and the last number that the head may have had during a call."""
        before = bisect_right(self._at_least_ns, invoked_ns)
        after = bisect_left(self._at_most_ns, answered_ns)
        first = self._at_least_seq[before - 1] if before else 0
        last = self._at_most_seq[after] if after < len(self._at_most_seq) else NEVER
        return first, last
