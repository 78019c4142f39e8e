"""The operator's endpoints for orders: list, one with its history, refunds."""

from typing import Annotated, Any, Literal, cast

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from api.http.dependencies import api_of, needs, operator_name, requires_operator
from api.http.problem_details import documented, response_spec
from api.http.query_parameters import requires_known_query
from api.http.routes.reservations import IdempotencyKey
from api.http.schemas.accounts import VirtualAccountAnswer
from api.http.schemas.orders import (
    HistoryEntry,
    OrderAnswer,
    OrderHistoryAnswer,
    OrdersAnswer,
    PendingRefundAnswer,
    RefundAnswer,
    RefundRequest,
    RefundsAnswer,
)
from api.http.schemas.reservations import LineAnswer, ReservationAnswer
from reservation.adapters.sql.history import HistoryRow
from reservation.adapters.sql.orders import OrderRow, as_reservation
from reservation.application.payments.refunds import RefundWish, facts_of
from reservation.domain.clock import as_wire
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
from reservation.domain.ids import BUYER_ID, SALE_ID, sale_of
from reservation.domain.operators import Right
from reservation.domain.payment import Reason
from reservation.domain.states import Status

__all__ = ["AdminOrderController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)


class AdminOrderController(Controller):
    """Orders and their refunds, for operators."""

    path = "/v1/admin"
    tags = ("Operators",)
    guards = [requires_operator, requires_known_query]
    security = [{"operatorKey": []}]

    @get(
        "/orders",
        operation_id="listOrders",
        opt=needs(Right.READ),
        responses=documented(*_COMMON),
    )
    async def orders(
        self,
        request: Request[Any, Any, Any],
        sale_id: Annotated[str | None, QueryParameter(name="saleId", pattern=SALE_ID)] = None,
        status: FromQuery[Status | None] = None,
        buyer_id: Annotated[str | None, QueryParameter(name="buyerId", pattern=BUYER_ID)] = None,
        cursor: Annotated[str | None, QueryParameter(max_length=256)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> OrdersAnswer:
        """Orders from SQL, newest first, a page at a time."""
        try:
            rows, next_cursor = await api_of(request).service.sql.orders.page(
                sale_id=sale_id,
                status=status.value if status else None,
                buyer_id=buyer_id,
                cursor=cursor,
                limit=limit,
            )
        except ValueError as error:
            raise MalformedRequest("cursor was not issued by this endpoint.") from error
        return OrdersAnswer(orders=[_order(row) for row in rows], next_cursor=next_cursor)

    @get(
        "/orders/{order_id:str}",
        operation_id="getOrder",
        opt=needs(Right.READ),
        responses=documented(*_COMMON, ReservationNotFound),
    )
    async def order(
        self, request: Request[Any, Any, Any], order_id: FromPath[str]
    ) -> OrderHistoryAnswer:
        """One order with its whole history."""
        return await _order_with_history(request, order_id)

    @post(
        "/orders/{order_id:str}/refund",
        operation_id="refundOrder",
        opt=needs(Right.ORDERS),
        status_code=200,
        responses={
            202: response_spec(
                PendingRefundAnswer, "`refund_pending`: accepted; the service completes it."
            ),
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
        completed = await api.service.refunds.refund(
            RefundWish(
                order_id=order_id,
                reason=data.reason,
                restock=data.restock,
                account=account.with_bank_code() if account else None,
                idempotency_key=idempotency_key,
                operator=operator_name(request),
            )
        )
        order = await api.service.queries.find(order_id)
        if order is None:
            raise ReservationNotFound
        answer = api.shown(order)
        if completed:
            return Response(answer, status_code=200)
        existing = await api.service.sql.refunds.get(order_id)
        pending = PendingRefundAnswer(
            **msgspec.structs.asdict(answer),
            code="refund_pending",
            provider_code=existing.code if existing else None,
        )
        return Response(pending, status_code=202)

    @get(
        "/refunds",
        operation_id="listRefunds",
        opt=needs(Right.READ),
        responses=documented(*_COMMON),
    )
    async def refunds(
        self,
        request: Request[Any, Any, Any],
        status: Annotated[
            Literal["pending", "done", "refused"] | None,
            QueryParameter(
                description="Pending refunds are listed oldest first, others newest first."
            ),
        ] = None,
        cursor: Annotated[str | None, QueryParameter(max_length=256)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> RefundsAnswer:
        """Refunds from SQL, a page at a time."""
        try:
            rows, next_cursor = await api_of(request).service.sql.refunds.page(
                status=status, cursor=cursor, limit=limit
            )
        except ValueError as error:
            raise MalformedRequest("cursor was not issued by this endpoint.") from error
        return RefundsAnswer(
            refunds=[RefundAnswer.of(row) for row in rows], next_cursor=next_cursor
        )


def _order(row: OrderRow) -> OrderAnswer:
    return msgspec.convert(_order_members(row), OrderAnswer)


def _order_members(row: OrderRow) -> dict[str, Any]:
    return {
        "orderId": row.order_id,
        "saleId": row.sale_id,
        "buyerId": row.buyer_id,
        "status": row.status,
        "items": [
            LineAnswer(sku=line.sku, quantity=line.quantity, price=line.price) for line in row.lines
        ],
        "amount": row.amount,
        "currency": row.currency,
        "paymentKeyLast4": row.payment_key[-4:] if row.payment_key else None,
        "createdAt": as_wire(row.created_at_ms),
        "updatedAt": as_wire(row.updated_at_ms),
        "seq": row.seq,
    }


async def _order_with_history(request: Request[Any, Any, Any], order_id: str) -> OrderHistoryAnswer:
    sql = api_of(request).service.sql
    row = await sql.orders.get(order_id) if sale_of(order_id) else None
    if row is None:
        raise ReservationNotFound("No such order in SQL yet.")
    service = api_of(request).service
    history = [_entry(entry) for entry in await sql.orders.history(order_id)]
    # Redis is ahead of SQL: the next step depends on the order's current state.
    now = await service.queries.find(order_id) or as_reservation(row)
    account = await service.queries.deposit_account(now)
    payment = await sql.payments.get(now.payment_key or "")
    refund = await sql.refunds.get(order_id)
    opened = payment.virtual_account if payment else None
    members = {
        **_order_members(row),
        "next": await service.explain.next_step(now),
        "paymentMethod": payment.method if payment else None,
        "accountRefundStatus": opened.refund_status if opened else None,
        "virtualAccount": VirtualAccountAnswer.of(account) if account else None,
        "refund": facts_of(refund) if refund else None,
    }
    return msgspec.convert({**members, "history": history}, OrderHistoryAnswer)


def _entry(row: HistoryRow) -> HistoryEntry:
    facts: dict[str, Any] = msgspec.json.decode(row.facts)
    if row.kind == "event" and (reason := Reason.read(row.what, facts)):
        facts |= {**reason.members(), "explanation": reason.sentence()}
    return HistoryEntry(
        at=as_wire(row.at_ms), kind=row.kind, what=row.what, facts=_without_keys(facts)
    )


def _without_keys(facts: Any) -> Any:
    """Payment keys reduced to their last four characters, secrets removed, at any depth."""
    if isinstance(facts, dict):
        members = cast("dict[str, Any]", facts)
        return {
            name: f"...{value[-4:]}"
            if name in ("paymentKey", "payment_key") and isinstance(value, str)
            else _without_keys(value)
            for name, value in members.items()
            if name != "secret"
        }
    if isinstance(facts, list):
        return [_without_keys(value) for value in cast("list[Any]", facts)]
    return facts
