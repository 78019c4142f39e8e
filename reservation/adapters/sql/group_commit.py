"""Group commit: concurrent statements share one transaction, and each caller gets its own outcome.

These statements are on the path of a buyer's request. Statements that arrive during a transaction
share the next one: writes share one sync and one write lock, reads share one query. A batch begins
after its last item was submitted, so a read sees every change that was committed before its call.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate
from typing import Final, Generic, TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from reservation.adapters.sql.errors import is_row_error

__all__ = ["BATCH_MAX", "GroupCommit"]

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

#: Items per transaction: they share one sync, and one invalid row delays at most this many.
BATCH_MAX: Final = 64
#: Items that may wait in one process: 5 s at the slowest sync measured. A sale confirms far fewer
#: at once; beyond this the database is overloaded, and new items fail at once.
WAITING_MAX: Final = 4096


class GroupCommit(Generic[Item, Outcome]):
    """Combines concurrent statements of one kind into batches.

    Args:
        commit: runs a batch in one transaction and returns an outcome for each item, in order. An
            outcome that is an exception is raised to its caller.
        weigh: the weight of an item; 1 by default.
        weight_max: the maximum weight of a transaction of several items.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Item]], Awaitable[Sequence[Outcome | Exception]]],
        *,
        weigh: Callable[[Item], int] = lambda _: 1,
        weight_max: int = BATCH_MAX,
    ) -> None:
        self._commit = commit
        self._weigh = weigh
        self._weight_max = weight_max
        self._waiting: list[tuple[Item, asyncio.Future[Outcome]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Outcome:
        """Run an item in the next batch; returns its outcome after the commit.

        Raises:
            SQLAlchemyError, OSError: the outcome is unknown; retry the same call.
        """
        if len(self._waiting) >= WAITING_MAX:
            raise TimeoutError("too many statements are waiting for SQL")
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, outcome))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await outcome

    async def aclose(self) -> None:
        """Wait for batches in progress; no new items may arrive."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._waiting:
                count = self._next_count()
                batch, self._waiting = self._waiting[:count], self._waiting[count:]
                await self._run_batch(batch)
        finally:
            self._running = None
            for _, future in self._waiting:
                future.cancel()  # Items are left only if this task was cancelled.

    def _next_count(self) -> int:
        weights = accumulate(self._weigh(item) for item, _ in self._waiting[:BATCH_MAX])
        return max(1, sum(weight <= self._weight_max for weight in weights))

    async def _run_batch(self, batch: Sequence[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        try:
            outcomes = await self._outcomes([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            _resolve(future, outcome)

    async def _outcomes(self, items: Sequence[Item]) -> Sequence[Outcome | Exception]:
        try:
            return await self._commit(items)
        except Exception as error:  # noqa: BLE001 - loop top: each waiting caller gets the error
            if len(items) == 1 or not _may_be_of_one_item(error):
                return [error] * len(items)
        # One invalid item must not fail the others.
        outcomes: list[Outcome | Exception] = []
        for item in items:
            outcomes += await self._outcomes([item])
        return outcomes


def _may_be_of_one_item(error: Exception) -> bool:
    """Whether one item may have caused the error, rather than the database or the connection."""
    if isinstance(error, DBAPIError):
        return is_row_error(error)
    # A StatementError without a driver error: a parameter value that cannot be encoded.
    return isinstance(error, StatementError) or not isinstance(error, SQLAlchemyError | OSError)


def _resolve(future: asyncio.Future[Outcome], outcome: Outcome | Exception) -> None:
    if future.done():
        return  # The caller was cancelled; the settler finds the row.
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
