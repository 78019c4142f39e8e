"""The PG's callbacks: the buyer's return URLs and the webhooks."""

import re
from http import HTTPStatus
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import msgspec
import structlog
from litestar import Controller, Request, Response, get, post
from litestar.params import QueryParameter

from api.http.dependencies import PRIVATE, ApiContext, api_of
from api.http.problem_details import documented, response_spec
from api.http.routes.pages import please_wait
from api.http.schemas.reservations import ReservationAnswer
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.domain.errors import (
    AmountMismatch,
    BuyerLimitExceeded,
    HoldLost,
    InvalidToken,
    MalformedRequest,
    PaymentDeclined,
    RateLimited,
    ReservationError,
    ReservationExpired,
    ReservationNotFound,
    SaleRecovering,
    SoldOut,
    Unavailable,
)
from reservation.domain.ids import PAYMENT_KEY
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Claims, Purpose
from reservation.telemetry.log_rate_limit import LogRateLimit

__all__ = ["PaymentController"]

log = structlog.get_logger(__name__)

#: Anyone can post a webhook.
_unreadable: Final = LogRateLimit(1)
_PAYMENT_KEY = re.compile(PAYMENT_KEY)
#: The outcome on the storefront's result page, by the state of the returning buyer's order.
_OUTCOMES: Final = {
    Status.CONFIRMED: "confirmed",
    Status.CONFIRMING: "settling",
    Status.AWAITING_DEPOSIT: "awaiting_deposit",
    Status.RELEASED: "declined",
    Status.EXPIRED: "expired",
    Status.REFUNDED: "declined",
    Status.HELD: "declined",
    Status.PREPARED: "declined",
}
_REFUSALS: Final = {
    PaymentDeclined.code: "declined",
    ReservationExpired.code: "expired",
    HoldLost.code: "expired",
    SoldOut.code: "sold_out",
    BuyerLimitExceeded.code: "sold_out",
}
#: Refusals after which loading the same URL again may succeed.
_TRANSIENT: Final = (Unavailable, SaleRecovering, StoreUnavailable, StoreUncertain)
#: These refusals usually mean that no money was taken. Here it may have been, if a URL is loaded
#: again.
_STATE_UNAVAILABLE: Final = "The payment's state is temporarily unavailable; reload this address."
#: The PG's own webhooks are under 20 kB, and only three members of each are read.
WEBHOOK_BYTES_MAX: Final = 64 * 1024
#: Limits of the PG itself.
_ORDER_ID_CHARS: Final = 64
_SECRET_CHARS: Final = 50


class _Ids(msgspec.Struct):
    """All members that are read of a webhook."""

    order_id: Annotated[str, msgspec.Meta(max_length=_ORDER_ID_CHARS)] | None = msgspec.field(
        name="orderId", default=None
    )
    payment_key: Annotated[str, msgspec.Meta(pattern=PAYMENT_KEY)] | None = msgspec.field(
        name="paymentKey", default=None
    )

    #: Only a hint: an unexpected value must not make the webhook unreadable.
    status: object = None


class _Notice(_Ids):
    """A webhook: its ids are in `data`, or, for a deposit, at the top level."""

    data: _Ids | None = None
    #: Deposits only: the secret that the PG sent when it issued the account.
    secret: Annotated[str, msgspec.Meta(max_length=_SECRET_CHARS)] | None = None


Query = Annotated[str | None, QueryParameter(description="As sent by the PG's redirect.")]


