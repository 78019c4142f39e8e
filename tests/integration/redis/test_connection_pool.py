"""The Redis connection pool: cancelled calls, broken connections, and a server that hangs."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from reservation.adapters.redis import client as connection
from reservation.adapters.redis import connection_pool as pool
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain, UnexpectedReply
from tests.support.certificates import write_certificate
from tests.support.lua_sale import NOW

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


#: The service runs on uvloop, whose transports close in other steps.
pytestmark = pytest.mark.both_loops


@pytest.fixture
async def connections(valkey_url: str) -> AsyncIterator[RedisClient]:
    made = RedisClient(valkey_url, clock=NOW)
    yield made
    await made.aclose()


async def test_the_reply_of_a_cancelled_call_reaches_no_other_call(
    connections: RedisClient,
) -> None:
    waiting = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "0.2"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await connections.command("ECHO", "mine") == "mine"
    await asyncio.sleep(0.3)
    assert await connections.command("ECHO", "mine too") == "mine too"


async def test_a_missing_reply_leaves_the_outcome_unknown(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await connections.command("PING") == "PONG"
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(StoreUncertain):
        await connections.command("BLPOP", "nothing-comes", 5)
    monkeypatch.undo()
    assert await connections.command("ECHO", "mine") == "mine"


async def test_an_earlier_timer_does_not_time_out_a_reply(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 2.5)
    # One timer serves all of these calls, and is due during the second.
    await connections.command("BLPOP", "nothing-comes", "1.4")
    assert await connections.command("BLPOP", "nothing-comes", "1.4") is None
    async with asyncio.timeout(7):
        with pytest.raises(StoreUncertain):
            await connections.command("BLPOP", "nothing-comes", "9")


async def killed(connections: RedisClient) -> None:
    """The server ends all connections; it answers this call before it ends its own."""
    await connections.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")


async def test_a_connection_closed_while_idle_is_not_reused(
    connections: RedisClient,
) -> None:
    first, second = await connections._pool.take(), await connections._pool.take()
    for taken in (first, second):
        connections._pool.give_back(taken, clean=True)
    await killed(connections)
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine") == "mine"
    assert connections._pool._wires == set(connections._pool._idle)
    assert {first, second}.isdisjoint(connections._pool._wires)


async def test_a_connection_near_its_end_is_not_reused(
    connections: RedisClient,
) -> None:
    taken = await connections._pool.take()
    # The end of the stream, before the end of the connection.
    taken.eof_received()
    assert not taken.usable
    connections._pool.give_back(taken, clean=True)
    assert await connections.command("ECHO", "mine") == "mine"
    assert taken not in connections._pool._wires
    # Likewise if the transport has noticed and the protocol has not.
    taken = await connections._pool.take()
    taken._transport.abort()
    assert not taken.usable
    connections._pool.give_back(taken, clean=True)
    assert await connections.command("ECHO", "mine") == "mine"


async def test_a_connection_lost_during_a_call_leaves_its_outcome_unknown(
    connections: RedisClient,
) -> None:
    waiting = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "9"))
    await asyncio.sleep(0.05)
    await connections.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    # At once, without waiting for the call's time-out.
    async with asyncio.timeout(2.5):
        with pytest.raises(StoreUncertain):
            await waiting


async def test_an_unsolicited_reply_reaches_no_caller(connections: RedisClient) -> None:
    taken = await connections._pool.take()
    # Two replies; the caller waits for the first.
    assert await taken.exchange(b"ECHO mine\r\nECHO nobodys\r\n", 1, seconds=1) == ["mine"]
    connections._pool.give_back(taken, clean=True)
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine too") == "mine too"
    assert taken not in connections._pool._wires
    # One reply without a waiting caller.
    taken = connections._pool._idle[0]
    taken._transport.write(b"ECHO nobodys\r\n")
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine again") == "mine again"
    assert taken not in connections._pool._wires


async def test_a_connection_has_one_exchange_at_a_time(connections: RedisClient) -> None:
    taken = await connections._pool.take()
    waiting = taken.exchange(b"PING\r\n", 1, seconds=1)
    assert not taken.usable
    with pytest.raises(RuntimeError):
        taken.exchange(b"PING\r\n", 1, seconds=1)
    assert await waiting == ["PONG"]
    connections._pool.give_back(taken, clean=True)


async def test_an_error_reply_keeps_its_place_in_the_pipeline(connections: RedisClient) -> None:
    await connections.command("SET", "text", "no list")
    one, broken, two = await connections.pipeline(
        [("ECHO", "one"), ("LPUSH", "text", "x"), ("ECHO", "two")]
    )
    assert (one, two) == ("one", "two")
    assert isinstance(broken, UnexpectedReply)
    assert await connections.pipeline([]) == []


async def test_calls_beyond_the_connections_wait_in_order(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CONNECTIONS_MAX", 1)
    done: list[str] = []

    async def call(name: str) -> None:
        assert await connections.command("ECHO", name) == name
        done.append(name)

    busy = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "0.4"))
    await asyncio.sleep(0.1)
    names = [f"call {number}" for number in range(50)]
    await asyncio.gather(busy, *map(call, names))
    assert done == names
    assert len(connections._pool._wires) == 1


async def test_a_call_without_a_free_connection_is_not_sent(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CONNECTIONS_MAX", 1)
    # The connection is open before the wait for it is short.
    assert await connections.command("PING") == "PONG"
    monkeypatch.setattr(pool, "WAIT_SECONDS_MAX", 0.1)
    busy = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "1.5"))
    await asyncio.sleep(0.05)
    with pytest.raises(StoreUnavailable, match="free connection"):
        await connections.command("PING")
    await busy
    assert await connections.command("ECHO", "mine") == "mine"


async def test_calls_beyond_the_wait_limit_are_refused_unsent(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "WAITING_MAX", 2)
    found = await asyncio.gather(
        *(connections.command("ECHO", str(number)) for number in range(5)), return_exceptions=True
    )
    assert found[:2] == ["0", "1"]
    assert all(isinstance(one, StoreUnavailable) for one in found[2:])


async def test_a_caller_cancelled_while_waiting_costs_no_connection(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CONNECTIONS_MAX", 1)
    only = await connections._pool.take()
    waiting = [asyncio.create_task(connections.command("PING")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    # The second caller has received the connection, and has not run since.
    connections._pool.give_back(only, clean=True)
    waiting[1].cancel()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in found[:2]] == [asyncio.CancelledError] * 2
    assert found[2] == "PONG"
    assert connections._pool._wires == {only} == set(connections._pool._idle)


async def test_a_thousand_concurrent_calls_are_answered(
    connections: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last call waits for all others, on a busy machine for longer than a buyer would.
    monkeypatch.setattr(pool, "WAIT_SECONDS_MAX", 30.0)
    found = await asyncio.gather(
        *(connections.command("ECHO", str(number)) for number in range(1_000))
    )
    assert found == [str(number) for number in range(1_000)]
    assert len(connections._pool._wires) <= pool.CONNECTIONS_MAX


async def test_calls_waiting_for_an_unreachable_server_fail_at_once(
    tmp_path: Path,
) -> None:
    away = RedisClient(f"unix://{tmp_path / 'none.sock'}", clock=NOW)
    async with asyncio.timeout(30):
        found = await asyncio.gather(
            *(away.command("PING") for _ in range(500)), return_exceptions=True
        )
    # The cause is not the time-out.
    assert {type(one) for one in found} == {StoreUnavailable}
    assert all("none.sock" in str(one) for one in found)
    await away.aclose()


async def test_a_closed_client_opens_no_connection(connections: RedisClient) -> None:
    waiting = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "9"))
    opening = asyncio.create_task(connections.command("PING"))
    await asyncio.sleep(0)
    await connections.aclose()
    async with asyncio.timeout(30):
        for call in (waiting, opening):
            with pytest.raises((StoreUncertain, StoreUnavailable)):
                await call
    with pytest.raises(StoreUnavailable):
        await connections.command("PING")
    assert not connections._pool._wires


async def test_the_url_cannot_choose_the_protocol(valkey_url: str) -> None:
    """With RESP3 a server may push messages that were not requested."""
    mark = "&" if "?" in valkey_url else "?"
    connections = RedisClient(f"{valkey_url}{mark}protocol=3", clock=NOW)
    hello = await connections.command("HELLO")
    assert hello[hello.index("proto") + 1] == 2
    await connections.aclose()


Replies = dict[bytes, bytes]
GREETED: Replies = {b"CLIENT": b"+OK\r\n", b"INFO": b"+run_id:x\r\n"}


@asynccontextmanager
async def connected_to(replies: Replies, folder: Path) -> AsyncIterator[RedisClient]:
    """RedisClient to a server that answers each of these words, and nothing else."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            while line := await reader.readline():
                writer.write(replies.get(line.strip(), b""))
        writer.close()

    server = await asyncio.start_unix_server(answer, folder / "socket")
    connections = RedisClient(f"unix://{folder / 'socket'}", clock=NOW)
    try:
        yield connections
    finally:
        await connections.aclose()
        server.close()
        await server.wait_closed()


