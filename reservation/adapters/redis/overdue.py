"""Baskets that wait for overdue holds: expire those holds and retry, in bounded rounds.

prepare.lua returns the sale's oldest overdue holds, whatever their items: usually one round
expires all of them. If a basket still lacks units after several rounds, its next rounds search for
holds of its own items. It is refused as sold out only if none is left. Damaged holds, which no call
can expire, are skipped.
"""

from collections.abc import Callable, Container, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import Any, Final, Protocol

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.expiry import Ended, OverdueHolds
from reservation.adapters.redis.prepare_script import RETRY_AFTER_SECONDS, Decision
from reservation.domain.errors import ReservationError, Unavailable
from reservation.domain.reservation import Basket

__all__ = ["Done", "Due", "EndsHolds", "Overdue", "Waiting", "refuse"]

log = structlog.get_logger(__name__)

#: Rounds for one basket with the sale's oldest overdue holds, up to 200 each. The reaper leaves
#: fewer, unless it has stopped. The last of these rounds also expires holds of the basket's items.
ROUNDS_MAX: Final = 5
#: All rounds for one basket: its items may have thousands of overdue holds.
ROUNDS_LAST: Final = 50
#: How long a damaged hold is skipped; an operator may repair it meanwhile.
DAMAGED_SECONDS: Final = 10.0
#: Damaged holds in memory, at most.
DAMAGED_MAX: Final = 1_000

#: Called once with a basket's decision; it must not raise, because others wait behind it.
Done = Callable[[Decision | ReservationError], None]


class EndsHolds(Protocol):
    """Expires overdue holds and finds them by their items (`Expiry`)."""

    async def end(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended: ...

    async def overdue(
        self, sale_id: str, skus: AbstractSet[str], *, skip: Container[str]
    ) -> OverdueHolds: ...


class Waiting(msgspec.Struct):
    """A basket that is not decided yet."""

    basket: Basket
    #: On the monotonic clock.
    queued_at: float
    decide: Done
    #: The context of its trace, where tracing is on.
    trace: Any
    #: Whether it has waited for a round, its own or that of an earlier basket. On its retry, later
    #: baskets no longer wait for it.
    has_waited: bool = False
    #: Number of its own rounds.
    rounds: int = 0
    #: Whether no overdue hold has any of its items: the next decision is final.
    final: bool = False


#: A basket and the overdue holds from its reply; empty if an earlier reply has the same ones.
Due = tuple[Waiting, Sequence[str]]


class Overdue:
    """Expires overdue holds for waiting baskets, in rounds."""

    def __init__(self, expiry: EndsHolds, *, monotonic: Callable[[], float]) -> None:
        self._expiry = expiry
        self._monotonic = monotonic
        #: Until when each damaged hold is skipped, by order id, the earliest first.
        self._damaged: dict[str, float] = {}

    async def expire_holds(self, sale_id: str, epoch: str, due: Sequence[Due]) -> bool | None:
        """Run one round: expire the overdue holds that may help these baskets.

        Returns:
            Whether any hold expired; None after a bug, when the baskets already have a refusal.
        """
        self._forget_repaired()
        # The shortest list first: a buyer has few holds, while those of the sale fill a round.
        named = chain.from_iterable(sorted((order_ids for _, order_ids in due), key=len))
        whole = [order_id for order_id in named if order_id not in self._damaged]
        search = [one for one, _ in due if not whole or _needs_search(one)]
        try:
            helpful = await self._search(sale_id, search) if search else []
            order_ids = list(dict.fromkeys([*helpful, *whole]))
            ended = await self._expiry.end(sale_id, order_ids, epoch=epoch)
        except (StoreUnavailable, StoreUncertain, ReservationError) as error:
            log.warning("expire_before_prepare_failed", sale_id=sale_id, reason=str(error))
            return False
        except Exception:  # loop top: these baskets are in no queue, so they are answered here
            log.exception("expire_before_prepare_crashed", sale_id=sale_id)
            refuse([waiting for waiting, _ in due], Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            return None
        self._skip(ended.damaged)
        return ended.freed_stock

    def split_joined(self, joined: Sequence[Due]) -> tuple[list[Due], list[Due]]:
        """Split the baskets that joined during a round: those to retry after it, and the others.

        The others wait for the next round, because their decision is final only after its search.
        """
        retried = [one for one in joined if not _needs_search(one[0])]
        return retried, [one for one in joined if _needs_search(one[0])]

    def after_round(self, due: Sequence[Due], *, freed_stock: bool) -> list[Waiting]:
        """The waiting baskets to retry; the others get their refusal."""
        again: list[Waiting] = []
        for waiting, _ in due:
            waiting.has_waited = True
            waiting.rounds += 1
            stuck = waiting.rounds >= ROUNDS_MAX and not freed_stock
            if not waiting.final and (stuck or waiting.rounds >= ROUNDS_LAST):
                # Units may still be available, so the refusal is not "sold out".
                waiting.decide(Unavailable(retryAfter=RETRY_AFTER_SECONDS))
            else:
                again.append(waiting)
        return again

    async def _search(self, sale_id: str, baskets: Sequence[Waiting]) -> list[str]:
        """Find overdue holds with any item of these baskets; mark the baskets that have none."""
        skus = {line.sku for one in baskets for line in one.basket.wish.lines}
        found = await self._expiry.overdue(sale_id, skus, skip=self._damaged)
        held = {line.sku for hold in found.holds.values() for line in hold.lines}
        for one in baskets:
            own = {line.sku for line in one.basket.wish.lines}
            one.final = found.complete and held.isdisjoint(own)
        return list(found.holds)

    def _skip(self, order_ids: Sequence[str]) -> None:
        until = self._monotonic() + DAMAGED_SECONDS
        for order_id in order_ids:
            self._damaged.pop(order_id, None)
            self._damaged[order_id] = until
        while len(self._damaged) > DAMAGED_MAX:
            del self._damaged[next(iter(self._damaged))]

    def _forget_repaired(self) -> None:
        now = self._monotonic()
        while self._damaged and next(iter(self._damaged.values())) <= now:
            del self._damaged[next(iter(self._damaged))]


def _needs_search(waiting: Waiting) -> bool:
    """Whether a round of this basket must search for overdue holds of its own items."""
    return waiting.rounds >= ROUNDS_MAX - 1


def refuse(batch: Sequence[Waiting], refusal: ReservationError) -> None:
    """Give every basket of the batch the same refusal."""
    for waiting in batch:
        waiting.decide(refusal)
