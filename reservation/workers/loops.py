"""Loops of the worker: repeated rounds, with back-off after failures."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.errors import reason_of
from reservation.domain.alarms import Alarm
from reservation.domain.errors import ReservationError
from reservation.domain.rate_limit import Limiter, Rate
from reservation.telemetry.metrics import alarm

__all__ = ["TRANSIENT", "attempt", "back_off_seconds", "forever"]

log = structlog.get_logger(__name__)

#: Upper bound of the exponential back-off after failed rounds.
BACK_OFF_SECONDS_MAX: Final = 5.0
#: Transient failures: the network, a server that restarts, a lost lease.
TRANSIENT: Final = (ReservationError, StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError)
#: Rate limit of their log lines, per loop and kind of failure.
LINES: Final = Rate(count=3, per_seconds=60)

_lines = Limiter(LINES)


async def forever(
    name: str,
    once: Callable[[], Awaitable[int]],
    pause: float,
    *,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Repeat a round: at once while there is work, else after a pause.

    Args:
        name: of the loop, for the log.
        once: runs one round; returns the amount of work done.
        pause: in seconds.
        ready: awaited before each round.
    """
    failures = 0
    while True:
        if ready is not None:
            await ready()
        did = await attempt(name, once)
        failures = failures + 1 if did is None else 0
        if did is None:
            await asyncio.sleep(back_off_seconds(pause, failures))
        elif not did:
            await asyncio.sleep(pause)


async def attempt(name: str, once: Callable[[], Awaitable[int]], **facts: str) -> int | None:
    """Run one round; the amount of work done, or None if the round failed.

    Args:
        name: of the loop, for the log.
        once: runs the round.
        facts: for the log.
    """
    did: int | None = None
    try:
        did = await once()
    except TRANSIENT as error:
        # While a server is down the rounds of all sales fail the same way.
        if not _lines.wait(f"{name} {type(error).__name__}", time.monotonic()):
            log.warning("round_failed", loop=name, reason=reason_of(error), **facts)
    except Exception as error:  # loop top: a bug in one round must not end the others
        alarm(Alarm.WORKER_BUG, loop=name, reason=type(error).__name__, **facts)
        log.exception("round_crashed", loop=name, **facts)
    _raise_if_cancelled()
    return did


def back_off_seconds(pause: float, failures: int) -> float:
    """The pause after this many failed rounds in a row, in seconds."""
    return min(BACK_OFF_SECONDS_MAX, pause * 2 ** min(failures, 6))


def _raise_if_cancelled() -> None:
    """End a task whose cancellation was swallowed.

    Before 3.12 `asyncio.wait_for`, with which SQLAlchemy's pool waits for a connection, swallows it
    when the connection arrives at the same instant; the worker then never ended.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
