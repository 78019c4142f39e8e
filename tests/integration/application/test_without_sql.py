"""While SQL is down: sales already compared with SQL stay open, all others wait."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.application.readiness import redis_monitor as recovery
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.domain.errors import ReservationError, SaleNotFound, Unavailable
from reservation.telemetry.metrics import PREPARE_CLOSED
from tests.support.databases import PostgresServer, running_postgres
from tests.support.in_process import Bench
from tests.support.valkey import MakeServer

#: Far above the needs of a busy machine.
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may stop."""
    with running_postgres() as server:
        yield server


class Sql:
    """A database of the test's own on it."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.url = server.make_database()
        self.start, self.stop = server.start, server.stop

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All of its processes are stopped (SIGSTOP)."""
        main = psutil.Process(self._server.pid)
        processes = [*main.children(), main]
        for one in processes:
            one.suspend()
        try:
            yield
        finally:
            for one in processes:
                one.resume()


@pytest.fixture
def sql(server: PostgresServer) -> Sql:
    # Not in a thread of the test's loop: the server ends with the thread that started it.
    server.stop()
    server.start()
    return Sql(server)


@pytest.fixture
async def redis(make_server: MakeServer) -> EmbeddedServer:
    server = make_server()
    await server.start()
    return server


@asynccontextmanager
async def process(folder: Path, redis: EmbeddedServer, sql: Sql) -> AsyncIterator[Bench]:
    """The start-up of an API process."""
    environ = {
        "RESERVATION_DATA_DIR": str(folder),
        "RESERVATION_REDIS_URL": redis.url,
        "RESERVATION_DATABASE_URL": sql.url,
    }
    async with opened(Settings.load(environ, None), sql_may_be_away=True) as service:
        service.connections.guard()
        await service.redis_monitor.check_redis()
        yield Bench(service)


def closed_for(reason: str) -> float:
    return PREPARE_CLOSED.labels(reason)._value.get()


async def refused(here: Bench, sale_id: str) -> None:
    with pytest.raises(Unavailable):
        await here.hold(sale_id)


async def until_sql_is_back(here: Bench) -> None:
    """Wait until SQL says that a sale does not exist; its start may take a round or two."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            await here.service.redis_monitor.check_redis()
            try:
                await here.hold("unknown")
            except SaleNotFound:
                return
            except Unavailable:
                await asyncio.sleep(0.1)


async def test_a_process_started_without_sql_sells_vouched_sales(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql
) -> None:
    async with process(tmp_path, redis, sql) as before:
        sale_id = await before.sale()
        await before.flush(sale_id)
        await before.service.redis_monitor.check_redis()
        await asyncio.to_thread(sql.stop)
        async with process(tmp_path, redis, sql) as started:
            order = await started.hold(sale_id)
            assert closed_for("sql") == 0
            # Only SQL shows whether it exists.
            with pytest.raises(Unavailable):
                await started.hold("unknown")
            # No payment is requested without its intent.
            with pytest.raises(OSError, match="PostgreSQL does not"):
                await started.service.sql.intents.list_by_order(order.order_id)
            await asyncio.to_thread(sql.start)
            await until_sql_is_back(started)
            await started.flush(sale_id)
            assert await started.audited(sale_id) == ()


async def test_a_redis_restarted_without_sql_stays_closed_until_sql_returns(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql
) -> None:
    async with process(tmp_path, redis, sql) as before:
        sale_id = await before.sale()
        await before.service.redis_monitor.check_redis()
        await asyncio.to_thread(sql.stop)
        await redis.stop()
        await redis.start()
        async with process(tmp_path, redis, sql) as started:
            for here in (before, started):
                await here.service.redis_monitor.check_redis()
                await refused(here, sale_id)
            assert closed_for("sql") == 1
            await asyncio.to_thread(sql.start)
            for here in (before, started):
                await until_sql_is_back(here)
                await here.hold(sale_id)
            assert closed_for("sql") == 0


async def test_a_lost_sale_is_not_sold_by_a_process_without_sql(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql
) -> None:
    async with process(tmp_path, redis, sql) as before:
        sale_id, other_id = await before.sale(), await before.sale()
        await before.hold(sale_id)
        memory = await before.remembered(sale_id)
        await before.hold(sale_id)
        await before.flush(sale_id)
        await before.service.redis_monitor.check_redis()
        await before.put_back(sale_id, memory)
        await before.service.redis_monitor.check_redis()
        assert list(before.service.redis_monitor.gaps) == [sale_id]
        await asyncio.to_thread(sql.stop)
        async with process(tmp_path, redis, sql) as started:
            with pytest.raises(ReservationError):
                await started.hold(sale_id)
            await started.hold(other_id)


async def test_a_vouch_of_another_server_run_is_ignored(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql
) -> None:
    async with process(tmp_path, redis, sql) as before:
        sale_id = await before.sale()
        await before.service.redis_monitor.check_redis()
        await before.service.connections.command("SET", "rsv:vouched", "{")
        await asyncio.to_thread(sql.stop)
        async with process(tmp_path, redis, sql) as started:
            await refused(started, sale_id)
        # The process that made the comparison needs no record.
        await before.service.redis_monitor.check_redis()
        await before.hold(sale_id)


async def test_holds_continue_while_the_database_hangs(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps its connections and never answers: no call may wait for it for long."""
    async with process(tmp_path, redis, sql) as here:
        sale_id = await here.sale()
        await here.service.redis_monitor.check_redis()
        # Not before: a database that is only slow must not count as away.
        monkeypatch.setattr(recovery, "ANSWER_SECONDS_MAX", 0.5)
        with sql.frozen():
            began = time.monotonic()
            await here.service.redis_monitor.check_redis()
            # Below the 15 s of the statement time-out.
            assert time.monotonic() - began < 10
            assert here.service.redis_monitor.away == "sql"
            await here.hold(sale_id)
        monkeypatch.undo()
        await until_sql_is_back(here)
        assert here.service.redis_monitor.away == ""


async def test_a_returning_database_is_migrated(
    tmp_path: Path, redis: EmbeddedServer, sql: Sql
) -> None:
    await asyncio.to_thread(sql.stop)
    async with process(tmp_path, redis, sql) as started:
        assert closed_for("sql") == 1
        with pytest.raises(OSError, match="PostgreSQL does not"):
            await started.service.sql.database.check()
        await asyncio.to_thread(sql.start)
        # A caller that times out early must not end the migration.
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await started.service.sql.database.check()
        await started.service.sql.database.check()
        await started.service.redis_monitor.check_redis()
        sale_id = await started.sale()
        await started.hold(sale_id)
