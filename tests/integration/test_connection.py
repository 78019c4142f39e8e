"""Connections to Redis: what a call that breaks off leaves behind, and a server that is mute."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from reservation.redis import connection
from reservation.redis.connection import (
    Connections,
    StoreUnavailable,
    StoreUncertain,
    UnexpectedReply,
)
from tests.fixtures.lua_sale import NOW

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def connections(valkey_url: str) -> AsyncIterator[Connections]:
    made = Connections(valkey_url, clock=NOW)
    yield made
    await made.aclose()


def suspends(work: Coroutine[Any, Any, Any]) -> bool:
    """Whether it gives way before it is done."""
    try:
        work.send(None)
    except StopIteration:
        return False
    work.close()
    return True


async def test_a_connection_goes_back_without_giving_way(connections: Connections) -> None:
    # Where it gave way, a cancellation could come in between and a connection would be lost.
    for clean in (True, False):
        taken = await connections._take()
        assert not suspends(connections._give_back(taken, clean=clean))


async def test_a_call_that_is_cancelled_leaves_its_reply_to_nobody(
    connections: Connections,
) -> None:
    waiting = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "0.2"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await connections.command("ECHO", "mine") == "mine"
    await asyncio.sleep(0.3)
    assert await connections.command("ECHO", "mine too") == "mine too"


async def test_a_reply_that_does_not_come_leaves_the_outcome_open(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await connections.command("PING") == "PONG"
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(StoreUncertain):
        await connections.command("BLPOP", "nothing-comes", 5)
    monkeypatch.undo()
    assert await connections.command("ECHO", "mine") == "mine"


async def test_a_timer_that_is_set_already_makes_no_reply_late(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.3)
    # One timer looks after all of these, and is due in the midst of the second.
    await connections.command("BLPOP", "nothing-comes", "0.2")
    assert await connections.command("BLPOP", "nothing-comes", "0.2") is None
    with pytest.raises(StoreUncertain):
        await connections.command("BLPOP", "nothing-comes", "5")


async def test_a_connection_that_ended_while_nobody_used_it_is_not_used_again(
    connections: Connections,
) -> None:
    first, second = await connections._take(), await connections._take()
    for taken in (first, second):
        await connections._give_back(taken, clean=True)
    # Over the second, which was given back last; it ends itself too.
    await connections.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine") == "mine"
    assert connections._wires == set(connections._idle)
    assert {first, second}.isdisjoint(connections._wires)


async def test_a_connection_that_ends_under_a_call_leaves_its_outcome_open(
    connections: Connections,
) -> None:
    waiting = asyncio.create_task(connections.command("BLPOP", "nothing-comes", "5"))
    await asyncio.sleep(0.05)
    await connections.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(StoreUncertain):
        await waiting


async def test_what_comes_unasked_is_nobodys_reply(connections: Connections) -> None:
    taken = await connections._take()
    # Two replies, of which the first is waited for.
    two = b"ECHO mine\r\nECHO nobodys\r\n"
    assert await taken.exchange(two, 1, seconds=1) == ["mine"]
    await connections._give_back(taken, clean=True)
    await asyncio.sleep(0.05)
    assert await connections.command("ECHO", "mine too") == "mine too"
    assert taken not in connections._wires


async def test_an_error_reply_stands_among_the_others(connections: Connections) -> None:
    await connections.command("SET", "text", "no list")
    one, broken, two = await connections.pipeline(
        [("ECHO", "one"), ("LPUSH", "text", "x"), ("ECHO", "two")]
    )
    assert (one, two) == ("one", "two")
    assert isinstance(broken, UnexpectedReply)
    assert await connections.pipeline([]) == []


async def test_more_calls_at_once_than_connections_are_refused_unsent(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS_MAX", 2)
    waiting = [
        asyncio.create_task(connections.command("BLPOP", "nothing-comes", "0.2")) for _ in range(2)
    ]
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await connections.command("PING")
    await asyncio.gather(*waiting)
    assert await connections.command("PING") == "PONG"


Replies = dict[bytes, bytes]
GREETED: Replies = {b"CLIENT": b"+OK\r\n", b"INFO": b"+run_id:x\r\n"}


@asynccontextmanager
async def connected_to(replies: Replies, folder: Path) -> AsyncIterator[Connections]:
    """Connections to a server that answers each of these words, and nothing else."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            while line := await reader.readline():
                writer.write(replies.get(line.strip(), b""))
        writer.close()

    server = await asyncio.start_unix_server(answer, folder / "socket")
    connections = Connections(f"unix://{folder / 'socket'}", clock=NOW)
    yield connections
    await connections.aclose()
    server.close()
    await server.wait_closed()


async def test_what_is_no_reply_ends_the_connection(tmp_path: Path) -> None:
    babble = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    async with connected_to({**GREETED, b"PING": babble}, tmp_path) as connections:
        with pytest.raises(StoreUncertain):
            await connections.command("PING")
        assert not connections._wires


async def test_a_server_that_says_more_than_was_asked_is_not_talked_to(tmp_path: Path) -> None:
    more = {**GREETED, b"INFO": b"+run_id:x\r\n+PONG\r\n"}
    async with connected_to(more, tmp_path) as connections:
        with pytest.raises(StoreUnavailable):
            await connections.command("PING")
        assert not connections._wires


async def mute_server(kind: str, folder: Path, mute: Answering) -> tuple[asyncio.Server, str]:
    """A server that takes what it is sent and answers nothing, and its URL."""
    if kind == "unix":
        return await asyncio.start_unix_server(mute, folder / "mute"), f"unix://{folder / 'mute'}"
    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    return server, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_server_that_never_greets_is_not_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.2)
    over = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    server, url = await mute_server(kind, tmp_path, mute)
    connections = Connections(url, clock=NOW)
    # Twice: a connection that was given up half-way must not be taken for a good one.
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await connections.command("PING")
    over.set()
    await connections.aclose()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_call_goes_over_tls(
    run: Callable[[Coroutine[Any, Any, None]], None], valkey_url: str, tmp_path: Path
) -> None:
    """As to a managed Redis; what ends TLS here hands on to the real server."""
    certificate = write_certificate(tmp_path)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def talk() -> None:
        ended = asyncio.Event()

        async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            path = valkey_url.removeprefix("unix://").partition("?")[0]
            behind_reader, behind_writer = await asyncio.open_unix_connection(path)
            await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))
            ended.set()

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server = await asyncio.start_server(end, "localhost", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}"
        connections = Connections(url, clock=NOW)
        long = "x" * 1_000_000
        assert await connections.command("ECHO", long) == long
        assert await connections.command("ECHO", "mine") == "mine"
        assert len(connections._wires) == 1
        await connections.aclose()
        await ended.wait()
        server.close()
        await server.wait_closed()

    run(talk())


def write_certificate(folder: Path) -> Path:
    """A key and a certificate for localhost that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "localhost.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file
