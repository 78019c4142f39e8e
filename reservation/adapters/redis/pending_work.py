"""Pending background work of many sales, read in one exchange or two."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, UnexpectedReply, unwrap
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_number
from reservation.domain.clock import LAST_MS
from reservation.domain.states import SaleStatus

__all__ = ["PendingWork", "PendingWorkReader"]


class PendingWork(msgspec.Struct, frozen=True, kw_only=True):
    """The first pending work of each kind in one sale. Times are the server's, in ms."""

    #: The number of the sale's last event; -1 where the sale is gone or damaged.
    seq: int
    #: Entries of the outbox. The last event stays when SQL has it, so a flushed sale has one.
    outbox: int
    #: The nearest deadline of a hold, the nearest end of a lease and of a virtual account.
    deadline_ms: int | None
    lease_ms: int | None
    deposit_ms: int | None
    #: The duration of a hold: a new hold is due no earlier.
    hold_seconds: int
    #: When it closes; 0 if an operator has closed it.
    closes_at_ms: int


#: A sale with an unreadable key: each kind of round runs and reports its own error.
DAMAGED: Final = PendingWork(
    seq=-1,
    outbox=0,
    deadline_ms=0,
    lease_ms=0,
    deposit_ms=0,
    hold_seconds=0,
    closes_at_ms=LAST_MS,
)


#: Errors of reading damaged work: an error reply, or an infinite score.
_DAMAGED: Final = (StoreUnavailable, UnexpectedReply, OverflowError)

#: The fields of a sale's hash that are read. The first differs after each change of the sale.
_HEAD: Final = ("seq", "hold_seconds", "status", "closes_at")


class PendingWorkReader:
    """Reads the pending work of sales."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys

    async def read(self, known: Mapping[str, PendingWork | None]) -> Mapping[str, PendingWork]:
        """The pending work of each of these sales.

        Args:
            known: sale id -> its work at an earlier read. It is returned again if the sale has had
                no event since. None reads all keys of the sale.

        Raises:
            StoreUnavailable: no command was sent.
            StoreUncertain: a reply was lost.
        """
        found = {sale_id: work for sale_id, work in known.items() if work is not None}
        asked = [self._head_command(sale_id) for sale_id in found]
        heads = await self._connections.pipeline(asked)
        for (sale_id, work), head in zip(list(found.items()), heads, strict=True):
            if isinstance(head, Exception) or head[0] != str(work.seq):
                del found[sale_id]
        changed = [sale_id for sale_id in known if sale_id not in found]
        replies = iter(await self._connections.pipeline(self._commands(changed)))
        # Five replies for each sale, in the order of the commands.
        of_sales = zip(changed, replies, replies, replies, replies, replies, strict=False)
        return found | {sale_id: _work_of(replies) for sale_id, *replies in of_sales}

    def _head_command(self, sale_id: str) -> tuple[str, ...]:
        return ("HMGET", self._keys.of(sale_id).sale, *_HEAD)

    def _commands(self, sale_ids: Sequence[str]) -> list[tuple[str | int, ...]]:
        commands: list[tuple[str | int, ...]] = []
        for sale_id in sale_ids:
            keys = self._keys.of(sale_id)
            commands += [
                self._head_command(sale_id),
                ("XLEN", keys.outbox),
                ("ZRANGE", keys.deadlines, 0, 0, "WITHSCORES"),
                ("ZRANGE", keys.confirming, 0, 0, "WITHSCORES"),
                ("ZRANGE", keys.deposits, 0, 0, "WITHSCORES"),
            ]
        return commands


def _work_of(replies: Sequence[Any]) -> PendingWork:
    try:
        head, outbox, deadline, lease, deposit = [unwrap(reply) for reply in replies]
        return PendingWork(
            seq=_or(as_number(head[0]), -1),
            outbox=outbox,
            deadline_ms=_score_of(deadline),
            lease_ms=_score_of(lease),
            deposit_ms=_score_of(deposit),
            hold_seconds=_or(as_number(head[1]), 0),
            closes_at_ms=0 if head[2] == SaleStatus.CLOSED else _or(as_number(head[3]), LAST_MS),
        )
    except _DAMAGED:
        return DAMAGED


def _score_of(first: list[str]) -> int | None:
    return int(float(first[1])) if first else None


def _or(number: int | None, default: int) -> int:
    return default if number is None else number
