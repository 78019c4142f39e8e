"""Raises the level of the installation, and refuses the start of a version that is too old."""

import asyncio
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.cluster import open_client
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.running_processes import RunningProcess, RunningProcesses
from reservation.adapters.sql.engine import Database, DatabaseUnfit
from reservation.adapters.sql.installation import InstallationRepository
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["OlderProcesses", "older_processes", "raise_level", "refuse_higher_level"]

log = structlog.get_logger(__name__)

#: Time-out of one read of the level; a server that is down does not delay the start further.
ANSWER_SECONDS_MAX: Final = 2.5

#: A process that started just before `bar_older` has sent its first heartbeat by then.
FIRST_BEAT_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 1.0


class OlderProcesses(Exception):
    """The level cannot be raised: processes that do not support it are running."""

    def __init__(self, processes: list[RunningProcess]) -> None:
        super().__init__(
            "the level was not raised: these processes do not support level "
            f"{HIGHEST_LEVEL}: {', '.join(map(str, processes))}"
        )


async def older_processes(running: RunningProcesses) -> list[RunningProcess]:
    """The running processes that do not support the highest level of this version."""
    return [process for process in await running.all() if process.level < HIGHEST_LEVEL]


async def raise_level(
    sql: InstallationRepository,
    running: RunningProcesses,
    *,
    first_beat_seconds: float = FIRST_BEAT_SECONDS,
) -> None:
    """Raise the installation to the highest level of this version.

        0.1.0    starts, reads the number            first heartbeat
        we                     none runs    bar_older              one runs: admit_older, refuse

    Raises:
        OlderProcesses: they run; the level is unchanged.
    """
    loop = asyncio.get_running_loop()
    if found := await older_processes(running):
        raise OlderProcesses(found)
    await sql.bar_older()
    until = loop.time() + first_beat_seconds
    while True:
        if found := await older_processes(running):
            await sql.admit_older()
            raise OlderProcesses(found)
        if loop.time() >= until:
            break
        await asyncio.sleep(_POLL_SECONDS)
    await sql.raise_level(HIGHEST_LEVEL)
    await running.write_level(HIGHEST_LEVEL)


async def refuse_higher_level(settings: Settings, database_url: str) -> None:
    """Refuse to start on an installation whose level this version does not support.

    The level is stored in SQL and in Redis, so that one of them may be down.

    Raises:
        SettingsError: the installation is above this version.
    """
    clock = SystemClock()
    connections = open_client(settings.redis_url, clock=clock)
    running = RunningProcesses(connections.unguarded(), Keys(settings.key_prefix))
    try:
        in_sql = await _in_sql(database_url)
        in_redis = await _in_redis(running, in_sql)
    finally:
        await connections.aclose()
    level = max(in_sql, in_redis)
    if level > HIGHEST_LEVEL:
        raise SettingsError(
            f"the installation is at level {level} and this version supports {HIGHEST_LEVEL}: "
            "start the newer version (docs/how-to/upgrading.md)"
        )


async def _in_sql(database_url: str) -> int:
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            return await Database(database_url).inspect_level()
    except (SQLAlchemyError, OSError, DatabaseUnfit) as error:
        log.info("level_unread", store="sql", reason=type(error).__name__)
        return 0


async def _in_redis(running: RunningProcesses, in_sql: int) -> int:
    """The level in Redis; a missing or lower one is replaced by that of SQL."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            level = await running.level()
            if level < in_sql <= HIGHEST_LEVEL:
                await running.write_level(in_sql)
            return level
    except (StoreUnavailable, StoreUncertain, OSError) as error:
        log.info("level_unread", store="redis", reason=type(error).__name__)
        return 0
