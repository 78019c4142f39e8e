"""HTTP response of an audit: a long audit sends white space, so that no proxy times it out."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Final, cast

import msgspec
import structlog
from litestar.response import Stream

from api.http.schemas.sales import AuditAnswer
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.application.audit.audit import AuditReport
from reservation.domain.clock import as_wire
from reservation.domain.errors import ReservationError

__all__ = ["audit_answer"]

log = structlog.get_logger(__name__)

#: A longer audit begins its response early; common proxies time out a silent one after 30 s.
SILENT_SECONDS_MAX: Final = 10.0
#: JSON allows white space before a document.
_WHITE: Final = b"\n"


async def audit_answer(audit: Coroutine[Any, Any, AuditReport], *, now_ms: int) -> AuditAnswer:
    """The report; a slow one as a stream, with its status 200 sent before the audit ends.

    Args:
        audit: the work; it is cancelled with the request.
        now_ms: the time in the report of a failed audit.

    Raises:
        ReservationError: raised by the audit within the first seconds.
    """
    work = asyncio.create_task(audit)
    try:
        await asyncio.wait({work}, timeout=SILENT_SECONDS_MAX)
    except asyncio.CancelledError:
        work.cancel()
        raise
    if work.done():
        return AuditAnswer.of(work.result())
    # The framework accepts a response as the return value of a handler.
    return cast("AuditAnswer", Stream(_stream(work, now_ms), media_type="application/json"))


async def _stream(work: asyncio.Task[AuditReport], now_ms: int) -> AsyncGenerator[bytes]:
    try:
        while not work.done():
            yield _WHITE
            await asyncio.wait({work}, timeout=SILENT_SECONDS_MAX)
        try:
            answer = AuditAnswer.of(work.result())
        except (ReservationError, StoreUnavailable, StoreUncertain, OSError) as error:
            # The status is sent: only the report can still carry the error.
            log.warning("audit_failed", reason=str(error))
            answer = _failed_report(error, now_ms)
        yield msgspec.json.encode(answer)
    finally:
        work.cancel()


def _failed_report(error: Exception, now_ms: int) -> AuditAnswer:
    problem = f"the audit failed: {error or type(error).__name__}"
    return AuditAnswer(ok=False, checked_at=as_wire(now_ms), lag=0, skus=[], problems=[problem])
