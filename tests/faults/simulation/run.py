"""Simulation runs: the ground that seeds share, and one run from its plan to its judgement."""

import asyncio
import gc
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiosqlite.core
import msgspec
import pytest
import structlog
from litestar.datastructures import State
from sqlalchemy.exc import SAWarning

from api.http import middleware as observe
from api.http.app import create_app
from reservation.adapters.redis import addresses
from reservation.adapters.redis import connection_pool as redis_pool
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.sql import sqlite
from reservation.adapters.sql.engine import Database
from reservation.adapters.toss import client as toss_client
from reservation.config.settings import Settings
from reservation.sandbox import SandboxConfig, create_sandbox, webhooks
from reservation.verification.buyer_requests import Order
from reservation.verification.model.report import Judgement
from reservation.verification.shopper import Crowd
from reservation.workers import runner
from tests.faults.payments.clock import scripts_by
from tests.faults.simulation.buyers import HABITS, live
from tests.faults.simulation.clients import PG, SHOP, Client, Town
from tests.faults.simulation.deterministic_os import determined
from tests.faults.simulation.faults import Faults
from tests.faults.simulation.http import SimulatedSession, SimulatedTransport, Web
from tests.faults.simulation.loop import NothingLeft, VirtualLoop
from tests.faults.simulation.network import Weather
from tests.faults.simulation.operators import Operator
from tests.faults.simulation.plans import Plan
from tests.faults.simulation.redis import RedisSide, SimulatedPool, SimulatedWire
from tests.faults.simulation.sql import InlineQueue, InlineThreads, NoThread, SqlSide
from tests.faults.simulation.trace import Trace
from tests.faults.simulation.verdict import problems_of, witnessed
from tests.faults.simulation.world import World

__all__ = ["Ground", "Outcome", "ground"]

