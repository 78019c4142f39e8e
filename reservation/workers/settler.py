"""The settler: takes up payments, deposits and refunds whose process is gone."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.domain.clock import Clock
from reservation.domain.errors import ReservationError
from reservation.limits import DEFAULT_LIMITS, PaymentLimits
from reservation.metrics import UNDECIDED
from reservation.persistence.ledger import Ledger
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.store import Store
from reservation.refund import Refund
from reservation.settle import Settle

__all__ = ["Settler"]

log = structlog.get_logger(__name__)

#: Orders looked at in one round, and at once: the gateway's client has 64 connections for this.
ROUND_MAX: Final = 200
AT_ONCE: Final = 32
#: A payment whose lease is over and that could not be looked at waits no longer than this: its
#: buyer waits as well.
PAYMENT_PAUSE_MAX: Final = 5.0
#: Refunds taken up in one round.
REFUNDS_MAX: Final = 50


class _PutOff(NamedTuple):
    """What is due and was looked at: when to look again, by a monotonic clock."""

    until: float
    pause: float


class _Pauses:
    """Puts off what was looked at and stays due, for longer every time.

    Without a pause the PG, Redis and SQL would be asked as fast as they answer.
    """

    def __init__(self, clock: Clock, least: float, most: float) -> None:
        self._clock = clock
        self._least = least
        self._most = most
        self._put_off: dict[str, _PutOff] = {}

    def __len__(self) -> int:
        return len(self._put_off)

    def take(self, due: Sequence[str], most: int) -> list[str]:
        """Those to look at now, put off at once; what is not due any more is forgotten."""
        known, now = self._put_off, self._clock.monotonic()
        taken: list[str] = []
        self._put_off = put_off = {}
        for name in due:
            before = known.get(name)
            if before is not None and now < before.until:
                put_off[name] = before
            elif len(taken) < most:
                taken.append(name)
                put_off[name] = self._later(before, now)
        return taken

    def _later(self, before: _PutOff | None, now: float) -> _PutOff:
        pause = min(self._most, 2 * before.pause) if before else self._least
        return _PutOff(now + pause, pause)


class Settler:
    """Settles what is due to be settled."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        settle: Settle,
        refund: Refund,
        *,
        clock: Clock,
        limits: PaymentLimits = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._settle = settle
        self._refund = refund
        self._slots = asyncio.Semaphore(AT_ONCE)
        least, most = limits.pause_least_seconds, limits.pause_most_seconds
        self._payments = defaultdict[str, _Pauses](lambda: _Pauses(clock, least, PAYMENT_PAUSE_MAX))
        self._accounts = defaultdict[str, _Pauses](lambda: _Pauses(clock, least, most))
        self._refunds = _Pauses(clock, least, most)

    async def run_once(self, sale_id: str) -> int:
        """One round for one sale; how many orders were looked at.

        Raises:
            Exception: what is wrong with the first of those that are damaged, after all the others.
        """
        payments = await _due(self._store.leases_over, sale_id, self._payments[sale_id])
        deposits = await _due(self._store.deposits_over, sale_id, self._accounts[sale_id])
        UNDECIDED.labels(sale_id).set(await self._store.undecided(sale_id))
        # One that is damaged must not end what goes on at the PG for the others.
        ends = await asyncio.gather(
            *(self._one(self._settle, order_id) for order_id in payments),
            *(self._one(self._settle.deposit, order_id) for order_id in deposits),
            return_exceptions=True,
        )
        _raise_first([end for end in ends if isinstance(end, BaseException)])
        return len(payments) + len(deposits)

    async def refunds(self) -> int:
        """Take up refunds that were begun and not finished; how many are through.

        Raises:
            Exception: what is wrong with the first of those that are damaged, after all the others.
        """
        found = await self._ledger.pending_refunds(REFUNDS_MAX + len(self._refunds))
        records = {record.order_id: record for record in found}
        through, broken = 0, list[Exception]()
        for order_id in self._refunds.take(list(records), REFUNDS_MAX):
            record = records[order_id]
            try:
                through += await self._refund.go_on(record)
            except (ReservationError, StoreUnavailable, StoreUncertain) as error:
                log.warning("refund_waits", order_id=record.order_id, reason=str(error))
            except (SQLAlchemyError, OSError):
                # The next one would meet the same.
                raise
            except Exception as error:  # loop top: the others' money must not wait for this one
                log.exception("refund_broke", order_id=record.order_id)
                broken.append(error)
        _raise_first(broken)
        return through

    async def _one(self, settle: Callable[[str], Awaitable[object]], order_id: str) -> None:
        """One order; what keeps it from being settled now is waited out."""
        async with self._slots:
            try:
                await settle(order_id)
            except (
                ReservationError,
                StoreUnavailable,
                StoreUncertain,
                SQLAlchemyError,
                OSError,
            ) as error:
                log.warning("settle_waits", order_id=order_id, reason=str(error))
            except Exception:
                log.exception("settle_broke", order_id=order_id)
                raise


async def _due(
    over: Callable[[str, int], Awaitable[list[str]]], sale_id: str, pauses: _Pauses
) -> list[str]:
    """Orders to look at now: one that was decided, or whose lease was moved, is not due any more.

    One that could not be stays due: its sale waits for a rebuild, or it is damaged.
    """
    return pauses.take(await over(sale_id, ROUND_MAX + len(pauses)), ROUND_MAX)


def _raise_first(errors: Sequence[BaseException]) -> None:
    if errors:
        raise errors[0]
