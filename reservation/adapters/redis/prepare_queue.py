"""Group commit of prepares: baskets that arrive during one call leave in the next one.

A lone prepare is sent at once; under load the batches grow up to BASKETS_MAX. The queue is FIFO:
baskets are decided in order of arrival, and a basket that waits for overdue holds to expire keeps
its place for one round. If one round is not enough, it leaves the queue for further rounds, and
the others proceed:

    call:   A is due, B behind it waits          round: up to 200 holds end
    call:   A is due again, B is decided         then:  rounds for A, which goes behind all others
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from contextvars import Context
from copy import copy
from functools import partial
from typing import Any, Final

import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotAcknowledged, StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.overdue import Done, Due, EndsHolds, Overdue, Waiting, refuse
from reservation.adapters.redis.prepare_script import (
    RETRY_AFTER_SECONDS,
    BatchReply,
    Decision,
    HoldCreated,
    Replayed,
    Reply,
    SharedFields,
    encode,
    outcome_of_lost_reply,
)
from reservation.adapters.redis.script_results import PrepareWord
from reservation.adapters.redis.scripts import load
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import OutcomeUnknown, ReservationError, Unavailable
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket, Reservation
from reservation.telemetry import tracing
from reservation.telemetry.metrics import alarm

__all__ = [
    "Decision",
    "HoldCreated",
    "PrepareQueue",
    "Replayed",
    "SharedFields",
    "overload_refusal",
]

log = structlog.get_logger(__name__)

#: Baskets in one call: 128 one-line baskets take about 3 ms of the server's single thread.
BASKETS_MAX: Final = 128
#: Baskets that may wait in one process; beyond it, load shedding (`Unavailable`).
WAITING_MAX: Final = 10_000
#: Waiting time of the queue's head above which new prepares are shed: a buyer who is refused at
#: once retries, but one who waits for seconds reloads and sends twice.
WAITING_SECONDS_MAX: Final = 0.5
#: Full batches that may always wait: the batch time is an estimate from recent batches, and one
#: slow batch must not shed a short queue.
BATCHES_WAITING_MIN: Final = 2
#: Weight of the last batch in the moving average of a full batch's time.
LAST_BATCH_SHARE: Final = 0.05
#: Responses written before the event loop polls its sockets again: about a millisecond.
ANSWERS_AT_ONCE: Final = 32
#: The next call leaves before the last call's responses are written if that call took less than
#: this many times the writing: Redis then works in parallel. If the call took longer, the disk is
#: slow and a fuller batch gains more. Writing a response is a sixth of a hold's cost here; the rest
#: is its socket and the next request. So the bound is twice the whole.
CALL_TO_ANSWERS_MAX: Final = 12.0
#: How long past `not_after` the orders of a lost reply are read before the outcome is unknown.
LOOK_UP_SECONDS: Final = 5.0
LOOK_UP_PAUSE_SECONDS: Final = 0.2


#: Words of a basket that is retried.
_RETRIED: Final = (PrepareWord.DUE, PrepareWord.AGAIN)


class SaleQueue:
    """The baskets of one sale under one epoch, in order of arrival."""

    __slots__ = (
        "batch_seconds",
        "call_seconds",
        "due",
        "has_tombstones",
        "in_turn",
        "rounds",
        "task",
        "waiting",
    )

    def __init__(self) -> None:
        self.waiting: deque[Waiting] = deque()
        self.task: asyncio.Task[None] | None = None
        #: Whether the baskets behind one with overdue holds wait for a round with it.
        self.in_turn = True
        #: Whether the sale has tombstones, as far as a reply has shown: then each call declares
        #: the buckets of its baskets.
        self.has_tombstones = False
        #: Baskets outside the queue that wait for the next round, and the task that runs the
        #: rounds.
        self.due: list[Due] = []
        self.rounds: asyncio.Task[None] | None = None
        #: Duration of the last call.
        self.call_seconds = 0.0
        #: Moving average of a full batch's time, from one call to the next.
        self.batch_seconds = 0.0

    def learn(self, batch_seconds: float) -> None:
        """Update the moving average with the time of a full batch."""
        if not self.batch_seconds:
            self.batch_seconds = batch_seconds
        self.batch_seconds += LAST_BATCH_SHARE * (batch_seconds - self.batch_seconds)

    def is_too_long(self, now: float) -> bool:
        """Whether a new prepare would wait too long: the head has, or the queue is long."""
        if now - self.waiting[0].queued_at > WAITING_SECONDS_MAX:
            return True
        batches = len(self.waiting) / BASKETS_MAX
        return batches >= BATCHES_WAITING_MIN and batches * self.batch_seconds > WAITING_SECONDS_MAX


class PrepareQueue:
    """Gathers prepares and sends them in batches, one call at a time for each sale."""

    def __init__(
        self,
        connections: RedisClient,
        keys: Keys,
        *,
        expiry: EndsHolds,
        clock: Clock,
        limits: BuyerLimits,
    ) -> None:
        self._connections = connections
        self._marks = connections.marks
        self._keys = keys
        self._overdue = Overdue(expiry, monotonic=clock.monotonic)
        self._clock = clock
        self._monotonic = clock.monotonic
        self._limits = limits.args()
        self._queues: dict[tuple[str, str], SaleQueue] = {}
        #: Tasks outside the queues: look-ups after lost replies, delivery of responses.
        self._background: set[asyncio.Task[None]] = set()
        self._waiting = 0
        #: Time to write one response, as measured last.
        self._answer_seconds = 0.0

    async def prepare(self, basket: Basket, *, epoch: str) -> Reservation | Replayed:
        """Decide one basket; see prepare.lua for every refusal.

        Raises:
            Unavailable: load shedding or an outage; nothing was taken, for certain.
            OutcomeUnknown: the reply was lost and the look-up failed.
            ReservationError: the basket's own refusal.
        """
        if self.is_full(basket.sale_id, epoch):
            raise overload_refusal()
        future: asyncio.Future[Reservation | Replayed]
        future = asyncio.get_running_loop().create_future()

        def decide(outcome: Decision | ReservationError) -> None:
            # The caller may be gone; the hold stays, and its idempotency key finds it.
            if future.done():
                return
            if isinstance(outcome, ReservationError):
                # The refusal is shared by several callers, so each raises a copy.
                future.set_exception(copy(outcome))
            else:
                future.set_result(
                    outcome.reservation() if isinstance(outcome, HoldCreated) else outcome
                )

        self.submit(basket, epoch=epoch, done=decide)
        return await future

    def submit(self, basket: Basket, *, epoch: str, done: Done) -> None:
        """Decide one basket and call `done`: without a task or a future per basket.

        The caller must have checked `is_full` in this turn of the loop.
        """
        now = self._monotonic()
        queue = self._queues.get((basket.sale_id, epoch))
        if queue is None:
            queue = self._queues[basket.sale_id, epoch] = SaleQueue()
        trace = None if tracing.tracer is None else tracing.tracer.here()
        queue.waiting.append(Waiting(basket, now, done, trace))
        self._waiting += 1
        if queue.task is None:
            queue.task = _detached_task(self._drain(basket.sale_id, epoch, queue))

    def is_full(self, sale_id: str, epoch: str) -> bool:
        """Whether new prepares of this sale are shed: too many wait, or they wait too long."""
        if self._waiting >= WAITING_MAX:
            return True
        queue = self._queues.get((sale_id, epoch))
        return queue is not None and bool(queue.waiting) and queue.is_too_long(self._monotonic())

    async def aclose(self) -> None:
        """Wait for all calls and tasks in flight."""
        while tasks := [
            *(
                task
                for queue in self._queues.values()
                for task in (queue.task, queue.rounds)
                if task
            ),
            *self._background,
        ]:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, sale_id: str, epoch: str, queue: SaleQueue) -> None:
        try:
            while queue.waiting:
                count = min(len(queue.waiting), BASKETS_MAX)
                batch = [queue.waiting.popleft() for _ in range(count)]
                self._waiting -= count
                began = self._monotonic()
                await self._decide(sale_id, epoch, queue, batch)
                if count == BASKETS_MAX:
                    queue.learn(self._monotonic() - began)
        finally:
            queue.task = None
            # Only a bug leaves baskets here: answer them rather than let them hang.
            while queue.waiting:
                self._waiting -= 1
                queue.waiting.popleft().decide(OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))

    async def _decide(
        self, sale_id: str, epoch: str, queue: SaleQueue, batch: list[Waiting]
    ) -> None:
        not_after_ms = self._connections.not_after_ms(sale_id)
        baskets = [waiting.basket for waiting in batch]
        wishes = list(dict.fromkeys([basket.wish for basket in baskets]))
        mark = self._marks.of(sale_id, epoch)
        head = (not_after_ms, epoch, *mark, self._clock.now_ms(), *self._limits)
        queue.in_turn = queue.rounds is None and not any(waiting.has_waited for waiting in batch)
        waited = [place for place, one in enumerate(batch, 1) if one.final]
        keys, args = encode(
            self._keys.of(sale_id),
            head,
            baskets,
            wishes,
            in_turn=queue.in_turn,
            waited=waited,
            buckets=queue.has_tombstones,
        )
        sent_at = self._monotonic()
        try:
            answer, acknowledged = await self._call(sale_id, batch, keys, args)
            (word, *facts), *replies = answer
            queue.call_seconds = self._monotonic() - sent_at
            if word == PrepareWord.TOMBSTONES and not queue.has_tombstones:
                queue.has_tombstones = True
                self._waiting += len(batch)
                queue.waiting.extendleft(reversed(batch))
                return
            # An unreadable reply is a bug; its callers still get an answer (below).
            common = BatchReply(sale_id, PrepareWord(word), facts, wishes)
            if acknowledged:
                self._marks.learn_head(sale_id, epoch, common.mark)
            decided = list(zip(batch, replies, strict=common.refusal is None))
        except StoreUnavailable as error:
            log.warning("prepare_unavailable", sale_id=sale_id, reason=str(error))
            refuse(batch, Unavailable(retryAfter=RETRY_AFTER_SECONDS))
        except StoreUncertain as error:
            log.warning("prepare_uncertain", sale_id=sale_id, reason=str(error), count=len(batch))
            self._run_in_background(self._look_up(sale_id, not_after_ms, batch))
        except Exception:
            refuse(batch, OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))
            raise
        else:
            if common.refusal is None:
                if not acknowledged:
                    log.warning("prepare_unacknowledged", sale_id=sale_id, count=len(batch))
                    common.is_acknowledged = False
                await self._answer(sale_id, epoch, queue, common, decided)
                return
            if word == PrepareWord.WENT_BACK:
                self._marks.report_regression(sale_id, epoch)
            if word == PrepareWord.TOO_LATE:
                # Buyers only get `Unavailable`, so the reason is logged.
                log.warning("prepare_too_late", sale_id=sale_id, seconds=queue.call_seconds)
            refuse(batch, common.refusal)

    async def _call(
        self, sale_id: str, batch: list[Waiting], keys: list[str], args: list[str | int]
    ) -> tuple[Any, bool]:
        """The script's reply, and whether enough replicas acknowledged its changes."""
        self._connections.require_acks(sale_id)
        # A refusal writes nothing and reports the changes of other calls.
        touched = self._keys.of(sale_id).sale
        call = partial(
            self._connections.call, load("prepare"), keys, args, acked=True, touched=touched
        )
        try:
            if tracing.tracer is None:
                return await call(), True
            # The queue outlives its requests, so the baskets carry the trace contexts.
            callers = [waiting.trace for waiting in batch]
            with tracing.tracer.batch("prepare batch", callers, baskets=len(batch)):
                return await call(), True
        except NotAcknowledged as short:
            return short.reply, False

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _answer(
        self,
        sale_id: str,
        epoch: str,
        queue: SaleQueue,
        common: BatchReply,
        replies: list[tuple[Waiting, Reply]],
    ) -> None:
        retried, decided = _partitioned(replies)
        count = len(decided)
        quick = queue.call_seconds < CALL_TO_ANSWERS_MAX * self._answer_seconds * count
        more = queue.waiting or count > ANSWERS_AT_ONCE
        # A call that takes no hold returns before its responses could be written.
        held = any(isinstance(reply, int) and reply > 0 for _, reply in decided)
        if quick and more and held and not retried:
            self._run_in_background(self._deliver(common, decided, pause_after=ANSWERS_AT_ONCE))
        else:
            await self._deliver(common, decided, pause_after=len(replies))
        if retried:
            await self._wait(sale_id, epoch, queue, retried)

    async def _wait(
        self, sale_id: str, epoch: str, queue: SaleQueue, retried: list[tuple[Waiting, list[str]]]
    ) -> None:
        """Expire overdue holds, here for one round or else in a task outside the queue."""
        due = [(waiting, reply[1:]) for waiting, reply in retried if reply[0] == PrepareWord.DUE]
        behind = [waiting for waiting, reply in retried if reply[0] == PrepareWord.AGAIN]
        self._waiting += len(retried)
        if queue.in_turn:
            freed_stock = await self._overdue.expire_holds(sale_id, epoch, due)
            again = (
                []
                if freed_stock is None
                else self._overdue.after_round(due, freed_stock=freed_stock)
            )
            self._waiting -= len(due) - len(again)
            for waiting in behind:
                waiting.has_waited = True
            queue.waiting.extendleft(reversed([*again, *behind]))
            return
        queue.due += due
        if queue.rounds is None:
            queue.rounds = _detached_task(self._make_rounds(sale_id, epoch, queue))

    async def _make_rounds(self, sale_id: str, epoch: str, queue: SaleQueue) -> None:
        try:
            while queue.due:
                due, queue.due = queue.due, []
                freed_stock = await self._overdue.expire_holds(sale_id, epoch, due)
                if freed_stock is None:
                    self._waiting -= len(due)
                    continue
                # Baskets that joined during the round waited for holds that have ended by now.
                joined, queue.due = self._overdue.split_joined(queue.due)
                due = [*due, *joined]
                again = self._overdue.after_round(due, freed_stock=freed_stock)
                self._waiting -= len(due) - len(again)
                for waiting in again:
                    # Its own wait must not count as the queue's.
                    waiting.queued_at = self._monotonic()
                queue.waiting += again
                if queue.waiting and queue.task is None:
                    queue.task = _detached_task(self._drain(sale_id, epoch, queue))
        finally:
            queue.rounds = None
            # Only a bug leaves baskets here.
            left, queue.due = queue.due, []
            self._waiting -= len(left)
            refuse([one for one, _ in left], OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))

    async def _deliver(
        self,
        common: BatchReply,
        decided: Sequence[tuple[Waiting, Reply]],
        *,
        pause_after: int,
    ) -> None:
        """Answer each caller in order of arrival, and let the loop poll its sockets in between."""
        for start in range(0, len(decided), pause_after):
            if start:
                await asyncio.sleep(0)
            some = decided[start : start + pause_after]
            began = self._monotonic()
            for waiting, reply in some:
                try:
                    outcome = common.decision_of(waiting.basket, reply)
                except Exception as error:  # loop top: others wait behind an invalid reply
                    # Only a retry under its key can find the outcome.
                    log.exception("prepare_reply_unreadable", reply=reply)
                    alarm(Alarm.BROKEN_INVARIANT, reason=str(error))
                    outcome = OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS)
                waiting.decide(outcome)
            self._answer_seconds = (self._monotonic() - began) / len(some)

    async def _look_up(self, sale_id: str, not_after_ms: int, batch: list[Waiting]) -> None:
        """Look up the outcome of a call whose reply was lost.

        Once the server's clock is past `not_after`, the script can no longer write, so an order
        that is missing then was not taken, for certain.
        """
        names = self._keys.of(sale_id)
        commands: list[tuple[str, ...]] = [("TIME",)]
        commands += [("HGETALL", names.order(waiting.basket.order_id)) for waiting in batch]
        give_up_at = self._monotonic() + LOOK_UP_SECONDS
        while self._monotonic() < give_up_at:
            await asyncio.sleep(LOOK_UP_PAUSE_SECONDS)
            try:
                time, *found = await self._connections.pipeline(commands)
            except (StoreUnavailable, StoreUncertain):
                continue
            if any(isinstance(reply, Exception) for reply in (time, *found)):
                continue
            if int(time[0]) * 1000 + int(time[1]) // 1000 > not_after_ms:
                for waiting, flat in zip(batch, found, strict=True):
                    waiting.decide(outcome_of_lost_reply(waiting.basket.wish.digest, flat))
                return
        refuse(batch, OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))


def _partitioned(
    replies: list[tuple[Waiting, Reply]],
) -> tuple[list[tuple[Waiting, list[str]]], list[tuple[Waiting, Reply]]]:
    """The baskets to retry, and the decided ones."""
    retried: list[tuple[Waiting, list[str]]] = []
    decided: list[tuple[Waiting, Reply]] = []
    for waiting, reply in replies:
        if isinstance(reply, list) and reply[0] in _RETRIED:
            retried.append((waiting, reply))
        else:
            decided.append((waiting, reply))
    return retried, decided


def _detached_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that outlives this request, so it gets its own trace context."""
    context = None if tracing.tracer is None else Context()
    return asyncio.create_task(work, context=context)


def overload_refusal() -> Unavailable:
    """The refusal of a new prepare while the queue is full."""
    return Unavailable(
        "Too many concurrent prepares; no stock was held.", retryAfter=RETRY_AFTER_SECONDS
    )
