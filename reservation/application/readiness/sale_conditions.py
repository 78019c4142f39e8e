"""Preconditions of a hold per sale: its outbox in Redis and its counters."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import (
    StoreUnavailable,
    StoreUncertain,
    UnexpectedReply,
    unwrap,
)
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_mapping, as_number
from reservation.adapters.redis.outbox import GROUP
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.store import SqlStore
from reservation.domain.errors import BrokenInvariant
from reservation.domain.states import SaleStatus

__all__ = ["SALE_ROWS", "SalePreflight"]

#: The rows, and the meaning of a failure.
SALE_ROWS: Final = {
    "sale-outbox": "the outbox was truncated or its consumer group skipped events: they would "
    "not reach SQL",
    "sale-counters": "an item's counters do not add up: data was edited manually",
}
#: Time-out of one SQL answer.
ANSWER_SECONDS_MAX: Final = 2.5
#: Sales of one round trip.
SALES_AT_ONCE: Final = 200
#: Number of quiet sales per check, in turn: those without an event of this process since their last
#: check. Their scripts detect a lost outbox.
QUIET_AT_ONCE: Final = 200
#: Sales whose counters are added up in one check; the next check continues with the next ones. Two
#: round trips each, so that a check stays short.
COUNTED_AT_ONCE: Final = 20


class _Outbox(msgspec.Struct, frozen=True):
    """A sale's stream: its first entry and its consumer groups."""

    first: int | None
    groups: Sequence[Any]


