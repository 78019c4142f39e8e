"""The settler: takes up payments, deposits and refunds whose process is gone."""

import asyncio
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
#: Refunds taken up in one round.
REFUNDS_MAX: Final = 50


class _PutOff(NamedTuple):
    """An account that is due and was looked at: when to look again, by a monotonic clock."""

    until: float
    pause: float


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
        self._clock = clock
        self._limits = limits
        self._slots = asyncio.Semaphore(AT_ONCE)
        #: By sale: accounts that are due and were looked at.
        self._put_off: dict[str, dict[str, _PutOff]] = {}

    async def run_once(self, sale_id: str) -> int:
        """One round for one sale; how many orders were looked at.

        Raises:
            Exception: what is wrong with the first of those that are damaged, after all the others.
        """
        payments = await self._store.leases_over(sale_id, ROUND_MAX)
        deposits = await self._deposits(sale_id)
        UNDECIDED.labels(sale_id).set(await self._store.undecided(sale_id))
        # One that is damaged must not end what goes on at the PG for the others.
        ends = await asyncio.gather(
            *(self._one(self._settle, order_id) for order_id in payments),
            *(self._one(self._settle.deposit, order_id) for order_id in deposits),
            return_exceptions=True,
        )
        _raise_first([end for end in ends if isinstance(end, BaseException)])
        return len(payments) + len(deposits)

    async def _deposits(self, sale_id: str) -> list[str]:
        """Accounts to look at now; each is put off at once, for longer every time.

        One that was decided is not due any more. One that could not be stays due, and without a
        pause the PG would be asked as fast as it answers.
        """
        known, now = self._put_off.get(sale_id, {}), self._clock.monotonic()
        due = await self._store.deposits_over(sale_id, ROUND_MAX + len(known))
        looked_at: list[str] = []
        self._put_off[sale_id] = put_off = {}
        for order_id in due:
            before = known.get(order_id)
            if before is not None and now < before.until:
                put_off[order_id] = before
            elif len(looked_at) < ROUND_MAX:
                looked_at.append(order_id)
                put_off[order_id] = self._later(before, now)
        return looked_at

    def _later(self, before: _PutOff | None, now: float) -> _PutOff:
        least, most = self._limits.pause_least_seconds, self._limits.pause_most_seconds
        pause = min(most, 2 * before.pause) if before else least
        return _PutOff(now + pause, pause)

    async def refunds(self) -> int:
        """Take up refunds that were begun and not finished; how many are through.

        Raises:
            Exception: what is wrong with the first of those that are damaged, after all the others.
        """
        through, broken = 0, list[Exception]()
        for record in await self._ledger.pending_refunds(REFUNDS_MAX):
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


def _raise_first(errors: Sequence[BaseException]) -> None:
    if errors:
        raise errors[0]
