"""Sandbox application: `create_sandbox(config)` returns an ASGI application, for one worker."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog
from litestar import Litestar, Response
from litestar.exceptions import HTTPException

from reservation.sandbox.checkout import checkout_routes
from reservation.sandbox.config import SandboxConfig
from reservation.sandbox.control_api import control_routes
from reservation.sandbox.refusals import Refusal
from reservation.sandbox.requests import AnyRequest
from reservation.sandbox.responses import refused
from reservation.sandbox.state import Sandbox
from reservation.sandbox.toss_api import pg_routes

__all__ = ["create_sandbox"]

log = structlog.get_logger(__name__)

#: Largest body that is read; the PG's own bodies are under 1 kB.
_BODY_BYTES_MAX = 64 * 1024


def create_sandbox(config: SandboxConfig) -> Litestar:
    """The sandbox as an application; its journal is opened when the server starts it.

    Its state is in one process: run it with one worker.
    """
    sandbox = Sandbox(config)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncGenerator[None]:
        async with sandbox.running():
            yield

    return Litestar(
        route_handlers=[
            *pg_routes(sandbox),
            *control_routes(sandbox),
            *checkout_routes(sandbox),
        ],
        lifespan=[lifespan],
        exception_handlers={
            Refusal: _refuse,
            HTTPException: _refuse_request,
            Exception: _fail,
        },
        openapi_config=None,
        logging_config=None,
        request_max_body_size=_BODY_BYTES_MAX,
    )


def _refuse(_: AnyRequest, refusal: Refusal) -> Response[bytes]:
    reply = refused(refusal)
    return Response(reply.body, status_code=reply.status, media_type="application/json")


def _refuse_request(_: AnyRequest, error: HTTPException) -> Response[dict[str, object]]:
    """Litestar's own refusals: an unknown path, a method, a body that does not fit."""
    code = "NOT_FOUND" if error.status_code == 404 else "INVALID_REQUEST"
    content: dict[str, object] = {"code": code, "message": error.detail}
    if error.extra:
        content["details"] = error.extra
    return Response(content, status_code=error.status_code)


def _fail(request: AnyRequest, error: Exception) -> Response[bytes]:
    log.error("sandbox_failed", path=request.url.path, exc_info=error)
    return _refuse(request, Refusal("FAILED_INTERNAL_SYSTEM_PROCESSING"))
