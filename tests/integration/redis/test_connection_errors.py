"""Redis connection errors: the address and the cause, for the operator's log."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reservation.adapters.redis import connection_pool as pool
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.domain.clock import SystemClock
from tests.support.certificates import write_certificate
from tests.support.service import free_port


async def cause_of(url: str) -> str:
    connections = RedisClient(url, clock=SystemClock())
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await connections.command("PING")
    finally:
        await connections.aclose()
    return str(caught.value)


@asynccontextmanager
async def listening(context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that accepts connections and never answers; its port."""

    async def keep(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            writer.close()

    server = await asyncio.start_server(keep, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def own_authority(folder: Path) -> ssl.SSLContext:
    """A certificate whose authority this machine does not trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(write_certificate(folder))
    return context


async def test_a_refused_port_is_reported() -> None:
    port = free_port()
    cause = await cause_of(f"redis://:hunter2@127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in cause
    assert "refused" in cause
    assert "hunter2" not in cause


async def test_an_unresolvable_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    # The machine's resolver may query a network for seconds.
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    cause = await cause_of("redis://no-such-host.invalid:6379")
    assert "no-such-host.invalid:6379" in cause
    assert "Name or service not known" in cause


async def test_a_certificate_of_an_unknown_authority_is_reported(tmp_path: Path) -> None:
    async with listening(own_authority(tmp_path)) as port:
        cause = await cause_of(f"rediss://localhost:{port}")
    assert f"localhost:{port}" in cause
    assert "certificate verify failed" in cause


async def test_a_silent_server_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "OPEN_SECONDS_MAX", 0.2)
    async with listening() as port:
        cause = await cause_of(f"redis://127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in cause
    assert "no answer within 0.2 s" in cause
