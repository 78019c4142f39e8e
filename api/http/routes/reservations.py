"""The buyer's endpoints for reservations: prepare, read, long-poll, release."""

from typing import Annotated, Any, Final

from litestar import Controller, MediaType, Request, Response, get, post
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter

from api.http.auth.bearer import Connection, bearer_of
from api.http.dependencies import PRIVATE, api_of, buyer_of, known_sale, requires_buyer
from api.http.prepare_endpoint import (
    CREATED,
    HELD_HEADERS,
    OPERATION,
    REPLAYED_HEADERS,
    PrepareCall,
    PrepareEndpoint,
)
from api.http.problem_details import documented, response_spec
from api.http.query_parameters import requires_known_query
from api.http.schemas.reservations import PrepareRequest, ReservationAnswer, ReservationsAnswer
from reservation.domain.errors import (
    AlreadyConfirmed,
    AmountMismatch,
    BuyerLimitExceeded,
    HoldLost,
    IdempotencyKeyReused,
    InvalidAdmission,
    MalformedRequest,
    OutcomeUnknown,
    PaymentInProgress,
    RateLimited,
    ReservationNotFound,
    SaleClosed,
    SaleNotFound,
    SaleNotOpen,
    SalePaused,
    SaleRecovering,
    SkuNotFound,
    SoldOut,
    TooManyOrders,
    Unauthenticated,
    Unavailable,
)
from reservation.domain.ids import IDEMPOTENCY_KEY
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Purpose

__all__ = ["ReservationController", "sale_exists"]

#: The longest long poll: under the 30 s time-out of common proxies.
WAIT_SECONDS_MAX: Final = 25
#: Key of the admitted call in the request's state.
_CALL: Final = "prepare_call"

#: Security requirements in the OpenAPI document.
BUYER: Final[list[dict[str, list[str]]]] = [{"buyer": []}]
BUYER_OR_TOKEN: Final[list[dict[str, list[str]]]] = [*BUYER, {"reservationToken": []}]

IdempotencyKey = Annotated[
    str,
    HeaderParameter(
        name="Idempotency-Key",
        pattern=IDEMPOTENCY_KEY,
        description="Identifies the request: a repeat with the same key and body returns the "
        "same order.",
    ),
]


