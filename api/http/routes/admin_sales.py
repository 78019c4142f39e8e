"""The operator's endpoints for sales: create, update, stock, state, audit, explanation."""

import re
from typing import Annotated, Any

from litestar import Controller, Request, Response, get, post, put
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, QueryParameter

from api.http.auth.bearer import Connection
from api.http.dependencies import api_of, needs, operator_name, requires_operator
from api.http.problem_details import documented, response_spec
from api.http.query_parameters import requires_known_query
from api.http.routes.reservations import IdempotencyKey
from api.http.routes.streamed_audit import audit_answer
from api.http.schemas.sales import (
    AuditAnswer,
    ReasonRequest,
    RestockRequest,
    SaleAnswer,
    SaleChangeAnswer,
    SaleHistoryAnswer,
    SaleRequest,
    SalesAnswer,
    SkuWhyAnswer,
)
from reservation.application.sales.listing import PAGE_MAX
from reservation.domain.errors import (
    Forbidden,
    IdempotencyKeyReused,
    InsufficientAvailable,
    InvalidSale,
    MalformedRequest,
    PreconditionFailed,
    PreconditionRequired,
    SaleClosed,
    SaleNotFound,
    SaleNotSettled,
    SaleRecovering,
    SkuNotFound,
    TotalTooLow,
    Unauthenticated,
    Unavailable,
    UpgradeInProgress,
)
from reservation.domain.ids import SALE_ID
from reservation.domain.operators import Right
from reservation.domain.sale import Sale
from reservation.domain.states import SaleStatus, Visibility

__all__ = ["AdminSaleController"]

_SALE_ID = re.compile(SALE_ID)
_ETAG = re.compile(r'(?:W/)?"(v[1-9][0-9]{0,14}\.[0-9A-Za-z-]{1,32})"')
#: 200 items with names of 200 characters of four bytes each. Long descriptions leave room for
#: fewer.
SALE_BYTES_MAX = 256 * 1024
_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)


