"""Beats of a rebuild, which show other processes that it runs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.rebuilds import RebuildRepository, RebuildRow

__all__ = ["beating"]

log = structlog.get_logger(__name__)

#: Between two beats.
BEAT_SECONDS: Final = 1.0


@asynccontextmanager
async def beating(rebuilds: RebuildRepository, rebuild: RebuildRow) -> AsyncGenerator[None]:
    """Renew the row of a rebuild while the block runs, and abandon it if the block raises."""
    over = asyncio.Event()

    async def beat() -> None:
        while not await _is_set_within(over, BEAT_SECONDS):
            try:
                if not await rebuilds.renew(rebuild.sale_id, rebuild.epoch):
                    return  # Another rebuild has begun: the next write ends this one.
            except (SQLAlchemyError, OSError) as error:
                log.debug("rebuild_beat_failed", reason=reason_of(error))

    async def end() -> None:
        over.set()
        # A beat that is cancelled in its statement costs a connection.
        await asyncio.wait({task}, timeout=BEAT_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    task = asyncio.create_task(beat())
    try:
        yield
    except Exception:
        await end()
        with suppress(SQLAlchemyError, OSError):
            await rebuilds.abandon(rebuild.sale_id, rebuild.epoch)
        raise
    finally:
        await end()


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
