"""Simulated world: its servers, its processes, its clients, and how it is brought to rest."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.workers.runner import Worker
from tests.faults.simulation.loop import NEUTRAL, VirtualLoop
from tests.faults.simulation.network import Weather
from tests.faults.simulation.processes import Process
from tests.faults.simulation.redis import RedisSide
from tests.faults.simulation.sql import SqlSide
from tests.faults.simulation.trace import Trace

__all__ = ["Slot", "World"]

#: Maximum error of a process's wall clock; the service itself refuses holds from 500 ms on.
SKEW_MS_MAX = 200
#: Downtime of a process that ended by itself, as with a supervisor's back-off.
AGAIN_SECONDS = 1.0
#: A world at its end is cancelled so often, and given so long each time.
ROUNDS_TO_END = 20
SECONDS_TO_END = 60.0
#: Errors that may end a process at its start, when a dependency is away.
_AT_START = (SQLAlchemyError, OSError, StoreUnavailable, StoreUncertain)


class Slot:
    """A place for one process after the other."""

    def __init__(self, name: str, run: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        self.name = name
        self.run = run
        self.process: Process | None = None
        self.lives = 0
        #: Seconds until the next life, after a kill.
        self.pause = AGAIN_SECONDS
        self.ended = asyncio.Event()

    @property
    def running(self) -> Process | None:
        """The living process, if it is not frozen."""
        process = self.process
        return process if process and process.alive and not process.halted else None

    def kill(self, pause: float) -> None:
        """End this life at once; the next one begins after the pause."""
        if self.process is not None and self.process.alive:
            self.pause = pause
            self.process.kill()
            self.ended.set()


class World:
    """The parts of a run; `seed` decides everything that is not in the plan."""

    def __init__(
        self,
        seed: str,
        *,
        loop: VirtualLoop,
        trace: Trace,
        weather: Weather,
        redis: RedisSide,
        sql: SqlSide,
        settings: Settings,
        apps: dict[str, Any],
        sandbox: Any,
        workers: int,
    ) -> None:
        self.seed = seed
        self.loop, self.trace, self.weather = loop, trace, weather
        self.redis, self.sql, self.settings = redis, sql, settings
        self.wrong: list[str] = []
        self.pg = Process("pg", loop, self.luck("pg"))
        self._sandbox = sandbox
        self.slots = [Slot(name, self._api(app)) for name, app in apps.items()]
        self.slots += [Slot(f"worker-{number}", self._work) for number in range(1, workers + 1)]
        self._keepers: list[asyncio.Task[None]] = []
        self._lived: list[Process] = []

    def luck(self, *names: object) -> random.Random:
        """The draws of one part of the world, independent of all other parts' draws."""
        return random.Random(" ".join(map(str, (self.seed, *names))))

    def apis(self) -> list[Process]:
        """Processes that get requests: a frozen one still does, since its port is open."""
        found = [slot.process for slot in self.slots if slot.process is not None]
        return [process for process in found if process.alive and process.serves is not None]

    def pgs(self) -> list[Process]:
        return [self.pg] if self.pg.serves is not None else []

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Run this then, whichever process is running."""
        self.loop.call_later(seconds, what, context=NEUTRAL)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Everything is started; ended with the block."""
        up: asyncio.Future[None] = self.loop.create_future()
        pg = self.pg.start(self._serve(self.pg, self._sandbox, up))
        await up
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in self.slots]
        try:
            yield
        finally:
            for keeper in self._keepers:
                keeper.cancel()
            pg.cancel()
            await self._end_all()

    def end_faults(self) -> None:
        """From now on no fault is active, and every frozen process continues."""
        self.weather.clear()
        self.redis.stalled_until = self.redis.away_until = self.sql.away_until = 0.0
        for slot in self.slots:
            if slot.process is not None:
                slot.process.thaw()

    @asynccontextmanager
    async def auditor(self) -> AsyncGenerator[Service]:
        """A connected service of no process, to read from."""
        process = Process("auditor", self.loop, self.luck("auditor"))
        up: asyncio.Future[Service] = self.loop.create_future()

        async def restart_when_due() -> None:
            async with opened(self.settings) as service:
                await service.connections.measure_offset()
                up.set_result(service)
                await asyncio.Event().wait()

        standing = process.start(restart_when_due())
        await asyncio.wait({standing, up}, return_when=asyncio.FIRST_COMPLETED)
        try:
            yield up.result() if up.done() else standing.result()
        finally:
            standing.cancel()
            await asyncio.wait({standing})

    def _api(self, app: Any) -> Callable[[Process], Coroutine[Any, Any, None]]:
        async def run(process: Process) -> None:
            await self._serve(process, app)

        return run

    async def _work(self, process: Process) -> None:
        async with opened(self.settings) as service:
            # All processes of the simulation are one of the system.
            await Worker(service, process.name).run()

    @staticmethod
    async def _serve(process: Process, app: Any, up: "asyncio.Future[None] | None" = None) -> None:
        async with app.lifespan():
            process.serves = app
            if up is not None:
                up.set_result(None)
            try:
                await asyncio.Event().wait()
            finally:
                process.serves = None

    async def _keep(self, slot: Slot) -> None:
        """One life after the other."""
        while True:
            slot.lives += 1
            draw = self.luck(slot.name, slot.lives)
            skew_ms = draw.randint(-SKEW_MS_MAX, SKEW_MS_MAX)
            name = f"{slot.name}.{slot.lives}"
            slot.process = Process(name, self.loop, draw, skew_ms=skew_ms)
            slot.pause = AGAIN_SECONDS
            slot.ended.clear()
            self._lived.append(slot.process)
            self.trace.note("starts", name, f"{skew_ms}")
            main = slot.process.start(slot.run(slot.process))
            killed = asyncio.create_task(slot.ended.wait())
            await asyncio.wait({main, killed}, return_when=asyncio.FIRST_COMPLETED)
            killed.cancel()
            if main.done():
                self._ended_by_itself(slot.process, main)
                slot.process.kill()
            await asyncio.sleep(slot.pause)

    def _ended_by_itself(self, process: Process, main: asyncio.Task[None]) -> None:
        error = None if main.cancelled() else main.exception()
        self.trace.note("ends", process.name, type(error).__name__)
        causes = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
        if not all(isinstance(cause, _AT_START) for cause in causes):
            self.wrong.append(f"{process.name} ended: {error!r}")

    async def _end_all(self) -> None:
        """Run every clean-up, of dead processes too, whose calls reach no server."""
        for process in self._lived:
            self.loop.resume(process)
        left: set[asyncio.Task[Any]] = set()
        for _ in range(ROUNDS_TO_END):
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=SECONDS_TO_END)
        raise AssertionError(f"never end: {left}")
