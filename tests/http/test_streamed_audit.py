"""Audits that take long keep their connection alive and report how they ended."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from litestar import Litestar, get

from api.http.routes import streamed_audit
from api.http.routes.streamed_audit import audit_answer
from api.http.schemas.sales import AuditAnswer
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.application.audit.audit import AuditReport

WHOLE = AuditReport(ok=True, checked_at_ms=1_000, lag=0, skus=(), problems=())


@asynccontextmanager
async def serving(audit: Callable[[], Awaitable[AuditReport]]) -> AsyncIterator[str]:
    """A server with this audit; its URL."""

    @get("/")
    async def handler() -> AuditAnswer:
        async def work() -> AuditReport:
            return await audit()

        return await audit_answer(work(), now_ms=1_000)

    listening = socket.create_server(("127.0.0.1", 0))
    app = Litestar([handler], openapi_config=None, logging_config=None)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        await task


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_audit, "SILENT_SECONDS_MAX", 0.05)


async def test_a_long_audit_sends_white_space_before_its_report() -> None:
    ended = asyncio.Event()

    async def audit() -> AuditReport:
        await ended.wait()
        return WHOLE

    async with serving(audit) as url, httpx.AsyncClient(trust_env=False) as client:
        pieces: list[bytes] = []
        async with client.stream("GET", url) as answer:
            assert answer.headers["content-type"] == "application/json"
            async for piece in answer.aiter_raw():
                pieces.append(piece)
                if len(pieces) == 3:
                    ended.set()
    assert set(pieces[:3]) == {b"\n"}
    assert json.loads(b"".join(pieces))["ok"] is True


async def test_a_short_audit_is_a_plain_response() -> None:
    async def audit() -> AuditReport:
        return WHOLE

    async with serving(audit) as url, httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(url)
    assert answer.content.startswith(b"{")
    assert answer.headers["content-length"] == str(len(answer.content))


async def test_an_interrupted_audit_is_not_a_clean_report() -> None:
    async def audit() -> AuditReport:
        await asyncio.sleep(0.2)
        raise StoreUnavailable("no connection")

    async with serving(audit) as url, httpx.AsyncClient(trust_env=False) as client:
        report = (await client.get(url)).json()
    assert report["ok"] is False
    assert report["problems"] == ["the audit failed: no connection"]


async def test_an_audit_stops_when_its_client_disconnects() -> None:
    cancelled = asyncio.Event()

    async def audit() -> AuditReport:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return WHOLE

    async with serving(audit) as url, httpx.AsyncClient(trust_env=False) as client:
        async with client.stream("GET", url) as answer:
            assert await anext(answer.aiter_raw()) == b"\n"
        async with asyncio.timeout(30):
            await cancelled.wait()
