"""Commits what several callers write at one moment in one transaction, and tells each its outcome.

A buyer waits for these writes. Those that come while one is being committed share the next one, and
so its sync and its turn among the writers of the database.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from sqlalchemy.exc import DBAPIError

from reservation.adapters.sql.errors import is_of_the_row

__all__ = ["BATCH_MAX", "GroupCommit"]

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

#: Writes of one transaction: a sync is shared by so many, and one bad row delays no more.
BATCH_MAX: Final = 64
#: Writes that may wait in one process: at the slowest sync seen, 5 s of them. A sale confirms far
#: fewer at once; beyond this the database is the problem, and the next one is told so at once.
WAITING_MAX: Final = 4096


class GroupCommit(Generic[Item, Outcome]):
    """Gathers writes of one kind.

    Args:
        commit: writes them all in one transaction; an outcome for each, in order. One that is an
            exception is raised to its caller.
    """

    def __init__(
        self, commit: Callable[[Sequence[Item]], Awaitable[Sequence[Outcome | Exception]]]
    ) -> None:
        self._commit = commit
        self._waiting: list[tuple[Item, asyncio.Future[Outcome]]] = []
        self._running: asyncio.Task[None] | None = None

    async def write(self, item: Item) -> Outcome:
        """The outcome, once it is committed and synced.

        Raises:
            SQLAlchemyError, OSError: it is not known to be written; the same call again tells.
        """
        if len(self._waiting) >= WAITING_MAX:
            raise TimeoutError("too many writes wait for SQL")
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, outcome))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await outcome

    async def aclose(self) -> None:
        """Wait for what is being written; nothing new may come."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                await self._write(batch)
        finally:
            self._running = None
            for _, future in self._waiting:
                future.cancel()  # Only where this task was cancelled itself: else none is left.

    async def _write(self, batch: Sequence[tuple[Item, asyncio.Future[Outcome]]]) -> None:
        try:
            outcomes = await self._commit([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - loop top: every caller that waits gets it
            if len(batch) > 1 and isinstance(error, DBAPIError) and is_of_the_row(error):
                # One row that cannot stand must not take the others with it.
                for single in batch:
                    await self._write([single])
                return
            for _, future in batch:
                _tell(future, error)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                _tell(future, outcome)


def _tell(future: asyncio.Future[Outcome], outcome: Outcome | Exception) -> None:
    if future.done():
        return  # The caller was cancelled; the row is there for the settler.
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
