"""Runs a CLI command in-process against Redis and SQL, whether the service runs or not."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from api.cli.errors import BAD_SETTING, REFUSED, UNREACHABLE, CommandError
from api.server import log_config
from reservation.adapters.redis.embedded.server import EmbeddedServer, EmbeddedServerError
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings, SettingsError
from reservation.domain.errors import ReservationError

__all__ = ["run_locally", "with_redis"]


def run_locally(work: Callable[[Service], Awaitable[int]]) -> int:
    """Run the work with the configured service; its result is the exit status."""
    try:
        settings = Settings.load(os.environ)
        # To stderr: by default the lines would be a part of the command's output.
        log_config.configure(production=settings.production)
        return asyncio.run(_run(settings, work))
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except ReservationError as error:
        raise CommandError(error, REFUSED) from error
    except (StoreUnavailable, StoreUncertain, EmbeddedServerError) as error:
        raise CommandError(f"Redis does not answer: {error}", UNREACHABLE) from error
    except (SQLAlchemyError, OSError) as error:
        raise CommandError(f"SQL does not answer: {type(error).__name__}", UNREACHABLE) from error


async def _run(settings: Settings, work: Callable[[Service], Awaitable[int]]) -> int:
    async with with_redis(settings) as reachable, opened(reachable) as service:
        return await work(service)


@contextlib.asynccontextmanager
async def with_redis(settings: Settings) -> AsyncGenerator[Settings]:
    """The settings with an address of Redis: the embedded one's, which is started if need be."""
    if settings.redis_url:
        yield settings
        return
    server = EmbeddedServer(settings.data_dir)
    if server.pid is not None:
        yield msgspec.structs.replace(settings, redis_url=server.url)
        return
    await server.start()
    try:
        yield msgspec.structs.replace(settings, redis_url=server.url)
    finally:
        await server.stop()
