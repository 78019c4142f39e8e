"""Replay with losses: SQL, the flusher and the rebuild follow the model step by step as well.

Before each write of a partition the replay keeps its memory. A loss puts an earlier one back, and
closes the partition as the marks of the processes would. The rebuild then runs as a task, which
waits before each comparison with a peer until the model makes the same step.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import delete, select

from reservation.adapters.redis.keys import partition_of
from reservation.adapters.sql import tables
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.application.audit.counters import CounterAudit
from reservation.application.recovery.peers import PartitionPeers
from reservation.application.recovery.rebuild import RebuildReport
from reservation.domain.events import Event
from tests.support.in_process import Bench
from tests.support.partition_replay import Replay
from tests.unit.partitions.sale import Partition
from tests.unit.partitions.world import Scenario, World

__all__ = ["LossReplay"]


class _Moment(msgspec.Struct):
    """A partition on the server at one instant, and the state of the replay then."""

    seq: int
    memory: dict[str, bytes]
    baskets: dict[int, dict[str, Any]]
    fences: dict[int, str]
    offset: int


class _SteppedPeers(PartitionPeers):
    """Makes each comparison when the replay asks for it."""

    def __init__(self, peers: PartitionPeers, partitions: int) -> None:
        super().__init__(peers._transfers, peers._sql)
        self.turns = [asyncio.Semaphore(0) for _ in range(partitions)]
        self.done = [asyncio.Semaphore(0) for _ in range(partitions)]

    async def compare(self, lane: str, epoch: str) -> None:
        sale_id, place = partition_of(lane)
        for step in (self.borrow_again, self.lend_again):
            for peer in range(len(self.turns)):
                if peer != place:
                    await self.turns[place].acquire()
                    await step(sale_id, place, peer, epoch)
                    self.done[place].release()
        await self.turns[place].acquire()


class LossReplay(Replay):
    """One history with losses, on a server and in SQL."""

    def __init__(self, here: Bench, scenario: Scenario, seen: Counter[str]) -> None:
        super().__init__(here.service.connections, scenario, seen)
        self._here, self._sql = here, here.service.sql
        count = self._sale.partitions
        self._peers = _SteppedPeers(here.service.rebuild._peers, count)
        here.service.rebuild._peers = self._peers
        self._trails: list[list[_Moment]] = [[] for _ in range(count)]
        self._first: list[_Moment] = []
        self._events: list[list[Event]] = []
        #: The model's refills less the server's, which a rebuild counts anew.
        self._offsets = [0] * count
        self._rebuilds: dict[int, asyncio.Task[RebuildReport]] = {}

    async def open(self) -> None:
        for lane in self._partitions:
            lane.epoch, _ = await self._sql.sales.register(lane.id, "{}", 1)
        await super().open()
        for place, lane in enumerate(self._partitions):
            await self._here.flush(lane.id)
            self._first.append(await self._moment(place))
            self._events.append(await self._sql.events.list_after(lane.id, 0, 100))

    async def step(self, label: Sequence[Any], before: World, after: World) -> None:
        grown = [
            (place, await self._moment(place))
            for place, trail in enumerate(after.trails)
            if len(trail) > len(before.trails[place])
        ]
        match label:
            case ("flusher", _, place):
                await self._save(place)
            case ("server", place, "loses events", lost):
                kept = len(self._trails[place]) - lost
                moment = self._trails[place][kept]
                del self._trails[place][kept:]
                await self._go_back(place, moment, after)
            case ("server", place, "and SQL are restored"):
                self._trails[place].clear()
                await self._restore_sql(place)
                await self._go_back(place, self._first[place], after)
            case ("rebuild", place, "compares", _):
                await self._compare_with_a_peer(place, before, after)
            case ("rebuild", place, "opens"):
                await self._open_again(place, after)
            case _:
                await super().step(label, before, after)
        for place, moment in grown:
            self._trails[place].append(moment)
        self._note("step", str(label[2]) if label[0] in ("server", "rebuild") else "of a process")

    async def end(self, world: World) -> None:
        service = self._here.service
        audit = CounterAudit(service.sale_store, self._sql, service.outbox, clock=service.clock)
        for place, lane in enumerate(self._partitions):
            await self.compare(place, world.partitions[place])
            if world.partitions[place].recovery is None:
                await self._here.flush(lane.id)
                report = await audit.compare(lane.id)
                assert (report.ok, report.lag) == (True, 0), report
        assert self._here.alarms == []

    async def aclose(self) -> None:
        """End the rebuilds that the history left."""
        for task in self._rebuilds.values():
            task.cancel()
        await asyncio.gather(*self._rebuilds.values(), return_exceptions=True)
        self._here.service.rebuild._peers = PartitionPeers(self._peers._transfers, self._sql)

    def _refills(self, place: int, expected: Partition) -> int:
        return expected.refills - self._offsets[place]

    async def _moment(self, place: int) -> _Moment:
        lane = self._partitions[place]
        seq = await self._connections.command("HGET", lane.keys.sale, "seq")
        of_place = [n for n, basket in enumerate(self._sale.baskets) if basket.home == place]
        return _Moment(
            int(seq),
            await self._here.remembered(lane.id),
            {n: self._baskets[n] for n in of_place if n in self._baskets},
            {n: self._fences[n] for n in of_place if n in self._fences},
            self._offsets[place],
        )

    async def _save(self, place: int) -> None:
        """Write the events of the first state that SQL lacks, as the flusher does."""
        lane, trail = self._partitions[place], self._trails[place]
        del trail[0]
        until = (trail[0] if trail else await self._moment(place)).seq
        after, _ = await self._sql.events.cursor(lane.id)
        events = await self._here.service.outbox.after(lane.id, after, 1_000)
        outcome = await self._sql.events.apply(lane.id, [one for one in events if one.seq <= until])
        assert outcome.kind is ApplyKind.APPLIED, outcome
        assert outcome.flushed_seq == until

    async def _go_back(self, place: int, moment: _Moment, after: World) -> None:
        if (running := self._rebuilds.pop(place, None)) is not None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        lane = self._partitions[place]
        self._peers.turns[place] = asyncio.Semaphore(0)
        self._peers.done[place] = asyncio.Semaphore(0)
        await self._here.put_back(lane.id, moment.memory)
        await self._connections.command("HSET", lane.keys.sale, "epoch", "closed")
        self._offsets[place] = moment.offset
        for number, basket in enumerate(self._sale.baskets):
            if basket.home == place:
                self._baskets.pop(number, None)
                self._fences.pop(number, None)
        self._baskets |= moment.baskets
        self._fences |= moment.fences
        self._lends = {key: last for key, last in self._lends.items() if key[0] != place}
        await self._run_out(place, after)
        await self.compare(place, after.partitions[place])

    async def _restore_sql(self, place: int) -> None:
        """Bring the partition's rows back to those of its first events."""
        lane = self._partitions[place]
        async with self._sql.database.write() as connection:
            of_lane = select(tables.orders.c.order_id).where(tables.orders.c.sale_id == lane.id)
            lines = tables.order_lines
            await connection.execute(delete(lines).where(lines.c.order_id.in_(of_lane)))
            for table in (
                tables.orders,
                tables.items,
                tables.events,
                tables.stock_movements,
                tables.transfers,
                tables.cursors,
                tables.sales,
            ):
                await connection.execute(delete(table).where(table.c.sale_id == lane.id))
        await self._sql.sales.register(lane.id, "{}", 1)
        await self._sql.events.apply(lane.id, self._events[place])

    async def _compare_with_a_peer(self, place: int, before: World, after: World) -> None:
        lane = self._partitions[place]
        if place not in self._rebuilds:
            run = self._here.service.rebuild.run(lane.id, operator="op", force=True)
            self._rebuilds[place] = asyncio.create_task(run)
        self._peers.turns[place].release()
        done = asyncio.create_task(self._peers.done[place].acquire())
        running = self._rebuilds[place]
        await asyncio.wait({done, running}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            done.cancel()
            await running
            raise AssertionError("the rebuild ended before its last comparison")
        was, now = before.partitions[place], after.partitions[place]
        self._seen["lent again"] += was.lent != now.lent
        self._seen["borrowed again"] += was.received != now.received
        await self._run_out(place, after)
        counted = await self._connections.command("HGET", lane.keys.sale, "refills")
        self._offsets[place] = after.partitions[place].refills - int(counted)
        await self.compare(place, after.partitions[place])

    async def _open_again(self, place: int, after: World) -> None:
        self._peers.turns[place].release()
        report = await self._rebuilds.pop(place)
        assert report.rebuilt
        self._partitions[place].epoch = report.epoch
        await self.compare(place, after.partitions[place])

    async def _run_out(self, place: int, world: World) -> None:
        """Let the deadlines pass again that had passed: time does not go back."""
        for order in world.partitions[place].orders:
            if order.is_due:
                await self._partitions[place].run_out(self._baskets[order.number])
