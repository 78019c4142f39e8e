"""Long polling of reservations: one poll per order serves every request that waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from reservation.domain.clock import Clock
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["POLL_SECONDS", "WAITS_PER_BUYER_MAX", "Waits"]

#: Poll interval of a watched order.
POLL_SECONDS: Final = 0.2
#: Requests of one buyer that wait at the same time: two devices with two tabs each.
WAITS_PER_BUYER_MAX: Final = 4

Read = Callable[[str], Awaitable[Reservation | None]]
IsStill = Callable[[str], bool]


class _Watched:
    """One order and the requests that wait for it, each with its last known state."""

    def __init__(self) -> None:
        self.known: dict[asyncio.Future[Reservation | None], tuple[int, Status]] = {}
        self.task: asyncio.Task[None] | None = None


class Waits:
    """The waiting requests of one process.

    Args:
        read: reads the order from Redis; None if it is gone.
        clock: by which a hold is shown as expired.
        is_still: whether the order cannot change now, and Redis may have an older state of it.
        of_buyer_max: a further wait of a buyer ends the oldest: its client may be gone.
    """

    def __init__(
        self,
        read: Read,
        *,
        clock: Clock,
        is_still: IsStill = lambda _: False,
        of_buyer_max: int = WAITS_PER_BUYER_MAX,
    ) -> None:
        self._read = read
        self._is_still = is_still
        self._clock = clock
        self._of_buyer_max = of_buyer_max
        self._watched: dict[str, _Watched] = {}
        #: In the order of arrival.
        self._of_buyer: dict[str, list[asyncio.Future[Reservation | None]]] = {}
        self._stopped = False

    def stop(self) -> None:
        """On shutdown: end every wait and let none begin."""
        self._stopped = True
        for waits in self._of_buyer.values():
            for wait in waits:
                _end(wait, None)

    async def next_change(self, order: Reservation, seconds: float) -> Reservation:
        """The reservation at its next change, or as it is after that many seconds.

        A hold that passes its deadline counts as changed even before it is reaped.

        Raises:
            StoreUnavailable, StoreUncertain: the order could not be read.
        """
        if self._stopped:
            return order
        wait: asyncio.Future[Reservation | None] = asyncio.get_running_loop().create_future()
        self._begin(order, wait)
        try:
            async with asyncio.timeout(seconds):
                found = await wait
        except TimeoutError:
            return order
        finally:
            self._leave(order, wait)
        return found or order

    def _begin(self, order: Reservation, wait: asyncio.Future[Reservation | None]) -> None:
        waits = self._of_buyer.setdefault(order.buyer_id, [])
        if len(waits) >= self._of_buyer_max:
            _end(waits.pop(0), None)
        waits.append(wait)
        watched = self._watched.setdefault(order.order_id, _Watched())
        watched.known[wait] = (order.seq, order.shown_status(self._clock.now_ms()))
        if watched.task is None:
            watched.task = asyncio.create_task(self._watch(order.order_id, watched))

    def _leave(self, order: Reservation, wait: asyncio.Future[Reservation | None]) -> None:
        waits = self._of_buyer.get(order.buyer_id, [])
        if wait in waits:
            waits.remove(wait)
        if not waits:
            self._of_buyer.pop(order.buyer_id, None)
        watched = self._watched[order.order_id]
        del watched.known[wait]
        if not watched.known:
            del self._watched[order.order_id]
            if watched.task is not None:
                watched.task.cancel()

    async def _watch(self, order_id: str, watched: _Watched) -> None:
        """Poll the order until no request waits for it, which cancels this task."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                found = await self._read(order_id)
            except Exception as error:  # noqa: BLE001 # loop top: each request raises it
                for wait in watched.known:
                    if not wait.done():
                        wait.set_exception(error)
                continue
            # Checked after the read: a sale that closes meanwhile counts as closed before it.
            if self._is_still(order_id):
                continue
            now_ms = self._clock.now_ms()
            for wait, known in watched.known.items():
                if found is None or (found.seq, found.shown_status(now_ms)) != known:
                    _end(wait, found)


def _end(wait: asyncio.Future[Reservation | None], found: Reservation | None) -> None:
    if not wait.done():
        wait.set_result(found)
