"""Data-loss detection: compares Redis with SQL and with the marks of every process.

A server that fails over to a replica, restarts from a truncated file or is restored from a snapshot
has an older state of the right epoch. Each of these shows it:

    a mark      a process has seen a later event, or another one under the same number
    an intent   SQL has an intent to take money, and its order lacks the claim before it
    a token     it is ours and of this epoch, and its order is in neither store
    a finish    the claim that it ends is missing

The sale is closed then (`sale_recovering`) until a rebuild begins another epoch.
"""

import asyncio
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.marks import Mark
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_writer import RedisSaleHead, SaleWriter
from reservation.adapters.sql.events import MarkRow
from reservation.adapters.sql.payment_intents import UnmetIntent
from reservation.adapters.sql.sales import SaleHead
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.head_comparison import AgreedHeads, compare, has_event
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleRecovering
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Claims
from reservation.telemetry.metrics import alarm

__all__ = ["DataLossDetector", "as_settling", "is_lost", "is_under_way"]

log = structlog.get_logger(__name__)

#: Time-out of the SQL queries of one comparison.
SQL_SECONDS_MAX: Final = 2.5
#: Sales of one round trip.
SALES_AT_ONCE: Final = 200
#: Orders of one round trip.
ORDERS_AT_ONCE: Final = 500
#: Maximum age in SQL of a live process's heartbeat. It writes one every two seconds.
LIVE_SECONDS: Final = 5.0
BEAT_SECONDS: Final = 2.0
#: Retention of marks whose event is in SQL, and of processes without a heartbeat.
TIDY_SECONDS: Final = 60.0

#: An intent is met while its payment is the order's own and the order is in one of these.
_MET: Final = (Status.CONFIRMING, Status.AWAITING_DEPOSIT, Status.CONFIRMED, Status.REFUNDED)


def is_lost(intent: UnmetIntent, order: Reservation | None, epoch: str) -> bool:
    """Whether Redis, in this epoch, lacks the claim that came before the intent."""
    return intent.epoch == epoch and (order is None or order.fence < intent.fence)


def is_under_way(intent: UnmetIntent, order: Reservation | None) -> bool:
    """Whether the order has this payment: it is undecided, or its end is on its way to SQL."""
    if order is None:
        return False
    own = order.payment_key == intent.payment_key and order.status in _MET
    return own or intent.payment_key in order.attempts


def as_settling(intent: UnmetIntent, order: Reservation | None) -> Reservation | None:
    """The order as shown to its buyer while the payment is undecided; None if there is none."""
    if order is None:
        if intent.reservation is None:
            return None
        order = msgspec.json.decode(intent.reservation, type=Reservation)
    return msgspec.structs.replace(order, status=Status.CONFIRMING, payment_key=intent.payment_key)


