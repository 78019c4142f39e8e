"""Baskets that wait for holds which ran out: "expire what is due, then ask again", in rounds.

Prepare names holds that ran out where their end may make room, and the server does not know which
item each of them holds. So a basket may wait for the end of holds that are of no use to it. Each
basket waits for a bounded number of rounds, and is answered with its refusal then.
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

#: Told once how a basket was decided; it must not raise, for others wait behind it.
Done = Callable[[Decision | ReservationError], None]


class Expire(Protocol):
    """Expires those of the orders that are due and says how many were (`Store.expire`)."""

    async def __call__(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> int: ...


class Waiting(msgspec.Struct):
    """A basket that is not decided yet."""

    basket: Basket
    #: On the monotonic clock.
    came_at: float
    decide: Done
    #: Whose trace it belongs to, where there are traces.
    trace: Any
    #: Whether it has waited for a round, its own or that of a basket before it: no more turns are
    #: kept for others once it is asked again.
    stood: bool = False
    #: Rounds of its own.
    rounds: int = 0
    #: Whether one of them gave a hold back.
    helped: bool = False


#: A basket, and the holds that prepare named for it; none where others were told the same ones.
Due = tuple[Waiting, Sequence[str]]


class Overdue:
    """Makes the rounds."""

    def __init__(self, expire: Expire) -> None:
        self._expire = expire

    async def give_back(self, sale_id: str, epoch: str, due: Sequence[Due]) -> int | None:
        """Expire once what these wait for; how many holds ended.

        None where what they wait for is damaged: they are answered.
        """
        # The shortest first: a buyer's own are few, and those of the sale fill a round.
        named = chain.from_iterable(sorted((order_ids for _, order_ids in due), key=len))
        try:
            return await self._try_expire(sale_id, list(dict.fromkeys(named)), epoch)
        except Exception:  # loop top: a hold that is damaged keeps only who needs its pieces
            log.exception("expire_before_prepare_broke", sale_id=sale_id)
            refuse([waiting for waiting, _ in due], Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            return None

    def after_round(self, due: Sequence[Due], gave_back: int) -> list[Waiting]:
        """Which of those who waited for a round are asked again. The others are answered."""
        again: list[Waiting] = []
        for waiting, _ in due:
            waiting.stood = True
            waiting.rounds += 1
            waiting.helped = waiting.helped or gave_back > 0
            if waiting.rounds >= ROUNDS_MAX and not waiting.helped:
                # Pieces may be there all the same, so they are not told as gone.
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
    """Tell all of them the same."""
    for waiting in batch:
        waiting.decide(refusal)
