"""Problem documents for errors outside the domain."""

from typing import Any

import httpx
import pytest
from litestar import Litestar, get
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.testing import capture_logs

from api.http.problem_details import EXCEPTION_HANDLERS
from reservation.adapters.redis.errors import StoreUnavailable

_SECRET = "the-payment's-key"


async def _answer_to(error: Exception) -> httpx.Response:
    @get("/")
    async def fails() -> None:
        raise error

    # The framework's own logging would replace the root logger's handlers for all later tests.
    app: Any = Litestar(
        [fails], exception_handlers=EXCEPTION_HANDLERS, openapi_config=None, logging_config=None
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        return await client.get("/")


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {"key": _SECRET}, OSError("away")),
        InterfaceError("SELECT", {"key": _SECRET}, OSError("connection is closed")),
        PoolTimeout("all connections are taken"),
    ],
)
async def test_unavailable_sql_is_reported_as_unavailable(error: Exception) -> None:
    with capture_logs() as lines:
        answer = await _answer_to(error)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert [line["event"] for line in lines] == ["sql_unavailable"]
    assert _SECRET not in str(lines)


async def test_unreachable_redis_is_reported_as_unavailable() -> None:
    with capture_logs() as lines:
        answer = await _answer_to(StoreUnavailable("connection refused"))
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert [line["event"] for line in lines] == ["redis_unavailable"]


async def test_a_statement_refused_by_sql_is_an_internal_error() -> None:
    answer = await _answer_to(IntegrityError("INSERT", {}, ValueError("a key twice")))
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