class DataLossDetector:
    """Finds losses in Redis, closes those sales and keeps the evidence in SQL.

    Args:
        connections: the server; each report triggers another comparison.
        restorer: reads the heads of sales.
        store: reads orders of a server that is not vouched for yet.
        sql: the marks and losses, and the sales' last events.
        catalog: closes sales.
        clock: the time.
    """

    def __init__(
        self,
        connections: RedisClient,
        restorer: SaleWriter,
        store: ReservationStore,
        sql: SqlStore,
        catalog: Catalog,
        *,
        clock: Clock,
    ) -> None:
        self._connections = connections
        self._restorer = restorer
        self._store = store
        self._sql = sql
        self._catalog = catalog
        self._marks = connections.marks
        self._clock = clock
        #: Unique per process, even on one machine and after reuse of a process id.
        self._process = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        self._agreed = AgreedHeads()
        #: Whether SQL was restored from a backup, and its sales are not opened yet.
        self.restore_pending = False
        #: The epochs that SQL returned last.
        self.epochs: dict[str, str] = {}
        #: Reports that are not in SQL yet.
        self._unwritten: dict[tuple[str, str], str] = {}
        #: Sales that Redis never had, according to SQL, and the first comparison without them.
        self._missing_since: dict[str, int] = {}
        self._rounds = 0
        #: Whether this round compares every sale.
        self._everything = True
        self._writing: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        #: When the last heartbeat was written, and the server to which this process wrote then.
        self._beat: tuple[float, str | None] = (-BEAT_SECONDS, None)
        self._tidied_at = clock.monotonic()
        self._marks.listen(self._report_regression)

    def report(self, sale_id: str, epoch: str, reason: str) -> None:
        """Report a loss: close the sale now; the other processes read the report in SQL.

        A retired sale has none. A server with an older state may have it again until it is removed.
        """
        if self._catalog.is_retired(sale_id):
            return
        if self._catalog.close(sale_id, reason):
            alarm(Alarm.SALE_RECOVERING, sale_id=sale_id, gap=reason)
        self._unwritten[sale_id, epoch] = reason
        self._connections.doubted.set()

    def is_reported(self, sale_id: str) -> bool:
        """Whether a report of this sale is still on its way to SQL."""
        return any(sale_id == name for name, _ in self._unwritten)

    def _report_regression(self, sale_id: str, epoch: str) -> None:
        seq, _ = self._marks.of(sale_id, epoch)
        self.report(sale_id, epoch, f"Redis lacks event {seq}, which it had acknowledged")

    def saw(self, claims: Claims) -> None:
        """Learn from a token its sale's high-water mark at the time of issue."""
        known = self._catalog.cached(claims.sale_id)
        if known is not None and known.epoch == claims.epoch:
            self._marks.learn(claims.sale_id, claims.epoch, claims.seq, "")

    async def missing(self, claims: Claims) -> None:
        """A token's order is neither in Redis nor in SQL: a loss, unless an earlier epoch had it.

        Raises:
            SQLAlchemyError, OSError: the current epoch is unknown.
        """
        epochs = await self._sql.sales.epochs()
        if epochs.get(claims.sale_id) == claims.epoch:
            reason = f"order {claims.order_id} of event {claims.seq} is missing in Redis and SQL"
            self.report(claims.sale_id, claims.epoch, reason)

    async def settling(self, order: Reservation) -> Reservation | None:
        """The order with an undecided payment, if SQL has an intent without an end.

        Raises:
            SQLAlchemyError, OSError: SQL does not answer.
        """
        for intent in await self._sql.intents.list_unmet(order_id=order.order_id):
            # An attempt that the order lists has ended, and its end is on its way to SQL.
            if intent.payment_key not in order.attempts:
                return as_settling(intent, order)
        return None

    async def settling_order(self, order_id: str) -> Reservation | None:
        """An order missing in Redis and SQL, from its intent; None if there is no intent."""
        intents = await self._sql.intents.list_unmet(order_id=order_id)
        return as_settling(intents[0], None) if intents else None

    async def write(self, run_id: str) -> None:
        """Write to SQL this process's marks and reports, and the server to which it writes.

        A cancelled caller does not cancel the transaction: a connection without an owner would
        keep SQLite's write lock.

        Args:
            run_id: of the server; empty while this process writes to none.
        """
        task = asyncio.create_task(self._write(run_id))
        self._writing.add(task)
        task.add_done_callback(self._written)
        await asyncio.shield(task)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # The caller raises it as well, unless it was cancelled.
            log.debug("marks_write_failed", reason=str(error) or type(error).__name__)

    async def _write(self, run_id: str) -> None:
        # Serialized: an older mark must not overwrite a newer one.
        async with self._turn:
            now, (beat_at, beat_run_id) = self._clock.monotonic(), self._beat
            seen = self._marks.take_unwritten()
            fresh = beat_run_id == run_id and now - beat_at < BEAT_SECONDS
            if fresh and not seen and not self._unwritten:
                return
            try:
                await self._write_down(run_id, seen)
            except BaseException:
                self._marks.restore_unwritten(seen)
                raise
            self._beat = (now, run_id)

    async def _write_down(self, run_id: str, seen: Mapping[str, Mark]) -> None:
        rows = {
            sale_id: MarkRow(epoch=mark.epoch, seq=mark.seq, chain=mark.chain)
            for sale_id, mark in seen.items()
        }
        now, now_ms = self._clock.monotonic(), self._clock.now_ms()
        await self._sql.events.put_marks(self._process, run_id=run_id, seen=rows, now_ms=now_ms)
        for (sale_id, epoch), reason in list(self._unwritten.items()):
            await self._sql.events.add_loss(sale_id, epoch, reason, now_ms)
            del self._unwritten[sale_id, epoch]
        if now - self._tidied_at > TIDY_SECONDS:
            self._tidied_at = now
            await self._sql.events.prune_marks(before_ms=now_ms - round(TIDY_SECONDS * 1000))

    async def leave(self) -> None:
        """On shutdown: this process writes to no server any more; others need not wait for it."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        if self._beat[1] is None:
            return
        try:
            await self.write("")
            await self._sql.events.remove_process(self._process)
        except (SQLAlchemyError, OSError) as error:
            log.warning("marks_write_failed", reason=str(error))

    async def writing_elsewhere(self, run_id: str, node: str = "") -> list[str]:
        """Other live processes that may still write to another server or another life of it.

        Args:
            run_id: the life.
            node: the server's own name among the masters of a cluster. A former master counts as
                another life of its successor.
        """
        since_ms = self._clock.now_ms() - round(LIVE_SECONDS * 1000)
        writers = await self._sql.events.list_writers(since_ms=since_ms)
        return [
            process
            for process, other in writers.items()
            if process != self._process and self._is_elsewhere(other, run_id, node)
        ]

    def _is_elsewhere(self, other: str, run_id: str, node: str) -> bool:
        if not self._connections.is_cluster:
            return other not in ("", run_id)
        masters = {one.identity for one in self._connections.nodes}
        lives = dict(part.split("=", 1) for part in other.split() if "=" in part)
        return lives.get(node, run_id) != run_id or not lives.keys() <= masters

    def begin_round(self, *, everything: bool = True) -> None:
        """Begin a round over all sales; it may compare them more than once.

        Args:
            everything: compare also every sale that agreed before and has not changed in SQL since.
                Otherwise each round compares some of them, so that its cost is bounded.
        """
        self._rounds += 1
        self._everything = everything

    async def gaps(
        self, among: Collection[str] | None = None
    ) -> tuple[dict[str, str], dict[str, set[str]]]:
        """The sales with a loss, and the lives of each server that answered, by its own name.

        The sales of a cluster's master that does not answer are not compared.

        Args:
            among: compare only these.

        Raises:
            StoreUnavailable, StoreUncertain: no server answers.
        """
        async with asyncio.timeout(SQL_SECONDS_MAX):
            heads = await self._sql.sales.heads()
            marks = await self._sql.events.list_unproven_marks()
            reported = await self._sql.events.list_losses()
            self.restore_pending = await self._sql.restores.pending() is not None
        await self._connections.know_servers()
        self.epochs = {sale_id: head.epoch for sale_id, head in heads.items()}
        if among is None and not self._everything:
            suspects = {*marks, *reported, *self._catalog.closed}
            due = self._agreed.due(heads, suspects, self._rounds)
            generation = self._agreed.generation
            lost, lives = await self._compare(due, heads, marks, reported, is_round=True)
            # A loss of one sale, or another life of a server, puts every sale in doubt.
            if not lost and generation == self._agreed.generation:
                return lost, lives
        sale_ids = [sale_id for sale_id in heads if among is None or sale_id in among]
        return await self._compare(sale_ids, heads, marks, reported, is_round=among is None)

    async def _compare(
        self,
        sale_ids: Sequence[str],
        heads: Mapping[str, SaleHead],
        marks: Mapping[str, Sequence[MarkRow]],
        reported: Mapping[str, str],
        *,
        is_round: bool,
    ) -> tuple[dict[str, str], dict[str, set[str]]]:
        """The losses of these sales, and the lives of each server, as `gaps` returns them.

        Args:
            is_round: these are all the sales that this round must compare.
        """
        lost: dict[str, str] = {}
        lives: dict[str, set[str]] = {}
        missing: dict[str, int] = {}
        for node, some in self._pages(sale_ids, heads):
            try:
                life, found = await self._read_heads(some, marks, node)
            except (StoreUnavailable, StoreUncertain):
                if not self._connections.is_cluster:
                    raise
                node.note_away(away=True)
                lives.pop(node.identity, None)
                continue
            lives.setdefault(node.identity, set()).add(life)
            for sale_id, head in some.items():
                gap = compare(head, found[sale_id], marks.get(sale_id, ()))
                gap = gap or reported.get(sale_id) or self._unwritten.get((sale_id, head.epoch))
                if gap is None:
                    continue
                if found[sale_id] is None and head.seq == 0:
                    missing[sale_id] = self._missing_since.get(sale_id, self._rounds)
                    # It is being created, unless an earlier round missed it too.
                    if missing[sale_id] == self._rounds:
                        continue
                lost[sale_id] = gap
        if is_round:
            self._missing_since = missing
        if not lives:
            raise StoreUnavailable("no server answers")
        return lost, lives

    def _pages(
        self, sale_ids: Sequence[str], heads: Mapping[str, SaleHead]
    ) -> Iterator[tuple[RedisClient, dict[str, SaleHead]]]:
        """The sales of each server, a page at a time; at least one page for each server."""
        servers = list(self._connections.nodes)
        of_server: dict[str, list[str]] = {node.identity: [] for node in servers}
        for sale_id in sale_ids:
            node = self._connections.node_of(sale_id)
            if node is not None and node.identity in of_server:
                of_server[node.identity].append(sale_id)
        for node in servers:
            own = of_server[node.identity]
            for start in range(0, max(1, len(own)), SALES_AT_ONCE):
                page = own[start : start + SALES_AT_ONCE]
                yield node, {sale_id: heads[sale_id] for sale_id in page}

    async def gap_of(self, sale_id: str, head: SaleHead) -> tuple[str | None, RedisSaleHead | None]:
        """The loss of one sale, None if there is none; and its head in Redis."""
        marks = await self._sql.events.list_unproven_marks()
        reported = await self._sql.events.list_losses()
        await self._connections.know_servers()
        node = self._connections.node_of(sale_id)
        if node is None:
            raise StoreUnavailable("the sale's slot has no master")
        _, found = await self._read_heads({sale_id: head}, marks, node)
        gap = compare(head, found[sale_id], marks.get(sale_id, ()))
        return gap or reported.get(sale_id), found[sale_id]

    async def _read_heads(
        self,
        heads: Mapping[str, SaleHead],
        marks: Mapping[str, Sequence[MarkRow]],
        node: RedisClient,
    ) -> tuple[str, dict[str, RedisSaleHead | None]]:
        """Each head in Redis, with the events there by which it is compared."""

        def wanted(sale_id: str, head: SaleHead) -> Collection[int]:
            numbers = {mark.seq for mark in marks.get(sale_id, ())}
            if not self._agreed.includes(sale_id, head):
                numbers.add(head.seq)
            return numbers

        life, found = await self._restorer.read_heads(
            {sale_id: wanted(sale_id, head) for sale_id, head in heads.items()}, node
        )
        if self._agreed.begin_life(node.identity, life):
            life, found = await self._restorer.read_heads(
                {sale_id: wanted(sale_id, head) for sale_id, head in heads.items()}, node
            )
        # A server may hide its life.
        if life:
            for sale_id, head in heads.items():
                there = found[sale_id]
                if there is not None and there.epoch == head.epoch and has_event(there, head):
                    self._agreed.add(sale_id, head)
        return life, found

    async def find_unmet(self, node: str = "") -> None:
        """Report the sales that have an intent in SQL and lack the claim before it in Redis.

        Args:
            node: the name of the server whose sales are checked.
        """
        intents = [
            intent
            for intent in await self._sql.intents.list_unmet()
            if (owner := self._connections.node_of(intent.sale_id)) and owner.identity == node
        ]
        if not intents:
            return
        epochs = await self._sql.sales.epochs()
        for intent, order in await self.with_orders(intents, self._store):
            self.report_unmet(intent, order, epochs.get(intent.sale_id, ""))

    def report_unmet(self, intent: UnmetIntent, order: Reservation | None, epoch: str) -> bool:
        """Report the sale if Redis lacks the intent's claim; whether it does."""
        if not is_lost(intent, order, epoch):
            return False
        attempt = f"fence {order.fence}" if order is not None else "no such order"
        self.report(
            intent.sale_id,
            epoch,
            f"order {intent.order_id} has {attempt} in Redis, and a payment intent under fence "
            f"{intent.fence}",
        )
        return True

    async def with_orders(
        self, intents: Sequence[UnmetIntent], store: ReservationStore
    ) -> list[tuple[UnmetIntent, Reservation | None]]:
        """Each intent and its order in Redis; intents of a sale that Redis lost are left out."""
        found: list[tuple[UnmetIntent, Reservation | None]] = []
        for start in range(0, len(intents), ORDERS_AT_ONCE):
            page = intents[start : start + ORDERS_AT_ONCE]
            try:
                orders = await store.read_many([intent.order_id for intent in page])
            except SaleRecovering:
                if len({intent.sale_id for intent in page}) > 1:
                    for sale_id in sorted({intent.sale_id for intent in page}):
                        own = [intent for intent in page if intent.sale_id == sale_id]
                        found += await self.with_orders(own, store)
                # The comparison reports a single lost sale.
                continue
            found += zip(page, orders, strict=True)
        return found

    async def whole_epoch(self, sale_id: str) -> str | None:
        """The sale's epoch; None if Redis has lost events of it or a rebuild is restoring it.

        A loss in Redis does not affect a retired sale, which is in SQL.
        """
        head = (await self._sql.sales.heads([sale_id])).get(sale_id)
        if head is None:
            row = await self._sql.sales.get(sale_id)
            return row.epoch if row and row.retired_at_ms is not None else None
        if self.is_reported(sale_id):
            return None
        gap, _ = await self.gap_of(sale_id, head)
        return None if gap else head.epoch
