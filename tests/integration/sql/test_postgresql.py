"""PostgreSQL as managed services offer it: other encodings, poolers, and refused characters."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from reservation.adapters.sql import postgresql
from reservation.adapters.sql.engine import MIGRATE_LOCK, Database, DatabaseUnfit
from reservation.adapters.sql.payment_intents import Intent
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.store import SqlStore
from tests.integration.sql.test_flusher import Bench
from tests.support.databases import PostgresServer, running_postgres
from tests.support.outbox import MemoryOutbox, Tape
from tests.support.pgbouncer import running_pgbouncer
from tests.support.proxy import forgetful_path

#: More than the connections of the pooler, and of the service's own pool.
CALLERS = 20
PREPARED = "SELECT count(*) FROM pg_prepared_statements"


def encoded(postgres: PostgresServer, encoding: str) -> str:
    """The URL of a new database in this encoding."""
    name = f"in_{encoding.lower()}"
    postgres.run(f"DROP DATABASE IF EXISTS {name}")
    postgres.run(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")
    return postgres.url(name)


@pytest.mark.parametrize("encoding", ["EUC_KR", "LATIN1", "SQL_ASCII"])
async def test_a_database_in_another_encoding_is_refused_unchanged(
    postgres: PostgresServer, encoding: str
) -> None:
    url = await asyncio.to_thread(encoded, postgres, encoding)
    with pytest.raises(DatabaseUnfit, match=f"encoding is {encoding}, it must be UTF8") as refusal:
        await SqlStore.open(url)
    assert refusal.value.row == "sql-encoding"
    connection = await asyncpg.connect(url)
    try:
        assert await connection.fetch("SELECT * FROM pg_tables WHERE schemaname = 'public'") == []
    finally:
        await connection.close()


@pytest.fixture(scope="module", params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, postgres: PostgresServer) -> Iterator[str]:
    # In session pooling each of ours keeps one of the pooler's.
    size = 3 if request.param == "transaction" else 20
    with running_pgbouncer(postgres, pool_mode=request.param, pool_size=size) as query:
        yield query


@pytest.fixture
async def pooled_url(postgres: PostgresServer, pooler: str) -> str:
    url = await asyncio.to_thread(postgres.make_database)
    return url.partition("?")[0] + pooler


async def test_the_store_works_through_a_transaction_pooler(pooled_url: str) -> None:
    sql = await SqlStore.open(pooled_url)
    try:
        for number in range(CALLERS):
            await sql.sales.register(f"s{number}", "{}", 1)

        async def one(number: int) -> None:
            tape = Tape(f"s{number}")
            tape.put(a=1000)
            for order in range(5):
                tape.sell(f"s{number}-{order}", a=1)
            await sql.intents.add(
                Intent(
                    order_id=f"o{number}",
                    sale_id=f"s{number}",
                    fence=1,
                    payment_key=f"k{number}",
                    amount=1,
                    currency="KRW",
                    idempotency_key="i",
                    now_ms=1,
                )
            )
            assert (await sql.events.apply(f"s{number}", tape.events)).written == len(tape.events)
            await sql.database.check()
            assert len(await sql.orders.history(f"s{number}-1")) > 0
            assert (await sql.orders.page(sale_id=f"s{number}"))[0]
            assert await sql.sales.counters(f"s{number}") is not None

        await asyncio.gather(*(one(number) for number in range(CALLERS)))
    finally:
        await sql.aclose()


async def test_no_session_state_stays_on_pooled_connections(pooled_url: str) -> None:
    """Other clients use the same connections of PostgreSQL."""
    database = await Database.open(pooled_url)
    try:

        async def statements() -> None:
            for number in range(10):
                async with database.read() as connection:
                    await connection.execute(text(f"SELECT {number}, :name"), {"name": "x"})

        await asyncio.gather(*(statements() for _ in range(10)))
        left: list[int] = []
        for _ in range(10):
            async with database.read() as connection:
                found = await connection.execute(
                    text("SELECT count(*) FROM pg_prepared_statements")
                )
                left.append(found.scalar_one())
        assert set(left) == {0}
    finally:
        await database.aclose()
    outside = await asyncpg.connect(pooled_url, statement_cache_size=0)
    try:
        async with outside.transaction():
            assert await outside.fetchval("SHOW idle_in_transaction_session_timeout") == "0"
    finally:
        await outside.close()


async def test_a_direct_connection_keeps_its_prepared_statements(postgres_url: str) -> None:
    """Only a deployment with a pooler pays for parsing each statement anew."""
    database = await Database.open(postgres_url)
    try:
        async with database.read() as connection:
            found = await connection.execute(text(PREPARED))
            assert found.scalar_one() > 0
    finally:
        await database.aclose()


async def test_an_unstorable_event_is_poison(
    postgres_url: str,
) -> None:
    """A refusal of class 22 is a plain DBAPIError, as for a character that the encoding lacks."""
    sql = await SqlStore.open(postgres_url)
    try:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("ALTER TABLE orders ALTER COLUMN buyer_id TYPE varchar(8)")
        await connection.close()
        await sql.sales.register("s", "{}", 1)
        tape = Tape("s")
        tape.put(a=1000)
        tape.sell("before", a=1)
        tape.prepare("bad", a=1, buyer="nine-long")
        tape.sell("after", a=1)
        bench = Bench(sql, MemoryOutbox(tape))
        flusher = bench.flusher()
        await flusher.run_once("s")
        assert (await flusher.run_once("s")).stopped
        [(name, facts)] = bench.alarms
        assert (name, facts["sale_id"], facts["seq"]) == ("flush_poison", "s", 5)
        # The events before it are written.
        assert (await sql.events.cursor("s"))[0] == 4
    finally:
        await sql.aclose()


async def test_an_unstorable_answer_does_not_affect_others(
    postgres_url: str,
) -> None:
    sql = await SqlStore.open(postgres_url)
    try:

        async def record(number: int) -> None:
            kind = "bad\0" if number == 3 else "confirm"
            await sql.payments.add_answer(
                AnswerRow(
                    order_id=f"o{number}", payment_key="k", kind=kind, answer="{}", created_at_ms=1
                )
            )

        ends = await asyncio.gather(*(record(n) for n in range(8)), return_exceptions=True)
        failed = [number for number, end in enumerate(ends) if isinstance(end, Exception)]
        assert failed == [3]
    finally:
        await sql.aclose()


#: Errors that mean SQL is away: HTTP answers 503, and a worker repeats its round.
AWAY = (OperationalError, InterfaceError, OSError, PoolTimeout)


async def asked_until_away(database: Database, seconds: float) -> set[str]:
    """Statements of several callers until this time is over; the classes of their errors."""
    give_up_at = asyncio.get_running_loop().time() + seconds
    found: set[str] = set()

    async def ask() -> None:
        while asyncio.get_running_loop().time() < give_up_at:
            try:
                async with database.write() as connection:
                    await connection.execute(text("SELECT 1"))
            except AWAY as error:
                found.add(type(error).__name__)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(ask() for _ in range(CALLERS)))
    return found


async def until_checked(database: Database) -> None:
    """Wait until SQL is back: a pooler tries to log in every fifteen seconds."""
    async with asyncio.timeout(60):
        while True:
            try:
                await database.check()
            except AWAY:
                await asyncio.sleep(0.2)
            else:
                return


@pytest.mark.system
async def test_a_pooler_without_its_server_is_reported_as_away() -> None:
    with running_postgres() as server, running_pgbouncer(server) as query:
        url = (await asyncio.to_thread(server.make_database)).partition("?")[0] + query
        store = await SqlStore.open(url)
        try:
            server.stop(signal.SIGQUIT)
            assert await asked_until_away(store.database, 5)
            await asyncio.to_thread(server.start)
            await until_checked(store.database)
        finally:
            await store.aclose()


@pytest.mark.system
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
async def test_a_statement_that_the_end_of_the_server_interrupts_is_reported_as_away(
    *, pooled: bool, number: signal.Signals
) -> None:
    with running_postgres() as server, running_pgbouncer(server) as query:
        url = await asyncio.to_thread(server.make_database)
        store = await SqlStore.open(url.partition("?")[0] + query if pooled else url)
        try:

            async def sleep() -> None:
                async with store.database.read() as connection:
                    await connection.execute(text("SELECT pg_sleep(30)"))

            sleeping = asyncio.create_task(sleep())
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.stop, number)
            with pytest.raises(AWAY):
                await sleeping
        finally:
            await store.aclose()


@pytest.mark.parametrize("untested_seconds", [0.0, 3600.0])
async def test_a_path_that_forgets_idle_connections_fails_no_call(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, untested_seconds: float
) -> None:
    """The server has closed nothing. Without the test of idle connections, calls fail."""
    monkeypatch.setattr(postgresql, "UNTESTED_SECONDS", untested_seconds)
    database = (await asyncio.to_thread(postgres.make_database)).split("/")[3].split("?")[0]
    async with forgetful_path(postgres.home / ".s.PGSQL.5432") as path:
        sql = await SqlStore.open(
            f"postgresql://postgres@127.0.0.1:{path.port}/{database}?sslmode=disable"
        )

        async def eight() -> list[object]:
            return await asyncio.gather(
                *(sql.events.cursor(f"s-{n}") for n in range(8)), return_exceptions=True
            )

        assert await eight() == [(0, "")] * 8
        path.forget()
        answers = await eight()
        failed = [one for one in answers if one != (0, "")]
        assert bool(failed) is (untested_seconds > 0), answers
        await sql.aclose()


async def test_a_migration_may_take_longer_than_a_call(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for another process here, in one statement."""
    monkeypatch.setattr(postgresql, "COMMAND_SECONDS", 1.0)
    url = await asyncio.to_thread(postgres.make_database)
    other = await asyncpg.connect(url)
    try:
        await other.execute(f"SELECT pg_advisory_lock({MIGRATE_LOCK})")
        opening = asyncio.create_task(SqlStore.open(url))
        await asyncio.sleep(2.5)
        assert not opening.done()
        await other.execute(f"SELECT pg_advisory_unlock({MIGRATE_LOCK})")
        await (await opening).aclose()
    finally:
        await other.close()


