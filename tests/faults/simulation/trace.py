"""Trace of a run, in order: a digest of all of it, counts, and the last lines."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable

from tests.faults.simulation.loop import VirtualLoop

__all__ = ["Trace"]

#: Lines that a failure shows.
LAST = 40


class Trace:
    """Records every message that leaves or reaches a process.

    Args:
        loop: the clock.
        on_line: receives each line as it comes; optional.
    """

    def __init__(self, loop: VirtualLoop, on_line: Callable[[str], None] | None = None) -> None:
        self._loop = loop
        self._on_line = on_line
        self._hash = hashlib.sha256()
        self.last: deque[str] = deque(maxlen=LAST)
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, process: str, what: str) -> None:
        """Record one event; its kind is counted."""
        line = f"{self._loop.now:.6f} {process} {kind} {what}"
        self._hash.update(line.encode())
        self.counts[kind] += 1
        self.last.append(line)
        if self._on_line is not None:
            self._on_line(line)

    @property
    def digest(self) -> str:
        """Equal for equal runs."""
        return self._hash.hexdigest()
