"""The operator's endpoints that end an order, or have its payment looked up now."""

from typing import Any

from litestar import Controller, Request, Response, post
from litestar.params import FromPath, JSONBody

from api.http.dependencies import api_of, needs, operator_name, requires_operator
from api.http.problem_details import documented, response_spec
from api.http.query_parameters import requires_known_query
from api.http.schemas.reservations import ReservationAnswer
from api.http.schemas.sales import ReasonRequest
from reservation.domain.errors import (
    AlreadyConfirmed,
    Forbidden,
    MalformedRequest,
    PaymentInProgress,
    ReservationNotFound,
    SaleRecovering,
    Unauthenticated,
    Unavailable,
)
from reservation.domain.operators import Right
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["AdminOrderRequestController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, ReservationNotFound, SaleRecovering)
_UNDECIDED = (Status.CONFIRMING, Status.AWAITING_DEPOSIT)


class AdminOrderRequestController(Controller):
    """Release and resolve an order, for operators."""

    path = "/v1/admin/orders"
    tags = ("Operators",)
    guards = [requires_operator, requires_known_query]
    security = [{"operatorKey": []}]

    @post(
        "/{order_id:str}/release",
        operation_id="releaseOrder",
        status_code=200,
        opt=needs(Right.ORDERS),
        responses={
            202: response_spec(
                ReservationAnswer, "The deposit account is being cancelled at the payment provider."
            ),
            **documented(*_COMMON, PaymentInProgress, AlreadyConfirmed, Unavailable),
        },
    )
    async def release(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        data: JSONBody[ReasonRequest],
    ) -> Response[ReservationAnswer]:
        """Release a hold. An order that has ended stays as it is.

        An order that awaits its deposit gets 202: the account is cancelled at the payment provider,
        then the order is RELEASED, or CONFIRMED if the deposit came first.
        """
        api, operator = api_of(request), operator_name(request)
        order = await _order(request, order_id)
        if order.status is Status.AWAITING_DEPOSIT:
            await api.service.requests.release(order, operator=operator, reason=data.reason)
            return Response(api.shown(order), status_code=202)
        reason = Reason(Cause.OPERATOR, operator=operator, note=data.reason)
        released = await api.service.releases.release(order, reason=reason)
        return Response(api.shown(released))

    @post(
        "/{order_id:str}/resolve",
        operation_id="resolveOrder",
        status_code=200,
        opt=needs(Right.ORDERS),
        responses={
            202: response_spec(
                ReservationAnswer, "The payment is still undecided; settlement continues."
            ),
            **documented(*_COMMON, Unavailable),
        },
    )
    async def resolve(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        data: JSONBody[ReasonRequest],
    ) -> Response[ReservationAnswer]:
        """Look the payment up at the payment provider now, and settle what it shows.

        For CONFIRMING and AWAITING_DEPOSIT. 202 until the rules of settlement allow an end; an
        order in another state stays as it is. An open deposit account stays open: release ends it.
        """
        api, operator = api_of(request), operator_name(request)
        order = await _order(request, order_id)
        await api.service.requests.resolve(order, operator=operator, reason=data.reason)
        after = await _order(request, order_id)
        return Response(api.shown(after), status_code=202 if after.status in _UNDECIDED else 200)


async def _order(request: Request[Any, Any, Any], order_id: str) -> Reservation:
    """The order now.

    Raises:
        ReservationNotFound: there is none.
        Unavailable: a server does not answer, or a failover may lose that state.
    """
    queries = api_of(request).service.queries
    order = await queries.find(order_id)
    if order is None:
        raise ReservationNotFound("There is no such order.")
    return await queries.acknowledged(order)
