"""Five times the load that the service can take: what it still sells, says, confirms, and after."""

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec
import redis.asyncio

from benchmarks.bystanders import Answer, Bystanders, Payment, at_pace
from benchmarks.compare import STOCK
from benchmarks.contenders import ADMIN_API_KEY, free_port, own_environ, served
from benchmarks.load import CONNECTIONS, Load, Measured
from benchmarks.run import Goal, Run, Section
from benchmarks.sale import SALE_ID, SKU, put_over_http
from reservation.redis.keys import Keys
from reservation.redis.server_files import socket_path_of

__all__ = ["measure"]

#: Times the peak.
_SURGE: Final = 5
#: Each has one request under way. As many as the server's queue of new connections holds.
_SURGE_CONNECTIONS: Final = 4_096
#: The bystanders' prepares and payments a second, during the peak as well.
_PREPARES: Final = 20
_PAYMENTS: Final = 20
#: Sold a second is taken after this: the load starts, and the queue fills.
_RAMP_SECONDS: Final = 2
#: How long after the surge is looked at.
_AFTER_SECONDS: Final = 7
#: Well again: so many prepares in a row are held this fast.
_WELL_IN_A_ROW: Final = 20
_WELL_MS: Final = 50.0
#: Payments whose outcome was unknown at first get this long to be settled.
_SETTLED_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.5

_REFUSALS: Final = (429, 503)
_REFUSAL_MS_MAX: Final = 50.0
_GOODPUT_WANTED: Final = 0.9
_CONFIRMED_WANTED: Final = 0.999
_RECOVERY_SECONDS_MAX: Final = 5.0


class Phase(msgspec.Struct, frozen=True):
    """One load, and what went on beside it."""

    #: Holds a second, by Redis' own count.
    sold_per_second: float
    load: Measured
    prepares: list[Answer]
    confirms: list[Answer]
    confirmed: int


class Overload(msgspec.Struct, frozen=True):
    """The peak, then the surge."""

    peak: Phase
    surge: Phase
    #: Seconds from the surge's end; None where it was not well again in time.
    recovered_after: float | None


def measure(run: Run) -> Section:
    """Rounds on the whole service, with its worker, its sandbox and one API process."""
    rounds = 1 if run.quick else 5
    found: list[Overload] = []
    for number in range(rounds):
        found.append(asyncio.run(_round(run)))
        peak, surge = found[-1].peak.sold_per_second, found[-1].surge.sold_per_second
        run.say(f"overload {number + 1}/{rounds}  peak {peak:,.0f}, surge {surge:,.0f} holds/s")
    return _section(found)


class Scene:
    """The whole service, the load and the bystanders."""

    def __init__(self, url: str, client: "redis.asyncio.Redis", load: Load) -> None:
        self.url = url
        self.load = load
        self.bystanders = Bystanders(url)
        self._redis = client

    async def sold(self) -> int:
        """Pieces that were ever taken: none goes back here."""
        left: object = await self._redis.hget(Keys().of(SALE_ID).stock(SKU), "available")
        return STOCK - int(str(left))

    async def aclose(self) -> None:
        """End the connections."""
        await self.bystanders.http.aclose()
        await self._redis.aclose()


async def _round(run: Run) -> Overload:
    peak_seconds, surge_seconds, after_seconds = (
        (3, 3, 3) if run.quick else (10, 20, _AFTER_SECONDS)
    )
    async with _scene(run.home / "overload", run.buyers) as scene:
        await asyncio.to_thread(scene.load.run, scene.url, seconds=2)
        peak, _ = await _phase(scene, peak_seconds, connections=CONNECTIONS)
        surge, after = await _phase(
            scene,
            surge_seconds,
            connections=_SURGE_CONNECTIONS,
            rate=_SURGE * peak.sold_per_second,
            after_seconds=after_seconds,
        )
    return Overload(peak, surge, after)


@asynccontextmanager
async def _scene(home: Path, buyers: Path) -> AsyncGenerator[Scene]:
    await asyncio.to_thread(_empty, home)
    port, data_dir = free_port(), home / "service"
    environ = own_environ(data_dir, port)
    # `-m api.cli serve`: everything that `make run` starts.
    command = [sys.executable, "-m", "api.cli", "serve"]
    with served(command, environ, home, port):
        url = f"http://127.0.0.1:{port}"
        put_over_http(url, ADMIN_API_KEY, STOCK)
        client = redis.asyncio.Redis(
            unix_socket_path=str(socket_path_of(data_dir)), decode_responses=True
        )
        scene = Scene(url, client, Load(buyers))
        try:
            yield scene
        finally:
            await scene.aclose()
    await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


def _empty(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)


