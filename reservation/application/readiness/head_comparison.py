"""Head comparison: a sale's last event in Redis against SQL and the marks of every process."""

from collections.abc import Collection, Mapping
from typing import Final

from reservation.adapters.redis.fences import RETIRING_EPOCH
from reservation.adapters.redis.sale_writer import RedisSaleHead
from reservation.adapters.sql.events import MarkRow
from reservation.adapters.sql.sales import SaleHead

__all__ = ["AgreedHeads", "compare", "has_event"]

#: Unchanged sales of one round, at least; a round compares a share of them, and all of them in
#: turn.
UNCHANGED_AT_ONCE: Final = 100
#: Rounds in which each unchanged sale is compared once, at most.
TURNS_MAX: Final = 10


def compare(
    head: SaleHead, found: RedisSaleHead | None, marks: Collection[MarkRow] = ()
) -> str | None:
    """The loss in Redis' state of a sale, which was read after SQL's; None if there is none.

    Redis ahead of SQL is normal: the flusher follows. Redis behind a mark is a loss.
    """
    if found is None:
        return f"Redis has no such sale, or its head is damaged; SQL has {head.seq} of its events"
    if found.epoch == RETIRING_EPOCH + head.epoch and found.seq == head.seq:
        # A worker was interrupted between the fence and SQL's record; the next round continues.
        return None
    if found.epoch != head.epoch:
        return f"Redis has another epoch of the sale; SQL ends at event {head.seq}"
    if found.seq < head.seq:
        return (
            f"Redis ends at event {found.seq}, SQL at {head.seq}:"
            f" {head.seq - found.seq} events are lost"
        )
    there = found.chain if found.seq == head.seq else found.chain_at(head.seq)
    if there is not None and head.seq and there != head.chain:
        return f"event {head.seq} in Redis differs from SQL"
    for mark in marks:
        if mark.epoch != head.epoch:
            continue
        if found.seq < mark.seq:
            return (
                f"Redis ends at event {found.seq}, but acknowledged event {mark.seq} before: "
                f"{mark.seq - found.seq} events are lost"
            )
        if mark.differs:
            return f"event {mark.seq} in SQL differs from the one that Redis acknowledged"
        there = found.chain if found.seq == mark.seq else found.chain_at(mark.seq)
        # An event that has left the outbox is in SQL: the next comparison checks it there.
        if mark.chain and there is not None and there != mark.chain:
            return f"event {mark.seq} differs from the one that Redis acknowledged"
    return None


def has_event(found: RedisSaleHead, head: SaleHead) -> bool:
    """Whether Redis shows the last event in SQL."""
    chain = found.chain if found.seq == head.seq else found.chain_at(head.seq)
    return chain == head.chain


class AgreedHeads:
    """The sales that agreed, each with the epoch and the number of SQL's last event at that time.

    That event need not be read in Redis again in this life of the server.
    """

    def __init__(self) -> None:
        self._lives: dict[str, str] = {}
        self._agreed: dict[str, tuple[str, int]] = {}
        #: Grows with each life of a server: no sale agrees with it until it is compared.
        self.generation = 0

    def begin_life(self, node: str, life: str) -> bool:
        """Note the life of a server; return whether it is another one, which has other events."""
        if life == self._lives.get(node):
            return False
        self._lives[node], self._agreed = life, {}
        self.generation += 1
        return True

    def add(self, sale_id: str, head: SaleHead) -> None:
        """Note that the server has this event."""
        self._agreed[sale_id] = head.epoch, head.seq

    def includes(self, sale_id: str, head: SaleHead) -> bool:
        """Whether the sale agreed, and has no later event in SQL."""
        return self._agreed.get(sale_id) == (head.epoch, head.seq)

    def due(
        self, heads: Mapping[str, SaleHead], suspects: Collection[str], round_number: int
    ) -> list[str]:
        """The sales to compare in this round: all that did not agree, and a share of the others.

        Args:
            heads: every sale, as SQL has it.
            suspects: sales to compare in every round.
            round_number: selects the share; consecutive numbers select all in turn.
        """
        unchanged = sorted(
            sale_id
            for sale_id, head in heads.items()
            if sale_id not in suspects and self.includes(sale_id, head)
        )
        turns = max(1, min(TURNS_MAX, len(unchanged) // UNCHANGED_AT_ONCE))
        later = set(unchanged).difference(unchanged[round_number % turns :: turns])
        return [sale_id for sale_id in heads if sale_id not in later]