class SalePreflight:
    """One process's health check of the sales."""

    def __init__(
        self, connections: RedisClient, keys: Keys, sales: SaleStore, sql: SqlStore
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._sales = sales
        self._sql = sql
        self._counted = 0
        #: This process's last event of each sale at its last check, and the turn of the quiet ones.
        self._judged_at: dict[str, int | None] = {}
        self._turn = 0
        self._over: frozenset[str] = frozenset()
        self._stuck: frozenset[str] = frozenset()
        self._miscounted: set[str] = set()

    async def check(self, excluded: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
        """The failed rows, by sale.

        Args:
            excluded: sales to skip: they wait for a rebuild and would fail every row.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not answer.
            TimeoutError: SQL does not answer.
        """
        sale_ids = [
            sale_id
            for sale_id in await self._ids()
            if sale_id not in excluded and self._is_there(sale_id)
        ]
        due, seen = self._due_for_judgement(sale_ids), self._connections.marks.seqs()
        known, over, stuck = await self._judge(due)
        if stuck:
            # The first flush of a new sale may come between the reads of Redis and of SQL.
            _, _, stuck = await self._judge(stuck)
        self._stuck = frozenset(stuck)
        self._over = self._over.difference(known) | over
        # A sale that is being created, which SQL does not have yet, stays new.
        self._judged_at |= {sale_id: seen.get(sale_id) for sale_id in (*known, *over)}
        self._judged_at = {
            sale_id: self._judged_at[sale_id] for sale_id in sale_ids if sale_id in self._judged_at
        }
        known = [sale_id for sale_id in self._judged_at if sale_id not in self._over]
        rows: dict[str, tuple[str, ...]] = dict.fromkeys(stuck, ("sale-outbox",))
        await self._count(known)
        for sale_id in self._miscounted:
            rows[sale_id] = (*rows.get(sale_id, ()), "sale-counters")
        return rows

    async def _ids(self) -> list[str]:
        try:
            return await self._sales.ids()
        except (StoreUnavailable, StoreUncertain):
            # In a cluster the master of the set may be away while other masters serve their sales.
            if not self._connections.is_cluster:
                raise
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return sorted(await self._sql.sales.heads())

    def _is_there(self, sale_id: str) -> bool:
        node = self._connections.node_of(sale_id)
        return not self._connections.is_cluster or (node is not None and not node.is_away)

    def _due_for_judgement(self, sale_ids: Sequence[str]) -> list[str]:
        """The sales that are new, failed or changed by this process, and some quiet ones."""
        seen = self._connections.marks.seqs()
        quiet = [
            sale_id
            for sale_id in sale_ids
            if sale_id in self._judged_at
            and sale_id not in self._stuck
            and self._judged_at[sale_id] == seen.get(sale_id)
        ]
        if self._turn >= len(quiet):
            self._turn = 0
        spared = {*quiet[: self._turn], *quiet[self._turn + QUIET_AT_ONCE :]}
        self._turn += QUIET_AT_ONCE
        return [sale_id for sale_id in sale_ids if sale_id not in spared]

    async def _judge(self, sale_ids: Sequence[str]) -> tuple[list[str], frozenset[str], list[str]]:
        """The sales that are not over, those that are, and those whose events would not reach SQL.

        A sale that SQL does not have yet is being created and is not judged.
        """
        found: dict[str, _Outbox] = {}
        for start in range(0, len(sale_ids), SALES_AT_ONCE):
            found |= await self._read_outboxes(sale_ids[start : start + SALES_AT_ONCE])
        # SQL after Redis: events acknowledged there are written here.
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            heads = await self._sql.sales.heads(sale_ids)
        known = [sale_id for sale_id in found if sale_id in heads]
        over = frozenset(sale_ids).difference(found)
        stuck = [name for name in known if not _reaches_sql(found[name], heads[name].seq)]
        return known, over, stuck

    async def _read_outboxes(self, sale_ids: Sequence[str]) -> dict[str, _Outbox]:
        """The outboxes of the sales that are not over: the others take no more holds."""
        commands: list[tuple[str | int, ...]] = []
        for sale_id in sale_ids:
            names = self._keys.of(sale_id)
            commands.append(("HMGET", names.sale, "status", "closes_at"))
            commands.append(("XRANGE", names.outbox, "-", "+", "COUNT", 1))
            commands.append(("XINFO", "GROUPS", names.outbox))
        replies = [_shown(reply) for reply in await self._connections.pipeline(commands)]
        found: dict[str, _Outbox] = {}
        for position, sale_id in enumerate(sale_ids):
            head, entries, groups = replies[3 * position : 3 * position + 3]
            if not _is_over(head, self._connections.server_now_ms(sale_id)):
                first = _seq(entries[0][0]) if entries else None
                found[sale_id] = _Outbox(first, groups or ())
        return found

    async def _count(self, sale_ids: Sequence[str]) -> None:
        self._miscounted &= set(sale_ids)
        if self._counted >= len(sale_ids):
            self._counted = 0
        some = sale_ids[self._counted : self._counted + COUNTED_AT_ONCE]
        self._counted += COUNTED_AT_ONCE
        # Sales that did not add up are checked each time, so that none stays closed for long.
        for sale_id in {*some, *self._miscounted}:
            if await self._adds_up(sale_id):
                self._miscounted.discard(sale_id)
            else:
                self._miscounted.add(sale_id)

    async def _adds_up(self, sale_id: str) -> bool:
        try:
            counters = await self._sales.counters(sale_id)
        except (BrokenInvariant, ValueError):
            return False  # Not even numbers, or no hash.
        if counters is None:
            return True  # It was removed between two reads.
        return all(
            total == available + held + sold and min(available, held, sold) >= 0
            for total, available, held, sold in counters.stocks.values()
        )


def _shown(reply: Any) -> Any:
    """A reply; None if the key is missing or has another type."""
    return None if isinstance(reply, UnexpectedReply) else unwrap(reply)


def _is_over(head: Sequence[str | None] | None, now_ms: int) -> bool:
    status, closes_at = head or (None, None)
    if status == SaleStatus.CLOSED:
        return True
    closes_at_ms = as_number(closes_at)
    return closes_at_ms is not None and now_ms >= closes_at_ms


def _reaches_sql(outbox: _Outbox, flushed: int) -> bool:
    """Whether every event that SQL lacks is still in the stream and will be delivered."""
    if outbox.first is None or outbox.first > flushed + 1:
        # A sale that is just being created has no event yet.
        return outbox.first is None and flushed == 0
    for group in map(as_mapping, outbox.groups):
        if group["name"] == GROUP:
            passed = _seq(group["last-delivered-id"]) - int(group["pending"])
            return passed <= flushed
    # The flusher's next round creates the group after SQL's last event. A new sale has none yet; a
    # promoted replica may lack it although SQL has every event.
    return True


def _seq(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
