"""Connections to Redis: what a call that breaks off leaves behind, and a server that is mute."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from reservation.redis import connection
from reservation.redis.connection import Connections, StoreUnavailable, StoreUncertain
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
    pool = connections._pool
    taken = await pool.get_connection()
    assert not suspends(taken.disconnect(nowait=True))
    assert not suspends(pool.release(taken))


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