class PaymentController(Controller):
    """The buyer's return from the PG."""

    path = "/v1/payments/toss"
    tags = ("Payments",)

    @get(
        "/success",
        operation_id="paymentSucceeded",
        responses={
            202: response_spec(
                ReservationAnswer, "The payment's outcome is unknown; settlement is in progress."
            ),
            303: response_spec(None, "For browsers: redirect to the storefront's result page."),
            **documented(
                PaymentDeclined,
                RateLimited,
                InvalidToken,
                ReservationNotFound,
                SoldOut,
                ReservationExpired,
                BuyerLimitExceeded,
                HoldLost,
                AmountMismatch,
                MalformedRequest,
                SaleRecovering,
                Unavailable,
                at_success=True,
            ),
        },
    )
    async def success(
        self,
        request: Request[Any, Any, Any],
        token: Query = None,
        payment_type: Annotated[str | None, QueryParameter(name="paymentType")] = None,
        order_id: Annotated[str | None, QueryParameter(name="orderId")] = None,
        payment_key: Annotated[str | None, QueryParameter(name="paymentKey")] = None,
        amount: Query = None,
    ) -> Response[Any]:
        """Verify, claim the hold, confirm the payment, mark sold. Repeats answer the same."""
        del payment_type  # The PG sends it with some products only.
        api = api_of(request)
        claims = order = None
        try:
            _refuse_prefetch(request)
            claims = _return_claims(api, token)
            if order_id is not None and order_id != claims.order_id:
                raise InvalidToken
            order = await _order_of(api, claims)
            if amount != str(order.amount):
                raise AmountMismatch(expectedAmount=order.amount)
            if payment_key is None or _PAYMENT_KEY.fullmatch(payment_key) is None:
                raise InvalidToken("paymentKey is malformed.")
            now_ms = api.service.clock.now_ms()
            found = await api.service.confirmation.confirm(
                order, payment_key=payment_key, may_claim=claims.may_claim(now_ms)
            )
        except (ReservationError, StoreUnavailable, StoreUncertain) as error:
            return _refuse(request, error, claims, order)
        return await _back(request, api, found)

    @get(
        "/fail",
        operation_id="paymentFailed",
        responses={
            303: response_spec(None, "For browsers: redirect to the storefront's result page."),
            **documented(MalformedRequest, InvalidToken, HoldLost, SaleRecovering, Unavailable),
        },
    )
    async def fail(
        self,
        request: Request[Any, Any, Any],
        token: Query = None,
        code: Query = None,
        message: Query = None,
        order_id: Annotated[str | None, QueryParameter(name="orderId")] = None,
    ) -> Response[Any]:
        """Release the hold that the token names; a payment made or in progress stays."""
        del message  # The PG's text for the buyer; its own page has shown it.
        api = api_of(request)
        claims = order = None
        try:
            _refuse_prefetch(request)
            claims = _return_claims(api, token)
            # Some integrations send an empty orderId; the token names the order.
            if order_id and order_id != claims.order_id:
                raise InvalidToken
            order = await _order_of(api, claims)
            reason = Reason(Cause.PAYMENT_PAGE, _printable(code))
            found = await api.service.releases.if_held(order, reason=reason)
        except (ReservationError, StoreUnavailable, StoreUncertain) as error:
            return _refuse(request, error, claims, order)
        return await _back(request, api, found)

    @post(
        "/webhooks",
        operation_id="receiveWebhook",
        status_code=200,
        request_max_body_size=WEBHOOK_BYTES_MAX,
        responses={**documented(Unavailable)},
    )
    async def webhooks(self, request: Request[Any, Any, Any]) -> Response[None]:
        """The payment is looked up at the PG; the body of the webhook is not trusted.

        If the PG is unreachable, the answer is 503, so that it sends the webhook again.
        """
        try:
            notice = msgspec.json.decode(await request.body(), type=_Notice)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            suppressed = _unreadable.should_suppress()
            if suppressed is not None:
                log.info("webhook_malformed", suppressed=suppressed)
            return Response(None, status_code=200)
        ids = notice.data or notice
        if ids.order_id is not None:
            await api_of(request).service.notifications.receive(
                ids.order_id,
                ids.payment_key,
                secret=notice.secret,
                status=ids.status if isinstance(ids.status, str) else None,
            )
        return Response(None, status_code=200)


def _refuse_prefetch(request: Request[Any, Any, Any]) -> None:
    """Refuse a prefetch: no buyer has opened the page yet."""
    purpose = request.headers.get("sec-purpose", "") + request.headers.get("purpose", "")
    if "prefetch" in purpose or "prerender" in purpose:
        raise Unavailable("Prefetching this URL is not allowed.")


def _return_claims(api: ApiContext, token: str | None) -> Claims:
    if token is None:
        raise InvalidToken
    return api.service.signer.verify(token, Purpose.RETURN, now_ms=api.service.clock.now_ms())


async def _order_of(api: ApiContext, claims: Claims) -> Reservation:
    order = await api.service.queries.of_token(claims)
    buyer = api.service.order_ids.customer_key(order.buyer_id)
    promised = (claims.sale_id, claims.amount, claims.buyer)
    if promised != (order.sale_id, order.amount, buyer):
        raise InvalidToken
    return order


def _printable(code: str | None) -> str:
    return "".join(c for c in (code or "no code") if c.isprintable())[:64]


def _wants_html(request: Request[Any, Any, Any]) -> bool:
    return "text/html" in request.headers.get("accept", "")


async def _back(
    request: Request[Any, Any, Any], api: ApiContext, order: Reservation
) -> Response[Any]:
    """The order's state: a document, or a redirect to the storefront's result page."""
    if _wants_html(request):
        status = order.shown_status(api.service.clock.now_ms())
        return _redirect(api, order.order_id, order, _OUTCOMES[status])
    accepted = order.status is Status.CONFIRMING
    answer = await api.shown_to_holder(order)
    return Response(
        answer,
        status_code=HTTPStatus.ACCEPTED if accepted else HTTPStatus.OK,
        headers=PRIVATE,
    )


def _refuse(
    request: Request[Any, Any, Any],
    error: Exception,
    claims: Claims | None,
    order: Reservation | None,
) -> Response[Any]:
    """A refusal: for a browser the result page, or a page that reloads automatically."""
    if not _wants_html(request):
        raise _without_state(error)
    if isinstance(error, _TRANSIENT):
        return please_wait()
    code = error.code if isinstance(error, ReservationError) else ""
    # Only the token names an order that was lost.
    order_id = claims.order_id if claims and (order or isinstance(error, HoldLost)) else ""
    return _redirect(api_of(request), order_id, order, _REFUSALS.get(code, "invalid"))


def _without_state(error: Exception) -> Exception:
    """The same refusal, without an unverified sentence about money."""
    match error:
        case SaleRecovering() | Unavailable() if error.detail == error.sentence:
            return type(error)(_STATE_UNAVAILABLE, **error.facts)
        case StoreUnavailable() | StoreUncertain():
            return Unavailable(_STATE_UNAVAILABLE, retryAfter=1)
        case _:
            return error


def _redirect(
    api: ApiContext, order_id: str, order: Reservation | None, outcome: str
) -> Response[Any]:
    """Redirect to the result page; with a read token if the return token was the order's."""
    settings = api.service.settings
    base = settings.storefront_url or settings.public_url
    query = urlencode({"orderId": order_id, "outcome": outcome})
    fragment = f"#token={api.token(order, Purpose.READ, epoch='')}" if order else ""
    return Response(
        None,
        status_code=HTTPStatus.SEE_OTHER,
        headers={**PRIVATE, "Location": f"{base}/result?{query}{fragment}"},
    )
