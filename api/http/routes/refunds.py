"""The operator's endpoints for refunds: one order's, and the list of all."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from api.http.dependencies import api_of, requires_operator
from api.http.problem_details import answers, documented
from api.http.routes.reservations import IdempotencyKey
from api.http.schemas.accounts import RefundAnswer
from api.http.schemas.refunds import PendingRefundAnswer, RefundRequest, RefundsAnswer
from api.http.schemas.reservations import ReservationAnswer
from reservation.application.payments.refunds import RefundWish
from reservation.domain.errors import (
    Forbidden,
    IdempotencyKeyReused,
    MalformedRequest,
    NotRefundable,
    RefundAccountRequired,
    RefundPending,
    ReservationNotFound,
    SaleRecovering,
    Unauthenticated,
    Unavailable,
)

__all__ = ["RefundController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)


class RefundController(Controller):
    """Refunds, for operators."""

    path = "/v1/admin"
    tags = ("Operators",)
    guards = [requires_operator]
    security = [{"operatorKey": []}]

    @post(
        "/orders/{order_id:str}/refund",
        operation_id="refundOrder",
        status_code=200,
        responses={
            202: answers(PendingRefundAnswer, "`refund_pending`: begun, and going on by itself."),
            **documented(
                *_COMMON,
                ReservationNotFound,
                NotRefundable,
                RefundPending,
                RefundAccountRequired,
                IdempotencyKeyReused,
                SaleRecovering,
            ),
        },
    )
    async def refund(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        data: JSONBody[RefundRequest],
        idempotency_key: IdempotencyKey,
    ) -> Response[ReservationAnswer]:
        """Cancel the payment in full, then give the stock back (or keep it out of the sale)."""
        api = api_of(request)
        account = data.refund_receive_account
        through = await api.service.refunds.refund(
            RefundWish(
                order_id=order_id,
                reason=data.reason,
                restock=data.restock,
                account=account.in_the_pgs_words() if account else None,
                idempotency_key=idempotency_key,
                operator=api.operators.name(request),
            )
        )
        order = await api.service.queries.find(order_id)
        if order is None:
            raise ReservationNotFound
        answer = api.shown(order)
        if through:
            return Response(answer, status_code=200)
        standing = await api.service.ledger.refund_of(order_id)
        pending = PendingRefundAnswer(
            **msgspec.structs.asdict(answer),
            code="refund_pending",
            provider_code=standing.code if standing else None,
        )
        return Response(pending, status_code=202)

    @get("/refunds", operation_id="listRefunds", responses=documented(*_COMMON))
    async def refunds(
        self,
        request: Request[Any, Any, Any],
        status: Annotated[
            Literal["pending", "done", "refused"] | None,
            QueryParameter(description="Pending ones come oldest first, others newest first."),
        ] = None,
        cursor: Annotated[str | None, QueryParameter(max_length=256)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> RefundsAnswer:
        """Refunds from SQL, a page at a time."""
        try:
            rows, next_cursor = await api_of(request).service.ledger.refunds(
                status=status, cursor=cursor, limit=limit
            )
        except ValueError as error:
            raise MalformedRequest("cursor is not one that this endpoint gave out.") from error
        return RefundsAnswer(
            refunds=[RefundAnswer.of(row) for row in rows], next_cursor=next_cursor
        )
