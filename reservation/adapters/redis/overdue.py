"""Baskets that wait for overdue holds: expire those holds and retry, in bounded rounds.

Prepare names overdue holds that may make room for a basket, but the server does not know the items
of each. So a basket may wait for holds that free nothing it needs. Each basket waits for a bounded
number of rounds, then gets its refusal.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final, Protocol

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.prepare_replies import RETRY_AFTER_SECONDS, Decision
from reservation.domain.errors import ReservationError, Unavailable
from reservation.domain.reservation import Basket

__all__ = ["ROUNDS_MAX", "Done", "Due", "Expire", "Overdue", "Waiting", "refuse"]

log = structlog.get_logger(__name__)

#: Rounds for one basket, of up to 200 holds each. The reaper leaves fewer, unless it has stopped.
ROUNDS_MAX: Final = 5

#: Called once with a basket's decision; it must not raise, because others wait behind it.
Done = Callable[[Decision | ReservationError], None]


class Expire(Protocol):
    """Expires due orders and returns their number (`ReservationStore.expire`)."""

    async def __call__(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> int: ...


class Waiting(msgspec.Struct):
    """A basket that is not decided yet."""

    basket: Basket
    #: On the monotonic clock.
    came_at: float
    decide: Done
    #: The context of its trace, where tracing is on.
    trace: Any
    #: Whether it has waited for a round, its own or that of a basket before it: when it is retried,
    #: the baskets behind it no longer wait with it.
    stood: bool = False
    #: Rounds of its own.
    rounds: int = 0
    #: Whether one of them ended a hold.
    helped: bool = False


#: A basket, and the holds that prepare named for it; empty where another basket has the same ones.
Due = tuple[Waiting, Sequence[str]]


class Overdue:
    """Runs the rounds."""

    def __init__(self, expire: Expire) -> None:
        self._expire = expire

    async def give_back(self, sale_id: str, epoch: str, due: Sequence[Due]) -> int | None:
        """Expire once the holds that these baskets wait for; returns the number of ended holds.

        None where a hold is damaged: the baskets got a refusal.
        """
        # The shortest list first: a buyer's own holds are few, and the sale's fill a round.
        named = chain.from_iterable(sorted((order_ids for _, order_ids in due), key=len))
        try:
            return await self._try_expire(sale_id, list(dict.fromkeys(named)), epoch)
        except Exception:  # loop top: a damaged hold affects only baskets that need its units
            log.exception("expire_before_prepare_broke", sale_id=sale_id)
            refuse([waiting for waiting, _ in due], Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            return None

    def after_round(self, due: Sequence[Due], gave_back: int) -> list[Waiting]:
        """The waiting baskets to retry; the others get their refusal."""
        again: list[Waiting] = []
        for waiting, _ in due:
            waiting.stood = True
            waiting.rounds += 1
            waiting.helped = waiting.helped or gave_back > 0
            if waiting.rounds >= ROUNDS_MAX and not waiting.helped:
                # Units may still be available, so the refusal is not "sold out".
                waiting.decide(Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            else:
                again.append(waiting)
        return again

    async def _try_expire(self, sale_id: str, due: Sequence[str], epoch: str) -> int:
        try:
            return await self._expire(sale_id, due, epoch=epoch)
        except (StoreUnavailable, StoreUncertain, ReservationError) as error:
            log.warning("expire_before_prepare_failed", sale_id=sale_id, reason=str(error))
            return 0


def refuse(batch: Sequence[Waiting], refusal: ReservationError) -> None:
    """Give every basket of the batch the same refusal."""
    for waiting in batch:
        waiting.decide(refusal)
