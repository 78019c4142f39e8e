"""The buyer's endpoints for reservations: prepare, read, long-poll, release."""

import math
import re
from typing import Annotated, Any, Final

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.handlers.base import BaseRouteHandler
from litestar.params import FromPath, HeaderParameter, JSONBody, QueryParameter

from api.http.auth.bearer import Connection, bearer_of
from api.http.dependencies import ApiContext, api_of, buyer_of, requires_buyer
from api.http.problem_details import documented
from api.http.query_parameters import knows_query
from api.http.schemas.reservations import PrepareRequest, ReservationAnswer, ReservationsAnswer
from reservation.application.reservations.prepare import Prepared, wish_of
from reservation.application.sales.catalog import CachedSale
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
from reservation.domain.ids import IDEMPOTENCY_KEY, SALE_ID
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation, Wish, digest_of, merge_lines
from reservation.domain.tokens import Purpose

__all__ = ["PRIVATE", "ReservationController", "answer_of", "is_admitted", "wish_in"]

_SALE_ID = re.compile(SALE_ID)
_IDEMPOTENCY_KEY = re.compile(IDEMPOTENCY_KEY)
#: The longest long poll: under the 30 s time-out of common proxies.
WAIT_SECONDS_MAX: Final = 25
#: A buyer's data must stay out of caches, and its URL out of a Referer.
PRIVATE: Final = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}

#: Security requirements in the OpenAPI document.
BUYER: Final[list[dict[str, list[str]]]] = [{"buyer": []}]
BUYER_OR_TOKEN: Final[list[dict[str, list[str]]]] = [*BUYER, {"reservationToken": []}]

IdempotencyKey = Annotated[
    str,
    HeaderParameter(
        name="Idempotency-Key",
        pattern=IDEMPOTENCY_KEY,
        description="The caller's name for this one wish: the same key and body, the same order.",
    ),
]


async def sale_exists(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: a known sale, or 404; it runs before the body is read."""
    sale_id = connection.path_params["sale_id"]
    if _SALE_ID.fullmatch(sale_id) is None:
        raise SaleNotFound
    await api_of(connection).service.catalog.get(sale_id)


async def limits_buyer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: 429 above the prepare rate; a replay of a key passes.

    A coroutine even though it may await nothing: a plain function would run in a thread.
    """
    api = api_of(connection)
    if api.prepares is None or api.replays is None:
        return
    buyer_id, now = buyer_of(connection), api.service.clock.monotonic()
    wait = api.prepares.wait(buyer_id, now)
    if not wait:
        return
    if api.replays.wait(buyer_id, now) or not await _is_replay(api, connection, buyer_id):
        raise RateLimited(retryAfter=max(1, math.ceil(wait)))


async def _is_replay(api: ApiContext, connection: Connection, buyer_id: str) -> bool:
    """Whether the request repeats a key with the same body."""
    sale_id, key = connection.path_params["sale_id"], connection.headers.get("idempotency-key", "")
    if not isinstance(connection, Request) or _SALE_ID.fullmatch(sale_id) is None:
        return False
    if _IDEMPOTENCY_KEY.fullmatch(key) is None:
        return False
    try:
        data = msgspec.json.decode(await connection.body(), type=PrepareRequest)
    except (UnicodeDecodeError, msgspec.MsgspecError):
        return False
    lines = merge_lines((line.sku, line.quantity) for line in data.items)
    digest = digest_of(lines, data.amount, data.order_name)
    return await api.service.preparation.is_replay(sale_id, buyer_id, key, digest)


def is_admitted(api: ApiContext, known: CachedSale, buyer_id: str, admission: str | None) -> bool:
    """Whether the caller's admission is valid; the script knows whether the sale requires one."""
    return admission is not None and api.service.signer.admits(
        admission, known.sale.page, buyer_id, now_ms=api.service.clock.now_ms()
    )


def wish_in(known: CachedSale, data: PrepareRequest, *, admitted: bool) -> Wish:
    """The wish of a request body.

    Raises:
        SkuNotFound: the sale does not have the first item.
    """
    items = [(line.sku, line.quantity) for line in data.items]
    return wish_of(known.sale, items, data.amount, order_name=data.order_name, admitted=admitted)


def answer_of(api: ApiContext, prepared: Prepared) -> ReservationAnswer:
    """Prepare's response: the reservation with all members needed to pay for it."""
    order = prepared.reservation
    epoch = prepared.epoch
    now_ms = api.service.clock.now_ms()
    payment = api.payment(order, epoch=epoch, now_ms=now_ms)
    token = None
    if payment is not None:
        token = api.token(
            order, Purpose.RESERVATION, epoch=epoch, customer_key=payment.customer_key
        )
    return ReservationAnswer.of(order, now_ms=now_ms, token=token, payment=payment)


class ReservationController(Controller):
    """The buyer's reservations."""

    path = "/v1"
    tags = ("Reservations",)

    @post(
        "/sales/{sale_id:str}/reservations",
        operation_id="prepareReservation",
        guards=[requires_buyer, limits_buyer, sale_exists],
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
        sale_id: FromPath[str],
        data: JSONBody[PrepareRequest],
        idempotency_key: IdempotencyKey,
        admission: Annotated[str | None, HeaderParameter(name="X-Sale-Admission")] = None,
    ) -> Response[ReservationAnswer]:
        """Hold the basket's stock until the deadline; a repeat of the key gets the same order."""
        api = api_of(request)
        buyer_id = buyer_of(request)
        known = await api.service.catalog.get(sale_id)
        admitted = is_admitted(api, known, buyer_id, admission)
        wish = wish_in(known, data, admitted=admitted)
        prepared = await api.service.preparation.prepare(known, buyer_id, idempotency_key, wish)
        answer = answer_of(api, prepared)
        replayed = {"Idempotent-Replayed": "true"} if prepared.replayed else {}
        return Response(answer, status_code=201, headers={**PRIVATE, **replayed})

    @get(
        "/sales/{sale_id:str}/reservations",
        operation_id="listReservations",
        guards=[requires_buyer, sale_exists, knows_query],
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
    async def look(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        wait: Annotated[
            int | None,
            QueryParameter(
                ge=0,
                le=WAIT_SECONDS_MAX,
                description="Answer at the next change, or after so many seconds.",
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
        answer = await (api.shown_to_buyer if own else api.shown_to_holder)(order)
        return Response(answer, headers=PRIVATE)

    @post(
        "/reservations/{order_id:str}/release",
        operation_id="releaseReservation",
        status_code=200,
        security=BUYER_OR_TOKEN,
        responses=documented(
            MalformedRequest,
            Unauthenticated,
            ReservationNotFound,
            PaymentInProgress,
            AlreadyConfirmed,
            HoldLost,
            SaleRecovering,
            Unavailable,
        ),
    )
    async def release(
        self,
        request: Request[Any, Any, Any],
        order_id: FromPath[str],
        reservation_token: Annotated[
            str | None, HeaderParameter(name="X-Reservation-Token")
        ] = None,
    ) -> Response[ReservationAnswer]:
        """Release the hold. The token may also be the whole body, as a beacon sends it."""
        api = api_of(request)
        token = reservation_token or await _token_in_body(request)
        order, _ = await _find(request, order_id, token, Purpose.RESERVATION)
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
