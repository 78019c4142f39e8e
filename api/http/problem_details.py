"""Refusals on the wire: RFC 9457 problem documents, and the only table of HTTP statuses."""

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

import msgspec
import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from api.http.head_requests import allowed
from api.http.middleware import request_id_of
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.domain import errors
from reservation.domain.alarms import Alarm
from reservation.domain.errors import BrokenInvariant, MalformedRequest, ReservationError
from reservation.domain.rate_limit import Limiter, Rate
from reservation.telemetry.metrics import alarm

__all__ = [
    "EXCEPTION_HANDLERS",
    "FRAMEWORK_CODES",
    "INTERNAL_ERROR_DETAIL",
    "PROBLEM_JSON",
    "STATUSES",
    "Problem",
    "document_of",
    "documented",
    "render_error",
    "response_spec",
]

log = structlog.get_logger(__name__)

PROBLEM_JSON = "application/problem+json"
INTERNAL_ERROR_DETAIL = "An internal error occurred; the log has it under the request id."

#: Rate of log lines about an unavailable store: every request fails in the same way.
LINES = Rate(count=10, per_seconds=10)

_lines = Limiter(LINES)

_REDIS_DOWN = (StoreUnavailable, StoreUncertain)
#: Errors of an unreachable, full or locked server or file; other SQL errors are bugs. Prepare
#: itself turns those of Redis into refusals, which depend on whether a hold may exist.
_UNAVAILABLE = (
    *_REDIS_DOWN,
    ConnectionError,
    DatabaseUnfit,
    TimeoutError,
    OperationalError,
    InterfaceError,
    PoolTimeout,
)

#: The status of every code.
STATUSES: Mapping[str, int] = {
    "malformed_request": 400,
    "invalid_sale": 400,
    "invalid_webhook_endpoint": 400,
    "unauthenticated": 401,
    "payment_declined": 402,
    "forbidden": 403,
    "invalid_token": 403,
    "invalid_admission": 403,
    "sale_not_open": 403,
    "sale_not_found": 404,
    "sku_not_found": 404,
    "reservation_not_found": 404,
    "key_not_found": 404,
    "webhook_endpoint_not_found": 404,
    "webhook_delivery_not_found": 404,
    "sold_out": 409,
    "buyer_limit_exceeded": 409,
    "reservation_expired": 409,
    "hold_lost": 409,
    "payment_in_progress": 409,
    "already_confirmed": 409,
    "total_too_low": 409,
    "insufficient_available": 409,
    "not_refundable": 409,
    "refund_pending": 409,
    "sale_not_settled": 409,
    "upgrade_in_progress": 409,
    "too_many_keys": 409,
    "webhook_endpoint_disabled": 409,
    "sale_closed": 410,
    "precondition_failed": 412,
    "idempotency_key_reused": 422,
    "refund_account_required": 422,
    "precondition_required": 428,
    "rate_limited": 429,
    "too_many_orders": 429,
    "sale_paused": 503,
    "sale_recovering": 503,
    "unavailable": 503,
    "outcome_unknown": 503,
}

#: The only code whose status depends on the call: at prepare the page is out of date (409), at
#: success the URL is wrong (400).
AMOUNT_MISMATCH_AT_PREPARE = 409
AMOUNT_MISMATCH_AT_SUCCESS = 400

#: Codes of the framework's plain HTTP errors.
FRAMEWORK_CODES: Mapping[int, str] = {
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    415: "malformed_request",
}


