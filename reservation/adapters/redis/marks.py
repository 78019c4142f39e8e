"""High-water marks: the last event of each sale that this process has seen.

A server that ends before a mark, or has another event under its number, has lost changes: a replica
that was promoted too early, a truncated file, a restored snapshot. Every script receives the mark
and refuses to write in that case (`went_back`).
"""

from collections.abc import Callable, Mapping, Sequence

import msgspec

__all__ = ["NO_MARK", "Mark", "Marks"]

#: The script's argument where this process has seen no event of the sale.
NO_MARK: tuple[int, str] = (0, "")


class Mark(msgspec.Struct, frozen=True):
    """An event that Redis has acknowledged."""

    epoch: str
    seq: int
    #: Empty if only the number is known: a token carries no chain value.
    chain: str


class Marks:
    """The marks of one process, taken from replies and tokens."""

    def __init__(self) -> None:
        self._marks: dict[str, Mark] = {}
        self._unwritten: set[str] = set()
        self._on_regression: Callable[[str, str], None] | None = None

    def listen(self, on_regression: Callable[[str, str], None]) -> None:
        """Register a callback for `report_regression`; it receives the sale and the epoch."""
        self._on_regression = on_regression

    def report_regression(self, sale_id: str, epoch: str) -> None:
        """A script found the server behind its mark."""
        if self._on_regression is not None:
            self._on_regression(sale_id, epoch)

    def of(self, sale_id: str, epoch: str) -> tuple[int, str]:
        """The number and the chain value to pass to a script of this sale."""
        mark = self._marks.get(sale_id)
        return (mark.seq, mark.chain) if mark is not None and mark.epoch == epoch else NO_MARK

    def seqs(self) -> dict[str, int]:
        """For each sale, the number of the last event that this process has seen."""
        return {sale_id: mark.seq for sale_id, mark in self._marks.items()}

    def learn(self, sale_id: str, epoch: str, seq: int, chain: str) -> None:
        """Keep an event that Redis acknowledged, unless a later one of its epoch is known."""
        mark = self._marks.get(sale_id)
        if mark is not None and mark.epoch == epoch:
            known_better = seq < mark.seq or (seq == mark.seq and bool(mark.chain))
            if known_better:
                return
        self._marks[sale_id] = Mark(epoch, seq, chain)
        self._unwritten.add(sale_id)

    def learn_head(self, sale_id: str, epoch: str, head: Sequence[str]) -> None:
        """Keep the head at the end of a script's reply; empty if the script wrote nothing."""
        if head:
            self.learn(sale_id, epoch, int(head[0]), head[1])

    def take_unwritten(self) -> dict[str, Mark]:
        """The marks that changed since the last call, by sale."""
        taken = {sale_id: self._marks[sale_id] for sale_id in self._unwritten}
        self._unwritten.clear()
        return taken

    def restore_unwritten(self, sale_ids: Mapping[str, Mark]) -> None:
        """Return these marks, which could not be written, with the next ones."""
        self._unwritten.update(sale_ids)
