"""Group commit of prepares: what arrives while one call is under way leaves with the next one.

A lone prepare is sent at once; under load the batches grow by themselves up to BASKETS_MAX. Order
is kept: baskets are decided in the order in which they arrived, and a basket that must wait for
expired holds to be given back goes before anything newer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec
import structlog

from reservation.domain.clock import Clock, as_wire
from reservation.domain.errors import (
    AmountMismatch,
    IdempotencyKeyReused,
    InvalidAdmission,
    OutcomeUnknown,
    RateLimited,
    ReservationError,
    SaleClosed,
    SaleNotOpen,
    SalePaused,
    SaleRecovering,
    SkuNotFound,
    Unavailable,
)
from reservation.domain.rate import Rate
from reservation.domain.reservation import Basket, Reservation
from reservation.domain.states import Status
from reservation.redis.connection import Connections, StoreUnavailable, StoreUncertain
from reservation.redis.keys import Keys
from reservation.redis.outcomes import PrepareWord
from reservation.redis.records import as_items, as_mapping, as_reservation
from reservation.redis.scripts import load
from reservation.redis.store import limit_exceeded, sold_out

__all__ = ["Decision", "PrepareQueue", "Replayed"]

log = structlog.get_logger(__name__)

#: Baskets in one call: 128 one-line baskets take about 3 ms of the server's single thread.
BASKETS_MAX: Final = 128
#: Baskets that may wait in one process, about a second's worth; beyond it the answer is "not now".
WAITING_MAX: Final = 10_000
#: Rounds of "expire what is due, then ask again" without a single hold given back.
FRUITLESS_ROUNDS_MAX: Final = 20
#: How long past `not_after` a lost reply is looked into before the outcome counts as unknown.
LOOK_UP_SECONDS: Final = 5.0
LOOK_UP_PAUSE_SECONDS: Final = 0.2
#: What a refused caller is told to wait, in seconds.
RETRY_AFTER_SECONDS: Final = 1


class Expire(Protocol):
    """Expires those of the orders that are due and says how many were (`Store.expire`)."""

    async def __call__(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> int: ...


class Replayed(msgspec.Struct, frozen=True):
    """The order stands already, made from the same body."""


Decision = Reservation | Replayed
#: Told once how a basket was decided; it must not raise, for others wait behind it.
Done = Callable[[Decision | ReservationError], None]


class _Waiting:
    __slots__ = ("basket", "decide", "digest")

    def __init__(self, basket: Basket, decide: Done) -> None:
        self.basket = basket
        self.digest = basket.digest()
        self.decide = decide


class _Lane:
    """The baskets of one sale under one epoch, in order of arrival."""

    __slots__ = ("fruitless", "task", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Waiting] = deque()
        self.task: asyncio.Task[None] | None = None
        self.fruitless = 0


class PrepareQueue:
    """Gathers prepares and sends them in batches, one call at a time for each sale."""

    def __init__(
        self,
        connections: Connections,
        keys: Keys,
        *,
        expire: Expire,
        clock: Clock,
        rate: Rate | None,
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._expire = expire
        self._clock = clock
        self._rate = (rate.interval_ms, rate.count) if rate else (0, 0)
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._look_ups: set[asyncio.Task[None]] = set()
        self._waiting = 0

    async def prepare(self, basket: Basket, *, epoch: str) -> Decision:
        """Decide one basket; see prepare.lua for every refusal.

        Raises:
            Unavailable: not now, and nothing was taken; that is certain.
            OutcomeUnknown: the reply was lost and could not be looked up.
            ReservationError: the basket's own refusal.
        """
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def decide(outcome: Decision | ReservationError) -> None:
            # The caller may have gone; the hold stands then, and its key finds it again.
            if future.done():
                return
            if isinstance(outcome, ReservationError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.submit(basket, epoch=epoch, done=decide)
        return await future

    def submit(self, basket: Basket, *, epoch: str, done: Done) -> None:
        """Decide one basket and tell `done`: neither a task nor a future for each.

        Raises:
            Unavailable: too many wait; `done` is not told anything.
        """
        if self._waiting >= WAITING_MAX:
            raise Unavailable("Too many buyers at once.", retryAfter=RETRY_AFTER_SECONDS)
        lane = self._lanes.get((basket.sale_id, epoch))
        if lane is None:
            lane = self._lanes[basket.sale_id, epoch] = _Lane()
        lane.waiting.append(_Waiting(basket, done))
        self._waiting += 1
        if lane.task is None:
            lane.task = asyncio.create_task(self._drain(basket.sale_id, epoch, lane))

    async def aclose(self) -> None:
        """Wait for what is under way."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task]
        await asyncio.gather(*tasks, *self._look_ups, return_exceptions=True)

    async def _drain(self, sale_id: str, epoch: str, lane: _Lane) -> None:
        try:
            while lane.waiting:
                count = min(len(lane.waiting), BASKETS_MAX)
                batch = [lane.waiting.popleft() for _ in range(count)]
                self._waiting -= count
                await self._decide(sale_id, epoch, lane, batch)
        finally:
            lane.task = None
            # Only a bug gets here with baskets left: answer them rather than let them hang.
            while lane.waiting:
                self._waiting -= 1
                lane.waiting.popleft().decide(OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))

    async def _decide(self, sale_id: str, epoch: str, lane: _Lane, batch: list[_Waiting]) -> None:
        not_after_ms = self._connections.not_after_ms()
        keys, args = self._encode(sale_id, epoch, not_after_ms, batch)
        try:
            replies: list[list[str]] = await self._connections.call(
                load("prepare"), keys, args, guarded=True
            )
        except StoreUnavailable as error:
            log.warning("prepare_unavailable", sale_id=sale_id, reason=str(error))
            _refuse(batch, Unavailable(retryAfter=RETRY_AFTER_SECONDS))
        except StoreUncertain as error:
            log.warning("prepare_uncertain", sale_id=sale_id, reason=str(error), count=len(batch))
            task = asyncio.create_task(self._look_up(sale_id, not_after_ms, batch))
            self._look_ups.add(task)
            task.add_done_callback(self._look_ups.discard)
        except Exception:
            _refuse(batch, OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))
            raise
        else:
            await self._answer(sale_id, epoch, lane, batch, replies)

    def _encode(
        self, sale_id: str, epoch: str, not_after_ms: int, batch: list[_Waiting]
    ) -> tuple[list[str], list[str | int]]:
        names = self._keys.of(sale_id)
        indices: dict[str, int] = {}
        keys: list[str] = []
        args: list[str | int] = []
        for waiting in batch:
            basket = waiting.basket
            lines: list[str] = []
            for line in basket.lines:
                index = indices.setdefault(line.sku, len(indices) + 1)
                lines.append(f"{index} {line.quantity}")
            buyer = basket.buyer_id
            keys += (
                names.order(basket.order_id),
                names.buyer(buyer),
                names.buyer_orders(buyer),
                names.rate(buyer),
            )
            args += (
                basket.order_id,
                buyer,
                basket.order_name,
                waiting.digest,
                basket.amount,
                int(basket.admitted),
                f'"buyer":{_json(buyer)},"name":{_json(basket.order_name)}',
                " ".join(lines),
            )
        stocks = [names.stock(sku) for sku in indices]
        interval_ms, burst = self._rate
        head = (not_after_ms, epoch, self._clock.now_ms(), interval_ms, burst)
        return (
            [names.sale, names.deadlines, names.outbox, *stocks, *keys],
            [*(str(part) for part in head), len(stocks), len(batch), *indices, *args],
        )

    async def _answer(
        self,
        sale_id: str,
        epoch: str,
        lane: _Lane,
        batch: list[_Waiting],
        replies: list[list[str]],
    ) -> None:
        behind: list[_Waiting] = []
        due: Sequence[str] = ()
        for waiting, (word, *facts) in zip(batch, replies, strict=True):
            if word == PrepareWord.DUE:
                due = facts
                behind.append(waiting)
            elif word == PrepareWord.AGAIN:
                behind.append(waiting)
            else:
                waiting.decide(_decision(waiting.basket, PrepareWord(word), facts))
        if not behind:
            return
        lane.fruitless = 0 if await self._try_expire(sale_id, due, epoch) else lane.fruitless + 1
        if lane.fruitless > FRUITLESS_ROUNDS_MAX:
            lane.fruitless = 0
            _refuse(behind, Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            return
        lane.waiting.extendleft(reversed(behind))
        self._waiting += len(behind)

    async def _try_expire(self, sale_id: str, due: Sequence[str], epoch: str) -> int:
        try:
            return await self._expire(sale_id, due, epoch=epoch)
        except (StoreUnavailable, StoreUncertain, ReservationError) as error:
            log.warning("expire_before_prepare_failed", sale_id=sale_id, reason=str(error))
            return 0

    async def _look_up(self, sale_id: str, not_after_ms: int, batch: list[_Waiting]) -> None:
        """Find out what a call did whose reply was lost.

        Once the server's clock is past `not_after` the script can do nothing any more, so an
        order that is not there then was not taken, for certain.
        """
        names = self._keys.of(sale_id)
        commands: list[tuple[str, ...]] = [("TIME",)]
        commands += [("HGETALL", names.order(waiting.basket.order_id)) for waiting in batch]
        give_up_at = self._clock.monotonic() + LOOK_UP_SECONDS
        while self._clock.monotonic() < give_up_at:
            await asyncio.sleep(LOOK_UP_PAUSE_SECONDS)
            try:
                time, *found = await self._connections.pipeline(commands)
            except (StoreUnavailable, StoreUncertain):
                continue
            if any(isinstance(reply, Exception) for reply in (time, *found)):
                continue
            if int(time[0]) * 1000 + int(time[1]) // 1000 > not_after_ms:
                for waiting, flat in zip(batch, found, strict=True):
                    waiting.decide(_looked_up(sale_id, waiting, flat))
                return
        _refuse(batch, OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS))


