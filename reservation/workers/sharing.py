"""Sharing of sales among the workers: each picks its own from the list of workers in Redis.

Invariants:

- Every sale is served by at least one live worker within five seconds of any loss. A worker is live
  while its beat changes, and a worker that finds no other live worker has all sales.
- Two workers that serve one sale at the same time change nothing twice: the scripts and the lock on
  the cursor decide. Their lists may differ for some seconds, so nothing else may rely on them.

No clock is involved. A worker counts as gone if its beat was the same in several reads in a row, so
neither a wrong clock nor a pause of Redis or of the reader hides the end of a worker.
"""

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from hashlib import blake2b
from typing import Final

import msgspec

from reservation.adapters.redis.worker_registry import WorkerEntry

__all__ = ["Duty", "Share"]

#: Number of consecutive reads with the same beat after which a worker counts as gone.
SAME_BEATS_MAX: Final = 3


class Duty(StrEnum):
    """The parts of the work on a sale that a worker may be unable to do."""

    #: Expire holds by the clock. It needs a correct clock.
    EXPIRE = "expire"
    #: Flush and settle. It needs SQL.
    WRITE = "write"


class _Seen(msgspec.Struct):
    entry: WorkerEntry
    #: Reads since its beat changed.
    same: int = 0


class Share:
    """This worker's share of the sales.

    Args:
        name: this worker's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: dict[str, _Seen] = {}
        #: The candidates for each duty; the first by rank serves a sale.
        self._able: dict[Duty, tuple[str, ...]] = dict.fromkeys(Duty, (name,))
        self.workers: tuple[str, ...] = (name,)

    def observe(self, entries: Mapping[str, WorkerEntry]) -> bool:
        """Use the entries of one read; return whether the share may have changed."""
        self._seen = {name: self._aged(name, entry) for name, entry in entries.items()}
        live = {
            name
            for name, seen in self._seen.items()
            if seen.same < SAME_BEATS_MAX and name != self._name
        }
        able = {duty: self._able_to(duty, live) for duty in Duty}
        workers = tuple(sorted({*live, self._name}))
        changed = (workers, able) != (self.workers, self._able)
        self.workers, self._able = workers, able
        return changed

    @property
    def gone(self) -> Collection[str]:
        """The workers that no longer beat but still have an entry."""
        return [name for name in self._seen if name not in self.workers]

    def has(self, duty: Duty, subject: str) -> bool:
        """Whether this worker performs the duty for a sale, or for a loop over all sales."""
        able = self._able[duty]
        return self._name == (able[0] if len(able) == 1 else _first(able, subject))

    def of(self, sale_ids: Iterable[str]) -> list[str]:
        """The sales for which this worker has a duty."""
        return [sale_id for sale_id in sale_ids if any(self.has(duty, sale_id) for duty in Duty)]

    def _aged(self, name: str, entry: WorkerEntry) -> _Seen:
        before = self._seen.get(name)
        same = before.same + 1 if before is not None and before.entry.beat == entry.beat else 0
        return _Seen(entry, same)

    def _able_to(self, duty: Duty, live: Collection[str]) -> tuple[str, ...]:
        """The live workers that can perform the duty; all of them if none can."""
        everyone = {*live, self._name}
        able = {
            name
            for name in everyone
            if name not in self._seen or duty not in self._seen[name].entry.unable
        }
        return tuple(sorted(able or everyone))


def _first(names: Collection[str], subject: str) -> str:
    """The first of these by rank for this subject (rendezvous hashing).

    A worker that joins or leaves moves only the subjects that it gets or had.
    """
    return max(
        names, key=lambda name: blake2b(f"{name}\0{subject}".encode(), digest_size=8).digest()
    )