class Problem(msgspec.Struct, kw_only=True):
    """A problem document; the refusal's own facts are further members of it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str


def document_of(
    code: str,
    detail: str,
    *,
    status: int,
    instance: str,
    facts: Mapping[str, Any] | None = None,
) -> tuple[bytes, dict[str, str]]:
    """A refusal's body and its own headers; `retryAfter` among the facts also becomes one."""
    document = {
        "type": f"/docs#code-{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "instance": instance,
        **(facts or {}),
    }
    retry_after = (facts or {}).get("retryAfter")
    headers = {"Cache-Control": "no-store"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return msgspec.json.encode(document), headers


def status_of(error: ReservationError, path: str) -> int:
    """The status of a refusal at this path."""
    if isinstance(error, errors.AmountMismatch):
        at_success = path.startswith("/v1/payments/")
        return AMOUNT_MISMATCH_AT_SUCCESS if at_success else AMOUNT_MISMATCH_AT_PREPARE
    return STATUSES[error.code]


def facts_of(error: ReservationError, status: int) -> dict[str, Any]:
    """The refusal's members beyond the standard ones of the problem document."""
    facts: dict[str, Any] = dict(error.facts)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        facts.setdefault("retryAfter", 1)
    return facts


def render_error(
    error: Exception, *, path: str, instance: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and own headers of the response to a refusal, an outage or a bug.

    Args:
        error: raised by a handler, or the outcome of a prepare.
        path: of the request.
        instance: the request id.
    """
    if isinstance(error, ReservationError):
        status, code, detail = status_of(error, path), error.code, error.detail
        facts = facts_of(error, status)
    elif isinstance(error, _UNAVAILABLE):
        _log_outage(error, path)
        status, code, detail = 503, "unavailable", "Redis is unavailable; retry the request."
        facts = {"retryAfter": 1}
    else:
        _log_bug(error, path)
        status, code, detail, facts = 500, "internal_error", INTERNAL_ERROR_DETAIL, {}
    content, headers = document_of(code, detail, status=status, instance=instance, facts=facts)
    return status, content, headers


def _respond(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    status, content, headers = render_error(
        error, path=request.url.path, instance=request_id_of(request)
    )
    return Response(content=content, status_code=status, media_type=PROBLEM_JSON, headers=headers)


def _http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    status = error.status_code
    code = FRAMEWORK_CODES.get(status, "malformed_request")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _respond(request, error)
    content, headers = document_of(
        code, _sentence(error), status=status, instance=request_id_of(request)
    )
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = allowed(request.app, request.scope["path"])
    return Response(content=content, status_code=status, media_type=PROBLEM_JSON, headers=headers)


def _sentence(error: HTTPException) -> str:
    """The fault in the request; the framework names the field in `extra`."""
    extra = error.extra
    first: Any = extra[0] if isinstance(extra, list) and extra else extra
    if isinstance(first, dict):
        error_fields = cast("dict[str, Any]", first)
        field = error_fields.get("key") or error_fields.get("source") or "body"
        return f"{field}: {error_fields.get('message', MalformedRequest.sentence)}"
    return error.detail or MalformedRequest.sentence


def _log_outage(error: Exception, path: str) -> None:
    """Log an unreachable server; its callers may repeat their requests."""
    # The text of an error of SQL contains the statement's values.
    of_redis = isinstance(error, _REDIS_DOWN)
    event, reason = (
        ("redis_unavailable", str(error)) if of_redis else ("sql_unavailable", type(error).__name__)
    )
    if not _lines.wait(event, time.monotonic()):
        log.warning(event, reason=reason, path=path)


def _log_bug(error: Exception, path: str) -> None:
    if isinstance(error, BrokenInvariant):
        alarm(Alarm.BROKEN_INVARIANT, reason=str(error))
    log.error("unhandled_error", path=path, exc_info=error)


EXCEPTION_HANDLERS: Any = {HTTPException: _http_error, Exception: _respond}


def documented(
    *refusals: type[ReservationError], at_success: bool = False
) -> dict[int, ResponseSpec]:
    """The OpenAPI responses of an operation with these refusals.

    Args:
        refusals: in any order; those of one status share an entry.
        at_success: whether the operation is the payment page's success URL, where a wrong amount
            has its own status.
    """
    by_status: dict[int, list[str]] = {}
    for refusal in refusals:
        if refusal is errors.AmountMismatch:
            status = AMOUNT_MISMATCH_AT_SUCCESS if at_success else AMOUNT_MISMATCH_AT_PREPARE
        else:
            status = STATUSES[refusal.code]
        by_status.setdefault(status, []).append(refusal.code)
    return {
        status: ResponseSpec(
            data_container=Problem,
            description=" / ".join(f"`{code}`" for code in codes),
            media_type=MediaType(PROBLEM_JSON) if PROBLEM_JSON in set(MediaType) else PROBLEM_JSON,
            generate_examples=False,
        )
        for status, codes in by_status.items()
    }


def response_spec(container: Any, description: str) -> ResponseSpec:
    """A further success status of an operation."""
    return ResponseSpec(data_container=container, description=description, generate_examples=False)
