"""Startup checks: refuse to start with an unfit Redis or database."""

import asyncio
from typing import Final

import structlog

from reservation.adapters.redis.cluster import open_client
from reservation.adapters.redis.errors import AddressUnfit, StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.sql import postgresql
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.application.readiness.check import Preflight
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock

__all__ = ["is_answered", "refuse_unfit_sql"]

log = structlog.get_logger(__name__)

#: Time-out of one check; after it the server counts as down and is checked again.
ANSWER_SECONDS_MAX: Final = 2.5


async def is_answered(settings: Settings) -> bool:
    """Whether the server could be checked; in development only its address is.

    Raises:
        SettingsError: the server is unfit, one line per reason; or a trusted name is not a row.
    """
    clock = SystemClock()
    connections = open_client(settings.redis_url, clock=clock)
    try:
        readiness = Preflight(connections, Keys(settings.key_prefix), settings, clock=clock)
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            await connections.verify()
            if not settings.production:
                return True
            found = await readiness.check()
    except AddressUnfit as error:
        raise SettingsError(f"RESERVATION_REDIS_URL: {error}") from error
    except (StoreUnavailable, StoreUncertain, TimeoutError) as error:
        log.warning("waiting_for_redis", reason=str(error) or type(error).__name__)
        return False
    finally:
        await connections.aclose()
    if found.stops:
        raise SettingsError("\n".join(found.stops))
    return "redis-loading" not in found.missing


async def refuse_unfit_sql(settings: Settings) -> None:
    """Refuse an unfit PostgreSQL; one that does not answer is waited for.

    Raises:
        SettingsError: naming the reason.
    """
    if not settings.database_url.startswith("postgres"):
        return
    try:
        await postgresql.inspect_server(settings.database_url)
    except DatabaseUnfit as error:
        raise SettingsError(f"RESERVATION_DATABASE_URL: {error}") from error
    except OSError as error:
        log.warning("waiting_for_sql", reason=str(error) or type(error).__name__)
