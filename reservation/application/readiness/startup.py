"""Refuses to start with a Redis or a database that must not be used."""

import asyncio
from typing import Final

import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.sql import postgresql
from reservation.adapters.sql.unfit import LedgerUnfit
from reservation.application.readiness.check import Preflight
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock

__all__ = ["is_answered", "refuse_unfit_sql"]

log = structlog.get_logger(__name__)

#: How long one look may take: then the server is as good as away, and looked at again.
ANSWER_SECONDS_MAX: Final = 2.5


async def is_answered(settings: Settings) -> bool:
    """Whether the server could be looked at; in development nobody looks here.

    Raises:
        SettingsError: it must not be started with this server, a line for each reason; or what is
            trusted is no row.
    """
    clock = SystemClock()
    connections = RedisClient(settings.redis_url, clock=clock)
    try:
        readiness = Preflight(connections, Keys(settings.key_prefix), settings, clock=clock)
        if not settings.production:
            return True
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            found = await readiness.check()
    except (StoreUnavailable, StoreUncertain, TimeoutError) as error:
        log.warning("redis_does_not_answer_yet", reason=str(error) or type(error).__name__)
        return False
    finally:
        await connections.aclose()
    if found.stops:
        raise SettingsError("\n".join(found.stops))
    return "redis-loading" not in found.missing


async def refuse_unfit_sql(settings: Settings) -> None:
    """Refuse a PostgreSQL that must not be used; one that does not answer is waited for.

    Raises:
        SettingsError: naming what is wrong with it.
    """
    if not settings.database_url.startswith("postgres"):
        return
    try:
        await postgresql.look(settings.database_url)
    except LedgerUnfit as error:
        raise SettingsError(f"RESERVATION_DATABASE_URL: {error}") from error
    except OSError as error:
        log.warning("sql_does_not_answer_yet", reason=str(error) or type(error).__name__)