def valid_sale_id(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: a well-formed sale id, before it becomes part of a key."""
    sale_id = connection.path_params.get("sale_id")
    if sale_id is not None and _SALE_ID.fullmatch(sale_id) is None:
        raise SaleNotFound


class AdminSaleController(Controller):
    """Sales, for operators."""

    path = "/v1/admin"
    tags = ("Operators",)
    guards = [requires_operator, valid_sale_id, requires_known_query]
    security = [{"operatorKey": []}]

    @put(
        "/sales/{sale_id:str}",
        operation_id="putSale",
        opt=needs(Right.SALES),
        request_max_body_size=SALE_BYTES_MAX,
        responses={
            201: response_spec(SaleAnswer, "Created."),
            **documented(
                *_COMMON,
                InvalidSale,
                SaleNotFound,
                TotalTooLow,
                PreconditionFailed,
                PreconditionRequired,
                SaleClosed,
                SaleRecovering,
                UpgradeInProgress,
            ),
        },
    )
    async def put_sale(
        self,
        request: Request[Any, Any, Any],
        sale_id: FromPath[str],
        data: JSONBody[SaleRequest],
        if_match: Annotated[str | None, HeaderParameter(name="If-Match")] = None,
    ) -> Response[SaleAnswer]:
        """Create a sale, or update one that was read (`If-Match` with its `ETag`)."""
        api = api_of(request)
        sale, created = await api.service.sales.put(
            sale_id,
            data.change(),
            if_match=_etag(if_match),
            operator=operator_name(request),
        )
        return _sale(request, sale, status_code=201 if created else 200)

    @get(
        "/sales",
        operation_id="listSalesForOperators",
        opt=needs(Right.READ),
        responses=documented(*_COMMON),
    )
    async def list_sales(
        self,
        request: Request[Any, Any, Any],
        cursor: Annotated[
            str | None,
            QueryParameter(max_length=256, description="The `nextCursor` of the previous page."),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=PAGE_MAX)] = PAGE_MAX,
        visibility: FromQuery[Visibility | None] = None,
        status: FromQuery[SaleStatus | None] = None,
    ) -> SalesAnswer:
        """A page of sales, drafts and unlisted ones included; archived sales are in no list.

        At most a second old.
        """
        service = api_of(request).service
        now_ms = service.connections.server_now_ms()
        page = await service.sales.page(
            cursor,
            limit,
            now_ms=now_ms,
            visibilities=Visibility if visibility is None else (visibility,),
            status=status,
        )
        return SalesAnswer.of(page, now_ms=now_ms)

    @get(
        "/sales/{sale_id:str}",
        operation_id="getSaleForOperators",
        opt=needs(Right.READ),
        responses=documented(*_COMMON, SaleNotFound, SaleRecovering),
    )
    async def get_sale(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str]
    ) -> Response[SaleAnswer]:
        """The sale with its counters and its `ETag`."""
        known = await api_of(request).service.catalog.fresh(sale_id)
        return _sale(request, known.sale)

    @post(
        "/sales/{sale_id:str}/stock",
        operation_id="restock",
        opt=needs(Right.SALES),
        status_code=200,
        responses=documented(
            *_COMMON,
            SaleNotFound,
            SkuNotFound,
            InsufficientAvailable,
            InvalidSale,
            IdempotencyKeyReused,
            SaleClosed,
            SaleRecovering,
        ),
    )
    async def restock(
        self,
        request: Request[Any, Any, Any],
        sale_id: FromPath[str],
        data: JSONBody[RestockRequest],
        idempotency_key: IdempotencyKey,
    ) -> Response[SaleAnswer]:
        """Add units of an item, or withdraw available units."""
        api = api_of(request)
        if data.delta == 0:
            raise MalformedRequest("delta must not be 0.")
        sale = await api.service.sales.restock(
            sale_id,
            sku=data.sku,
            delta=data.delta,
            reason=data.reason,
            idempotency_key=idempotency_key,
            operator=operator_name(request),
        )
        return _sale(request, sale)

    @post(
        "/sales/{sale_id:str}/pause",
        operation_id="pauseSale",
        opt=needs(Right.SALES),
        status_code=200,
        responses=documented(*_COMMON, SaleNotFound, SaleClosed, SaleRecovering),
    )
    async def pause(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str], data: JSONBody[ReasonRequest]
    ) -> Response[SaleAnswer]:
        """Stop prepares; holds and payments continue."""
        return await _switch(request, sale_id, SaleStatus.PAUSED, data.reason)

    @post(
        "/sales/{sale_id:str}/resume",
        operation_id="resumeSale",
        opt=needs(Right.SALES),
        status_code=200,
        responses=documented(*_COMMON, SaleNotFound, SaleClosed, SaleRecovering),
    )
    async def resume(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str], data: JSONBody[ReasonRequest]
    ) -> Response[SaleAnswer]:
        """Resume prepares."""
        return await _switch(request, sale_id, SaleStatus.OPEN, data.reason)

    @post(
        "/sales/{sale_id:str}/close",
        operation_id="closeSale",
        opt=needs(Right.SALES),
        status_code=200,
        responses=documented(*_COMMON, SaleNotFound, SaleRecovering),
    )
    async def close(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str], data: JSONBody[ReasonRequest]
    ) -> Response[SaleAnswer]:
        """End the sale permanently; started payments continue."""
        return await _switch(request, sale_id, SaleStatus.CLOSED, data.reason)

    @post(
        "/sales/{sale_id:str}/archive",
        operation_id="archiveSale",
        opt=needs(Right.SALES),
        status_code=200,
        responses=documented(
            *_COMMON, SaleNotFound, SaleNotSettled, SaleRecovering, UpgradeInProgress
        ),
    )
    async def archive(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str], data: JSONBody[ReasonRequest]
    ) -> Response[SaleAnswer]:
        """Retire a closed or ended sale: it leaves Redis and all lists; its orders stay."""
        api = api_of(request)
        service = api.service
        await service.retirement.archive(
            sale_id, reason=data.reason, operator=operator_name(request)
        )
        return _sale(request, (await service.catalog.fresh(sale_id)).sale)

    @get(
        "/sales/{sale_id:str}/history",
        operation_id="getSaleHistory",
        opt=needs(Right.READ),
        responses=documented(*_COMMON, SaleNotFound),
    )
    async def history(
        self,
        request: Request[Any, Any, Any],
        sale_id: FromPath[str],
        cursor: Annotated[
            str | None, QueryParameter(pattern=r"^[1-9][0-9]{0,15}$(?!\n)", max_length=16)
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> SaleHistoryAnswer:
        """The changes of a sale by operators, from SQL: newest first, a page at a time."""
        sql = api_of(request).service.sql
        if await sql.sales.get(sale_id) is None:
            raise SaleNotFound
        changes, before_seq = await sql.sale_changes.page(
            sale_id, before_seq=int(cursor) if cursor else None, limit=limit
        )
        return SaleHistoryAnswer(
            changes=[SaleChangeAnswer.of(change) for change in changes],
            next_cursor=str(before_seq) if before_seq else None,
        )

    @get(
        "/sales/{sale_id:str}/audit",
        operation_id="auditSale",
        opt=needs(Right.READ),
        responses=documented(*_COMMON, SaleNotFound),
    )
    async def audit(self, request: Request[Any, Any, Any], sale_id: FromPath[str]) -> AuditAnswer:
        """The counters against the reservations, Redis against SQL.

        An audit of more than ten seconds sends white space before its report.
        """
        service = api_of(request).service
        return await audit_answer(service.audit.run(sale_id), now_ms=service.clock.now_ms())

    @get(
        "/sales/{sale_id:str}/items/{sku:str}/why",
        operation_id="explainItem",
        opt=needs(Right.READ),
        responses=documented(*_COMMON, SaleNotFound, SkuNotFound),
    )
    async def why(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str], sku: FromPath[str]
    ) -> SkuWhyAnswer:
        """The holders of an item's units, since when, and the next deadlines."""
        return SkuWhyAnswer.of(await api_of(request).service.explain.item(sale_id, sku))


async def _switch(
    request: Request[Any, Any, Any], sale_id: str, status: SaleStatus, reason: str
) -> Response[SaleAnswer]:
    api = api_of(request)
    sale = await api.service.sales.switch(
        sale_id, status, reason=reason, operator=operator_name(request)
    )
    return _sale(request, sale)


def _etag(if_match: str | None) -> str | None:
    if if_match is None:
        return None
    found = _ETAG.fullmatch(if_match.strip())
    if found is None:
        raise PreconditionFailed("If-Match is not a valid ETag of this sale.")
    return found[1]


def _sale(
    request: Request[Any, Any, Any], sale: Sale, *, status_code: int = 200
) -> Response[SaleAnswer]:
    now_ms = api_of(request).service.connections.server_now_ms()
    return Response(
        SaleAnswer.of(sale, now_ms=now_ms),
        status_code=status_code,
        headers={"ETag": f'"{sale.etag}"', "Cache-Control": "no-store"},
    )