def _refuse(batch: list[_Waiting], refusal: ReservationError) -> None:
    for waiting in batch:
        waiting.decide(refusal)


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _looked_up(sale_id: str, waiting: _Waiting, flat: Any) -> Decision | ReservationError:
    fields = as_mapping(flat)
    if not fields:
        return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
    if fields["digest"] != waiting.digest:
        return IdempotencyKeyReused()
    return as_reservation(sale_id, waiting.basket.order_id, fields)


def _decision(
    basket: Basket, word: PrepareWord, facts: Sequence[str]
) -> Decision | ReservationError:
    match word:
        case PrepareWord.HELD | PrepareWord.PREPARED:
            return _reservation(basket, word, facts)
        case PrepareWord.REPLAYED:
            return Replayed()
        case _:
            return _refusal(word, facts)


def _reservation(basket: Basket, word: PrepareWord, facts: Sequence[str]) -> Reservation:
    expires_at, seq, created_at, items = facts
    return Reservation(
        order_id=basket.order_id,
        sale_id=basket.sale_id,
        buyer_id=basket.buyer_id,
        status=Status.HELD if word is PrepareWord.HELD else Status.PREPARED,
        lines=as_items(items),
        amount=basket.amount,
        currency=basket.currency,
        order_name=basket.order_name,
        created_at_ms=int(created_at),
        updated_at_ms=int(created_at),
        expires_at_ms=int(expires_at),
        seq=int(seq),
    )