#: ErrorResponse of a pooler whose server connection ended, without ReadyForQuery behind it.
_FIELDS = b"SFATAL\0C08P01\0Mserver login has been failing\0\0"
FATAL = b"E" + (len(_FIELDS) + 4).to_bytes(4, "big") + _FIELDS
#: ReadyForQuery, up to the state of the transaction.
READY = b"Z\x00\x00\x00\x05"
#: More than the responses of a connection's first steps.
FIRST_STEPS_MAX = 12


@asynccontextmanager
async def breaking_off(target: Path, *, after: int) -> AsyncIterator[int]:
    """The port of a path that adds a fatal error to this response of the server, from 0."""
    accepted: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(str(target))

        async def pass_requests() -> None:
            while data := await reader.read(65_536):
                server_writer.write(data)

        async def pass_responses() -> None:
            responses = 0
            while data := await server_reader.read(65_536):
                if data[-len(READY) - 1 : -1] == READY:
                    data += FATAL * (responses == after)
                    responses += 1
                writer.write(data)

        ways = [asyncio.create_task(pass_requests()), asyncio.create_task(pass_responses())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for stream in (server_writer, writer):
            stream.close()
            with suppress(ConnectionError):
                await stream.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.add(asyncio.create_task(connect(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        # The driver has closed its connections.
        async with asyncio.timeout(30):
            await asyncio.gather(*accepted)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("after", range(FIRST_STEPS_MAX))
async def test_an_error_between_the_first_steps_of_a_connection_means_away(
    postgres: PostgresServer, *, after: int, pooled: bool
) -> None:
    """The driver raises errors of a third family then, which are not SQL errors."""
    name = (await asyncio.to_thread(postgres.make_database)).split("/")[3].split("?")[0]
    async with breaking_off(postgres.home / ".s.PGSQL.5432", after=after) as port:
        url = f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable"
        engine = postgresql.make_engine(url, postgresql.Server(pooled=pooled))
        try:
            for _ in range(2):
                try:
                    async with engine.connect() as connection:
                        await connection.execute(text("SELECT 1"))
                except AWAY:
                    continue
        finally:
            await engine.dispose()


@pytest.mark.parametrize("after", range(4))
async def test_an_error_between_the_checks_of_a_server_means_away(
    postgres: PostgresServer, after: int
) -> None:
    name = (await asyncio.to_thread(postgres.make_database)).split("/")[3].split("?")[0]
    async with breaking_off(postgres.home / ".s.PGSQL.5432", after=after) as port:
        url = f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable"
        for _ in range(2):
            try:
                await postgresql.inspect_server(url)
            except OSError:
                continue