APIS = ("api-1", "api-2")
#: Virtual seconds after the last buyer in which everything must have come to its end: a PG's
#: window of 13 minutes, and a webhook that is sent again after 1, 4 and 16 minutes.
REST_SECONDS = 3_600.0
#: Faults continue for a while after the last buyer has arrived.
FAULTS_AFTER_SECONDS = 20.0
#: Between two checks whether all is done.
OBSERVE_SECONDS = 10.0
#: Pauses of the workers' loops when they have nothing to do. In production they are shorter; here
#: they set the cost of an idle virtual second.
PAUSES = {"REAP_SECONDS": 0.7, "SETTLE_SECONDS": 0.6, "FLUSH_SECONDS": 0.5}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one seed."""

    plan: Plan
    #: Empty if no problem was found.
    problems: list[str]
    judgement: Judgement | None
    digest: str
    #: The last event's chain value: the same run gives the same one.
    chain: str
    orders: int
    virtual_seconds: float
    real_seconds: float
    counts: dict[str, int]
    last: list[str]


class Ground:
    """Resources that runs share, slow to make: the server, empty tables, applications."""

    def __init__(self, folder: Path, server: EmbeddedServer) -> None:
        self._folder = folder
        self._server = server
        self._data = folder / "data"
        self._settings = Settings.load(
            {
                "RESERVATION_DATA_DIR": str(self._data),
                "RESERVATION_REDIS_URL": server.url,
                "RESERVATION_TOSS_API_URL": PG,
                "RESERVATION_PUBLIC_URL": SHOP,
                "RESERVATION_GUEST_RATE": "0",
                **{
                    f"RESERVATION_{name}": f"of-the-simulation-alone-{name:->16}"
                    for name in _SECRETS
                },
            },
            None,
        )
        self._empty = folder / "empty.sqlite3"
        asyncio.run(_make_tables(self._empty))
        self._apps = {name: create_app(self._settings) for name in APIS}

    def run(
        self, plan: Plan, *, on_line: Any = None, rest_seconds: float = REST_SECONDS
    ) -> Outcome:
        """One seed from beginning to end.

        Args:
            plan: the seed's.
            on_line: gets each line of the trace.
            rest_seconds: the time-out until nothing is held any more.
        """
        with _quietly():
            outcome = self._run(plan, on_line, rest_seconds)
            gc.collect()
        return outcome

    def _run(self, plan: Plan, on_line: Any, rest_seconds: float) -> Outcome:
        began = time.monotonic()
        self._clean()
        loop = VirtualLoop()
        trace = Trace(loop, on_line)
        run = _Run(plan, loop, trace, self, rest_seconds)
        asyncio.set_event_loop(None)
        try:
            with determined(loop, str(plan.seed)), run.substituted():
                run.go()
                for app in self._apps.values():
                    # State left by the last process that served it.
                    app.state = State()
        finally:
            loop.close()
        return run.outcome(time.monotonic() - began)

    def world(self, plan: Plan, loop: VirtualLoop, trace: Trace) -> World:
        """A new world on this ground."""
        weather = Weather.fair()
        redis = RedisSide(self._server.socket_path, loop, trace, weather.redis)
        redis.now(("FLUSHALL",), ("SCRIPT", "FLUSH"))
        sandbox = create_sandbox(
            SandboxConfig(
                journal_dir=self._data / "sandbox",
                webhook_urls=(f"{SHOP}/v1/payments/toss/webhooks",),
            )
        )
        return World(
            str(plan.seed),
            loop=loop,
            trace=trace,
            weather=weather,
            redis=redis,
            sql=SqlSide(loop, trace, weather.sql),
            settings=self._settings,
            apps=self._apps,
            sandbox=sandbox,
            workers=plan.workers,
        )

    def _clean(self) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(mode=0o700)
        shutil.copy(self._empty, self._data / "orders.sqlite3")


_SECRETS = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")


async def _make_tables(path: Path) -> None:
    database = await Database.open(f"sqlite:///{path}")
    await database.aclose()


@contextmanager
def ground(broken: Mapping[str, tuple[str, str]] = MappingProxyType({})) -> Generator[Ground]:
    """A server and a directory of our own, in memory where the machine lets us.

    Args:
        broken: for a script's file, the original text and its replacement.
    """
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="rsv-sim-", dir=place) as name:
        folder = Path(name)
        server = EmbeddedServer(folder, maxmemory_bytes=256 * 1024 * 1024)
        with pytest.MonkeyPatch.context() as patch, scripts_by(folder, patch):
            for file, (old, new) in broken.items():
                script = folder / "lua" / file
                text = script.read_text()
                assert text.count(old) == 1, f"{file} has changed"
                script.write_text(text.replace(old, new))
            asyncio.run(server.start())
            try:
                yield Ground(folder, server)
            finally:
                asyncio.run(server.stop())


class _Run:
    def __init__(
        self, plan: Plan, loop: VirtualLoop, trace: Trace, on: Ground, rest_seconds: float
    ) -> None:
        self._rest_seconds = rest_seconds
        self._plan, self._loop, self._trace = plan, loop, trace
        self._world = on.world(plan, loop, trace)
        self._problems: list[str] = []
        self._judgement: Judgement | None = None
        self._chain = ""
        world, weather = self._world, self._world.weather
        self._web = Web(
            loop,
            trace,
            {
                SHOP.removeprefix("http://"): (weather.web, world.apis),
                PG.removeprefix("http://"): (weather.pg, world.pgs),
            },
        )
        self.town = Town(
            sale_id=f"sim-{plan.seed}",
            prices={sku: price for sku, price, _, _ in plan.items},
            settings=world.settings,
            web=self._web,
            loop=loop,
            operations=[],
            wrong=world.wrong,
            orders=[],
            crowd=Crowd(
                sale_id=f"sim-{plan.seed}",
                habits=HABITS,
                accuse=world.wrong.append,
                say=self._say,
                prices={sku: price for sku, price, _, _ in plan.items},
                hold_seconds=plan.hold_seconds,
                sandbox_url=PG,
            ),
            count=lambda what: trace.note(what, "town", ""),
        )

    def _say(self, order: Order, word: str) -> None:
        if word == "held":
            self.town.orders.append(order)

    @contextmanager
    def substituted(self) -> Generator[None]:
        """The substitutes, for the length of the run."""
        SimulatedPool.side = self._world.redis
        InlineQueue.side = InlineThreads.side = self._world.sql
        SimulatedSession.web = SimulatedTransport.web = self._web
        before = structlog.get_config()
        structlog.configure(
            processors=[self._capture_log], wrapper_class=structlog.make_filtering_bound_logger(0)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(addresses, "ConnectionPool", SimulatedPool)
            patch.setattr(redis_pool, "RedisConnection", SimulatedWire)
            patch.setattr(aiosqlite.core, "SimpleQueue", InlineQueue)
            patch.setattr(aiosqlite.core, "Thread", NoThread)
            patch.setattr(sqlite, "Threads", InlineThreads)
            patch.setattr(toss_client, "HttpTransport", SimulatedTransport)
            patch.setattr(webhooks, "ClientSession", SimulatedSession)
            # Names of requests are drawn many at once: none may be left over from the last run.
            patch.setattr(observe, "_ids", _fresh(observe, "_ids"))
            for name, seconds in PAUSES.items():
                patch.setattr(runner, name, seconds)
            patch.setattr(runner, "TICK_SECONDS", PAUSES["FLUSH_SECONDS"])
            try:
                yield
            finally:
                structlog.configure(**before)
                self._world.redis.close()

    def _capture_log(self, _: Any, __: str, event: MutableMapping[str, Any]) -> str:
        """The service's own log: a bug that it survives is still a bug."""
        name = str(event.get("event"))
        if name in _BUGS or event.get("exc_info"):
            self._world.wrong.append(f"{name}: {event}")
        raise structlog.DropEvent

    def go(self) -> None:
        """Run it; an early end is a problem."""
        self._loop.set_exception_handler(self._unhandled)
        try:
            self._loop.run_until_complete(self._story())
        except NothingLeft as stuck:
            self._problems.append(f"stuck: {stuck}")

    def _unhandled(self, _: Any, context: dict[str, Any]) -> None:
        self._world.wrong.append(
            f"unhandled: {context.get('message')} {context.get('exception')!r}"
        )

    async def _story(self) -> None:
        world, plan = self._world, self._plan
        async with world.running():
            operator = Operator(self.town, plan, world.luck("operator"))
            await operator.open()
            faults = Faults(world, operator, world.luck("faults"))
            faults.let_loose(plan.faults, plan.seconds + FAULTS_AFTER_SECONDS)
            buyers = [
                Client(self.town, f"buyer-{number}", world.luck("buyer", number))
                for number in range(plan.buyers)
            ]
            async with asyncio.TaskGroup() as people:
                for buyer in buyers:
                    people.create_task(live(buyer, opens_within=plan.seconds))
                people.create_task(operator.meddle())
            faults.end()
            world.end_faults()
            await operator.tidy()
            await self._rest(operator)

    async def _rest(self, operator: Operator) -> None:
        """Wait until nothing is held any more; then judge."""
        sale_id, until = self.town.sale_id, self._loop.now + self._rest_seconds
        async with self._world.auditor() as service:
            while not await operator.all_done(service) and self._loop.now < until:  # noqa: ASYNC110
                await asyncio.sleep(OBSERVE_SECONDS)
            entries = await operator.ledger()
            self._judgement = await witnessed(service, sale_id, self.town.operations, entries)
            counters = await service.sale_store.counters(sale_id)
            self._chain = counters.chain if counters else ""
            self._problems += problems_of(
                sale_id,
                self._judgement,
                audit=await operator.audit(),
                orders=await operator.orders(),
                entries=entries,
            )

    def outcome(self, real_seconds: float) -> Outcome:
        return Outcome(
            plan=self._plan,
            problems=[*self._problems, *self._world.wrong],
            judgement=self._judgement,
            digest=self._trace.digest,
            chain=self._chain,
            orders=len(self.town.orders),
            virtual_seconds=self._loop.now,
            real_seconds=real_seconds,
            counts=dict(self._trace.counts),
            last=list(self._trace.last),
        )


def _fresh(module: Any, name: str) -> Any:
    """A fresh object of the same kind, as at the start."""
    return type(getattr(module, name))()


@contextmanager
def _quietly() -> Generator[None]:
    """The garbage of dead processes is collected silently, and none of it meanwhile.

    It would be at another moment each time.
    """
    gc.disable()
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()


#: Log events that no run may have.
_BUGS = {"worker_bug", "round_crashed", "sandbox_failed"}