async def _phase(
    scene: Scene,
    seconds: int,
    *,
    connections: int,
    rate: float | None = None,
    after_seconds: int = 0,
) -> tuple[Phase, float | None]:
    payments = await scene.bystanders.payments(_PAYMENTS * seconds)
    prepares = [scene.bystanders.prepare] * (_PREPARES * (seconds + after_seconds))
    comings = [_coming(scene.bystanders, payment) for payment in payments]
    process = scene.load.start(scene.url, seconds=seconds, connections=connections, rate=rate)
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(asyncio.to_thread(process.communicate))
        probes = tasks.create_task(at_pace(prepares, _PREPARES))
        confirms = tasks.create_task(at_pace(comings, _PAYMENTS))
        await asyncio.sleep(_RAMP_SECONDS)
        counted_at, before = time.perf_counter(), await scene.sold()
        await asyncio.sleep(seconds - _RAMP_SECONDS)
        sold = (await scene.sold() - before) / (time.perf_counter() - counted_at)
    scene.load.move_on()
    during = [answer for answer in probes.result() if answer.sent_at < seconds]
    confirmed = await _confirmed(scene.bystanders, payments)
    phase = Phase(sold, scene.load.read(*output.result()), during, confirms.result(), confirmed)
    return phase, _recovered(probes.result(), seconds)


def _coming(bystanders: Bystanders, payment: Payment) -> Callable[[], Awaitable[httpx.Response]]:
    return lambda: bystanders.come_back(payment)


async def _confirmed(bystanders: Bystanders, payments: Sequence[Payment]) -> int:
    """How many got what they paid for, once what was unknown is settled."""
    left, give_up_at = list(payments), time.perf_counter() + _SETTLED_SECONDS
    while True:
        left = [one for one in left if await bystanders.status_of(one) != "CONFIRMED"]
        if not left or time.perf_counter() > give_up_at:
            return len(payments) - len(left)
        await asyncio.sleep(_LOOK_SECONDS)


def _recovered(probes: Sequence[Answer], ended_at: float) -> float | None:
    """Seconds from the end of the load to the first of enough good answers in a row."""
    row: list[Answer] = []
    for answer in probes:
        well = answer.status == 201 and answer.ms <= _WELL_MS
        row = [*row, answer] if well and answer.sent_at >= ended_at else []
        if len(row) == _WELL_IN_A_ROW:
            return row[0].sent_at - ended_at
    return None


def _section(found: Sequence[Overload]) -> Section:
    share = median(one.surge.sold_per_second / one.peak.sold_per_second for one in found)
    refused = sorted(
        answer.ms for one in found for answer in one.surge.prepares if answer.status in _REFUSALS
    )
    refusal = _quantile(refused, 0.99)
    paid = sum(len(one.surge.confirms) for one in found)
    confirmed = sum(one.surge.confirmed for one in found)
    after = [one.recovered_after for one in found]
    slowest = max((one for one in after if one is not None), default=None)
    slowest = None if None in after else slowest
    half = f"; half of {len(refused)} in {_quantile(refused, 0.5) or 0:.0f} ms"
    return Section(
        title="Overload: the whole service, its worker and sandbox on the same cores",
        columns=["", "answers/s", "holds/s", "refused", "prepare p99 ms", "confirm p99 ms"],
        rows=[
            _row("peak", [one.peak for one in found]),
            _row(f"{_SURGE} times the peak", [one.surge for one in found]),
        ],
        goals=[
            Goal("goodput in overload", f"{share:.0%}", ">= 90 %", share >= _GOODPUT_WANTED),
            Goal(
                "a refusal's p99 in overload",
                f"{refusal:.0f} ms{half}" if refusal is not None else "none refused",
                f"<= {_REFUSAL_MS_MAX:.0f} ms",
                refusal is not None and refusal <= _REFUSAL_MS_MAX,
            ),
            Goal(
                "confirmed in overload",
                f"{confirmed} of {paid}",
                ">= 99.9 %",
                paid > 0 and confirmed >= _CONFIRMED_WANTED * paid,
            ),
            Goal(
                "well again after it, the slowest",
                f"{slowest:.1f} s" if slowest is not None else "not in time",
                f"<= {_RECOVERY_SECONDS_MAX:.0f} s",
                slowest is not None and slowest <= _RECOVERY_SECONDS_MAX,
            ),
        ],
        data=found,
    )


def _row(name: str, phases: Sequence[Phase]) -> list[str]:
    refused = sum(answer.status in _REFUSALS for one in phases for answer in one.prepares)
    return [
        name,
        f"{median(one.load.answers_per_second for one in phases):,.0f}",
        f"{median(one.sold_per_second for one in phases):,.0f}",
        f"{refused} of {sum(len(one.prepares) for one in phases)}",
        f"{median(_p99(one.prepares) for one in phases):,.0f}",
        f"{median(_p99(one.confirms) for one in phases):,.0f}",
    ]


def _p99(answers: Sequence[Answer]) -> float:
    return _quantile(sorted(answer.ms for answer in answers), 0.99) or 0.0


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[int(len(ordered) * share)] if ordered else None
