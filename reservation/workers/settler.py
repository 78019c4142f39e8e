"""The settler: takes up payments and deposits whose process is gone."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.domain.clock import Clock
from reservation.domain.errors import ReservationError
from reservation.limits import DEFAULT_LIMITS, PaymentLimits
from reservation.metrics import UNDECIDED
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.store import Store
from reservation.settle import Settle
from reservation.workers.pauses import Pauses

__all__ = ["Settler"]

log = structlog.get_logger(__name__)

#: Orders looked at in one round, and at once: the gateway's client has 64 connections for this.
ROUND_MAX: Final = 200
AT_ONCE: Final = 32
#: A payment whose lease is over and that could not be looked at waits no longer than this: its
#: buyer waits as well.
PAYMENT_PAUSE_MAX: Final = 5.0


class Settler:
    """Settles what is due to be settled."""

    def __init__(
        self,
        store: Store,
        settle: Settle,
        *,
        clock: Clock,
        limits: PaymentLimits = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._settle = settle
        self._slots = asyncio.Semaphore(AT_ONCE)
        least, most = limits.pause_least_seconds, limits.pause_most_seconds
        self._payments = defaultdict[str, Pauses](lambda: Pauses(clock, least, PAYMENT_PAUSE_MAX))
        self._accounts = defaultdict[str, Pauses](lambda: Pauses(clock, least, most))

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
    over: Callable[[str, int], Awaitable[list[str]]], sale_id: str, pauses: Pauses
) -> list[str]:
    """Orders to look at now: one that was decided, or whose lease was moved, is not due any more.

    One that could not be stays due: its sale waits for a rebuild, or it is damaged.
    """
    return pauses.take(await over(sale_id, ROUND_MAX + len(pauses)), ROUND_MAX)


def _raise_first(errors: Sequence[BaseException]) -> None:
    if errors:
        raise errors[0]