async def test_invalid_reply_bytes_close_the_connection(tmp_path: Path) -> None:
    babble = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    async with connected_to({**GREETED, b"PING": babble}, tmp_path) as connections:
        with pytest.raises(StoreUncertain) as failure:
            await connections.command("PING")
        assert "not a reply" in str(failure.value.__cause__)
        assert not connections._pool._wires


async def test_an_unreadable_greeting_fails_the_connection(tmp_path: Path) -> None:
    strange = b"+executable:\xff\r\n"
    async with connected_to(
        {**GREETED, b"INFO": strange, b"PING": b"+PONG\r\n"}, tmp_path
    ) as found:
        assert await found.command("PING") == "PONG"
    (tmp_path / "socket").unlink(missing_ok=True)
    async with connected_to({**GREETED, b"INFO": b"HTTP/1.1 400\r\n"}, tmp_path) as found:
        with pytest.raises(StoreUnavailable):
            await found.command("PING")


async def test_a_server_sending_unsolicited_data_is_disconnected(tmp_path: Path) -> None:
    more = {**GREETED, b"INFO": b"+run_id:x\r\n+PONG\r\n"}
    async with connected_to(more, tmp_path) as connections:
        with pytest.raises(StoreUnavailable):
            await connections.command("PING")
        assert not connections._pool._wires