async def sale_exists(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: a known sale, or 404; it runs before the body is read."""
    await known_sale(api_of(connection), connection.path_params["sale_id"])


async def admits_prepare(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: the checks of a prepare in their order, before the framework reads its parameters."""
    # The first of several headers of one name counts, as for the framework.
    fields = dict(reversed(list(connection.scope["headers"])))
    receive = connection.body if isinstance(connection, Request) else None
    call = PrepareCall(connection.path_params["sale_id"], fields, None, receive=receive)
    await endpoint_of(connection).admit(call)
    connection.state[_CALL] = call


def endpoint_of(connection: Connection | Request[Any, Any, Any]) -> PrepareEndpoint:
    """The endpoint that this route shares with the fast path."""
    return connection.app.state.prepare_endpoint


class ReservationController(Controller):
    """The buyer's reservations."""

    path = "/v1"
    tags = ("Reservations",)

    @post(
        "/sales/{sale_id:str}/reservations",
        operation_id=OPERATION,
        guards=[admits_prepare],
        security=BUYER,
        responses=documented(
            MalformedRequest,
            Unauthenticated,
            InvalidAdmission,
            SaleNotOpen,
            SaleNotFound,
            SkuNotFound,
            SoldOut,
            BuyerLimitExceeded,
            AmountMismatch,
            SaleClosed,
            IdempotencyKeyReused,
            RateLimited,
            TooManyOrders,
            SalePaused,
            SaleRecovering,
            Unavailable,
            OutcomeUnknown,
        ),
    )
    async def prepare(
        self,
        request: Request[Any, Any, Any],
        sale_id: FromPath[str],  # noqa: ARG002 - this one and those below: for OpenAPI
        data: JSONBody[PrepareRequest],  # noqa: ARG002 - `admits_prepare` has read it
        idempotency_key: IdempotencyKey,  # noqa: ARG002
        admission: Annotated[  # noqa: ARG002
            str | None, HeaderParameter(name="X-Sale-Admission")
        ] = None,
    ) -> Response[ReservationAnswer]:
        """Hold the basket's stock until the deadline; a repeat of the key gets the same order."""
        endpoint = endpoint_of(request)
        prepared = await endpoint.prepare(request.state[_CALL])
        content: Any = endpoint.content(prepared)
        return Response(
            content,
            status_code=CREATED,
            headers=REPLAYED_HEADERS if prepared.replayed else HELD_HEADERS,
            media_type=MediaType.JSON,
        )

    @get(
        "/sales/{sale_id:str}/reservations",
        operation_id="listReservations",
        guards=[requires_buyer, sale_exists, requires_known_query],
        security=BUYER,
        responses=documented(
            MalformedRequest, Unauthenticated, SaleNotFound, SaleRecovering, Unavailable
        ),
    )
    async def list_own(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str]
    ) -> Response[ReservationsAnswer]:
        """The buyer's own reservations in this sale, newest first."""
        api = api_of(request)
        orders = await api.service.queries.all_of_buyer(sale_id, buyer_of(request))
        shown = [await api.shown_to_buyer(order) for order in orders]
        return Response(ReservationsAnswer(reservations=shown), headers=PRIVATE)

    @get(
        "/reservations/{order_id:str}",
        operation_id="getReservation",
        security=BUYER_OR_TOKEN,
        responses=documented(
            MalformedRequest, Unauthenticated, ReservationNotFound, HoldLost, Unavailable
        ),
    )
    async def get_reservation(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        wait: Annotated[
            int | None,
            QueryParameter(
                ge=0,
                le=WAIT_SECONDS_MAX,
                description="Long poll: seconds to wait for the next change before responding.",
            ),
        ] = None,
        reservation_token: Annotated[
            str | None, HeaderParameter(name="X-Reservation-Token")
        ] = None,
    ) -> Response[ReservationAnswer]:
        """One reservation, for its buyer or the holder of its token."""
        api = api_of(request)
        order, own = await _find(
            request, order_id, reservation_token, Purpose.RESERVATION, Purpose.READ
        )
        if wait:
            order = await api.service.queries.next_change(order, float(wait))
        order = await api.service.queries.acknowledged(order)
        answer = await (api.shown_to_buyer if own else api.shown_to_holder)(order)
        return Response(answer, headers=PRIVATE)

    @post(
        "/reservations/{order_id:str}/release",
        operation_id="releaseReservation",
        status_code=200,
        security=BUYER_OR_TOKEN,
        responses={
            202: response_spec(
                ReservationAnswer, "The deposit account is being cancelled at the payment provider."
            ),
            **documented(
                MalformedRequest,
                Unauthenticated,
                ReservationNotFound,
                PaymentInProgress,
                AlreadyConfirmed,
                HoldLost,
                SaleRecovering,
                Unavailable,
            ),
        },
    )
    async def release(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        reservation_token: Annotated[
            str | None, HeaderParameter(name="X-Reservation-Token")
        ] = None,
    ) -> Response[ReservationAnswer]:
        """Release the hold. The token may also be the whole body, as a beacon sends it.

        An order that awaits its deposit gets 202: the account is cancelled at the payment provider,
        then the order is RELEASED, or CONFIRMED if the deposit came first. A beacon never cancels
        an account (409): a page that is left may be older than the payment.
        """
        api = api_of(request)
        beacon = None if reservation_token else await _token_in_body(request)
        token = reservation_token or beacon
        order, _ = await _find(request, order_id, token, Purpose.RESERVATION)
        if order.status is Status.AWAITING_DEPOSIT and beacon is None:
            await api.service.requests.release(order)
            return Response(api.shown(order), status_code=202, headers=PRIVATE)
        released = await api.service.releases.release(order, reason=Reason(Cause.BUYER))
        return Response(api.shown(released), headers=PRIVATE)


async def _find(
    request: Request[Any, Any, Any], order_id: str, token: str | None, *purposes: Purpose
) -> tuple[Reservation, bool]:
    """The reservation, and whether the caller is its own buyer."""
    api = api_of(request)
    if token is not None:
        claims = api.token_claims(token, order_id, *purposes)
        return await api.service.queries.of_token(claims), False
    if bearer_of(request) is None:
        raise Unauthenticated
    buyer_id = await api.buyers.buyer(request)
    return await api.service.queries.of_buyer(order_id, buyer_id), True


async def _token_in_body(request: Request[Any, Any, Any]) -> str | None:
    content_type, _ = request.content_type
    if content_type != "text/plain":
        return None
    text = (await request.body()).decode("utf-8", errors="replace").strip()
    return text or None