def _refusal(word: PrepareWord, facts: Sequence[str]) -> ReservationError:
    match word:
        case PrepareWord.SOLD_OUT:
            return sold_out(facts)
        case PrepareWord.LIMIT_EXCEEDED:
            return limit_exceeded(facts)
        case PrepareWord.AMOUNT_MISMATCH:
            return AmountMismatch(expectedAmount=int(facts[0]))
        case PrepareWord.SKU_NOT_FOUND:
            return SkuNotFound(sku=facts[0])
        case PrepareWord.KEY_REUSED:
            return IdempotencyKeyReused()
        case PrepareWord.NOT_ADMITTED:
            return InvalidAdmission()
        case PrepareWord.RATE_LIMITED:
            return RateLimited(retryAfter=max(1, -(-int(facts[0]) // 1000)))
        case PrepareWord.CLOSED:
            return SaleClosed()
        case PrepareWord.NOT_OPEN:
            return SaleNotOpen(opensAt=as_wire(int(facts[0])))
        case PrepareWord.PAUSED:
            return SalePaused(retryAfter=RETRY_AFTER_SECONDS)
        case PrepareWord.RECOVERING:
            return SaleRecovering(retryAfter=RETRY_AFTER_SECONDS)
        case PrepareWord.TOO_LATE:
            return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        case _:
            raise AssertionError(word)
