"""The ASGI application: routes, error handlers, OpenAPI and the lifespan."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import structlog
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from api.http.auth.buyers import Buyers
from api.http.auth.client_address import ClientAddressResolver
from api.http.auth.guests import Guests
from api.http.auth.operator_keys import OperatorKeys
from api.http.auth.operators import Operators
from api.http.dependencies import ApiContext
from api.http.draining import Draining
from api.http.exposition import Exposition
from api.http.fastpath.handler import FastPrepareHandler
from api.http.head_requests import HeadResponses
from api.http.middleware import RequestMiddleware
from api.http.ports import PublicPort
from api.http.prepare_endpoint import PrepareEndpoint
from api.http.problem_details import EXCEPTION_HANDLERS
from api.http.routes.admin_events import AdminEventController
from api.http.routes.admin_keys import AdminKeyController
from api.http.routes.admin_order_requests import AdminOrderRequestController
from api.http.routes.admin_orders import AdminOrderController
from api.http.routes.admin_sales import AdminSaleController
from api.http.routes.admin_webhooks import AdminWebhookController
from api.http.routes.guests import GuestController
from api.http.routes.health import HealthController
from api.http.routes.pages import PageController, requires_document, static_routers
from api.http.routes.payments import PaymentController
from api.http.routes.reservations import ReservationController
from api.http.routes.sales import SaleController, StockFeed
from api.http.shutdown_responses import ShutdownResponses
from api.http.strict_json import StrictRequest
from reservation import __version__
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.rate_limit import Limiter

__all__ = ["context_of", "create_app"]

log = structlog.get_logger(__name__)

#: No valid request is larger: 20 lines and a name are under 3 kB.
BODY_BYTES_MAX: Final = 16 * 1024
#: How long a browser may cache a CORS preflight.
CORS_SECONDS: Final = 7_200
#: Interval between measurements of the offset to Redis' clock.
CLOCK_SECONDS: Final = 5.0

_CONTROLLERS: Final = (
    ReservationController,
    SaleController,
    PaymentController,
    AdminSaleController,
    AdminOrderController,
    AdminOrderRequestController,
    AdminKeyController,
    AdminEventController,
    AdminWebhookController,
    HealthController,
    GuestController,
    PageController,
)


def create_app(settings: Settings) -> Litestar:
    """The ASGI application for these settings; it connects at start-up."""
    cors = _cors(settings)

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        async with opened(settings, sql_may_be_away=True) as service:
            app.state.api = api = context_of(settings, service)
            app.state.prepare_endpoint = endpoint = PrepareEndpoint(api)
            app.state.prepare_path = (
                FastPrepareHandler(endpoint, cors) if settings.fast_path else None
            )
            app.state.stock_feed = feed = StockFeed(api)

            def stop_streams() -> None:
                feed.stop()
                service.queries.stop_waiting()
                service.events.feed.stop_waiting()
                service.confirmation.stop_waiting()

            app.state.stop_streams = stop_streams
            service.connections.guard()
            # Before the first request: the first buyers would otherwise get 503.
            await service.redis_monitor.check_redis()
            tasks = [
                asyncio.create_task(_measure_clock(service)),
                asyncio.create_task(service.redis_monitor.run()),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    app = Litestar(
        route_handlers=[*_CONTROLLERS, *static_routers()],
        lifespan=[lifespan],
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=StrictRequest,
        request_max_body_size=BODY_BYTES_MAX,
        cors_config=cors,
        openapi_config=_openapi(),
        logging_config=None,
    )
    app.state.draining = draining = Draining()
    app.state.exposition = Exposition()
    # Outermost, so that refusals of the framework (an unknown path) are observed too.
    answering = ShutdownResponses(HeadResponses(app.asgi_handler), draining)
    app.asgi_handler = RequestMiddleware(answering, draining, cors=cors is not None)
    if settings.internal_port:
        app.asgi_handler = PublicPort(app.asgi_handler, internal_port=settings.internal_port)
    return app


def context_of(settings: Settings, service: Service) -> ApiContext:
    """The context that the endpoints share, around a connected service."""
    buyers, peers = Buyers(settings), ClientAddressResolver(settings)
    return ApiContext(
        service=service,
        buyers=buyers,
        guests=Guests(settings),
        operators=Operators(
            settings, buyers, peers, OperatorKeys(service.sql.operator_keys, clock=service.clock)
        ),
        peers=peers,
        prepares=Limiter(settings.prepare_rate) if settings.prepare_rate else None,
        replays=Limiter(settings.prepare_rate) if settings.prepare_rate else None,
    )


async def _measure_clock(service: Service) -> None:
    """Keep the offset to Redis' clock fresh, and write this process's heartbeat to Redis."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    heartbeat = Heartbeat(service.connections, service.keys, name=name, role="api")
    logged = ""
    while True:
        reason = ""
        try:
            await service.connections.unguarded().measure_offset()
            await heartbeat.beat()
        except (StoreUnavailable, StoreUncertain) as error:
            reason = str(error)
            if reason != logged:
                log.info("clock_measurement_failed", reason=reason)
        logged = reason
        await asyncio.sleep(CLOCK_SECONDS)


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=[
            "Authorization",
            "Idempotency-Key",
            "X-Reservation-Token",
            "X-Sale-Admission",
            "Content-Type",
        ],
        expose_headers=["Idempotent-Replayed", "Retry-After", "X-Request-Id"],
        max_age=CORS_SECONDS,
    )


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Stock reservation",
        version=__version__,
        description="Holds stock for flash sales while buyers pay. Refusals follow RFC 9457.",
        openapi_router=Router(
            "/schema", route_handlers=[], guards=[requires_document], include_in_schema=False
        ),
        # The handler's docstring is the only description of an operation.
        use_handler_docstrings=True,
        render_plugins=[JsonRenderPlugin()],
        components=Components(
            security_schemes={
                "buyer": SecurityScheme(type="http", scheme="bearer", bearer_format="JWT"),
                "reservationToken": SecurityScheme(
                    type="apiKey", name="X-Reservation-Token", security_scheme_in="header"
                ),
                "operatorKey": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
    )
