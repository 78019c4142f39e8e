"""Health checks (live and ready) and metrics."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from litestar import Controller, Request, Response, get
from litestar.handlers.base import BaseRouteHandler
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

from api.http import open_files
from api.http.auth.bearer import Connection
from api.http.connection.connections import connections
from api.http.dependencies import api_of, needs, requires_operator
from api.http.exposition import Exposition
from api.http.problem_details import documented, response_spec
from api.http.schemas.base import ResponseModel
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.application.readiness.check import Findings
from reservation.bootstrap import Service
from reservation.domain.errors import (
    Forbidden,
    Unauthenticated,
)
from reservation.domain.operators import Right

__all__ = ["HealthController"]

#: A probe that waits longer than this counts as failed anyway.
CHECK_SECONDS: Final = 2.0


class HealthAnswer(ResponseModel, frozen=True, kw_only=True):
    """Whether the service is ready, and the missing dependencies if not."""

    status: str
    missing: Sequence[str] = ()
    #: Sales that wait for a rebuild, and the data that Redis lacks of each.
    recovering: Mapping[str, str] = {}
    #: Conditions that need attention but leave the service ready.
    warnings: Sequence[str] = ()
    #: Redis settings that cannot be read and that an operator vouches for.
    trusted: Sequence[str] = ()


async def requires_operator_in_production(
    connection: Connection, handler: BaseRouteHandler
) -> None:
    """Guard: open in development and with an internal port; otherwise needs the operator's key."""
    settings = api_of(connection).service.settings
    if settings.production and not settings.internal_port:
        await requires_operator(connection, handler)


class HealthController(Controller):
    """For load balancers and Prometheus."""

    tags = ("Health",)

    @get("/health/live", operation_id="live")
    async def live(self) -> HealthAnswer:
        """The process responds; nothing else is checked."""
        return HealthAnswer(status="ok")

    @get(
        "/health/ready",
        operation_id="ready",
        responses={
            503: response_spec(HealthAnswer, "Not ready; lists the unmet conditions by name.")
        },
    )
    async def ready(self, request: Request[Any, Any, Any]) -> Response[HealthAnswer]:
        """200 if holds can be taken and paid for, else 503 with the missing parts by name."""
        service = api_of(request).service
        found, sql = await asyncio.gather(_redis(service), _sql(service))
        gaps = dict(service.redis_monitor.gaps)
        missing = [*found.missing, *sql, *service.redis_monitor.restore_pending]
        # Redis answers again, and work that waits for it resumes at the monitor's next check.
        away = service.redis_monitor.away
        if away and not any(name.startswith(away) for name in missing):
            missing.append(away)
        if not request.app.state.draining.ready:
            missing.append("draining")
        missing += [
            f"{name}:{sale_id}"
            for sale_id, names in sorted(service.redis_monitor.missing_of.items())
            for name in names
        ]
        missing += [f"sale-recovering:{sale_id}" for sale_id in sorted(gaps)]
        answer = HealthAnswer(
            status="unavailable" if missing else "ok",
            missing=missing,
            recovering=gaps,
            warnings=[*found.warnings, *open_files.warnings(), *connections.warnings()],
            trusted=found.trusted,
        )
        if missing:
            return Response(answer, status_code=503, headers={"Retry-After": "1"})
        return Response(answer)

    @get(
        "/metrics",
        operation_id="metrics",
        media_type="text/plain",
        guards=[requires_operator_in_production],
        opt=needs(Right.READ),
        responses=documented(Unauthenticated, Forbidden),
    )
    async def metrics(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Prometheus' text format, summed over the processes of this host.

        In production it needs an operator's key, unless there is an internal port.
        """
        exposition: Exposition = request.app.state.exposition
        return Response(
            await exposition.text(),
            headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"},
        )


async def _redis(service: Service) -> Findings:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            # The last check would not show that the server has gone since. The comparison with
            # SQL is a separate row.
            await service.connections.unguarded().ping()
            return await service.readiness.recent()
    except (StoreUnavailable, StoreUncertain, TimeoutError):
        return Findings(missing=("redis",))


async def _sql(service: Service) -> list[str]:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await service.sql.database.check()
    except DatabaseUnfit as error:
        return [error.row]
    except (SQLAlchemyError, OSError, TimeoutError):
        return ["sql"]
    return []