async def mute_server(kind: str, folder: Path, mute: Answering) -> tuple[asyncio.Server, str]:
    """A server that reads its input and never answers, and its URL."""
    if kind == "unix":
        return await asyncio.start_unix_server(mute, folder / "mute"), f"unix://{folder / 'mute'}"
    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    return server, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_silent_greeting_times_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "OPEN_SECONDS_MAX", 0.2)
    over = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    server, url = await mute_server(kind, tmp_path, mute)
    connections = RedisClient(url, clock=NOW)
    # Twice: a connection abandoned half-way must not be reused as a good one.
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await connections.command("PING")
    over.set()
    await connections.aclose()
    server.close()
    await server.wait_closed()


async def test_calls_work_over_tls(valkey_url: str, tmp_path: Path) -> None:
    """As to a managed Redis; a TLS proxy forwards to the real server."""
    certificate = write_certificate(tmp_path)
    path = valkey_url.removeprefix("unix://").partition("?")[0]
    under_way = set[asyncio.Task[None]]()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_unix_connection(path)
        for way in (pump(reader, behind_writer), pump(behind_reader, writer)):
            under_way.add(asyncio.create_task(way))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(end, "localhost", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    connections = RedisClient(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}", clock=NOW)
    long = "x" * 1_000_000
    assert await connections.command("ECHO", long) == long
    assert await connections.command("ECHO", "mine") == "mine"
    [wire] = connections._pool._wires
    await killed(connections)
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine still") == "mine still"
    assert wire not in connections._pool._wires
    await connections.aclose()
    await asyncio.gather(*under_way)
    server.close()
    await server.wait_closed()
