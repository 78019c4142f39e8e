"""Responses of the sandbox: whole, truncated, dripped, or replaced by another body."""

import asyncio
import secrets
from collections.abc import Callable

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from reservation.sandbox.faults import Fault, FaultRequest
from reservation.sandbox.refusals import Refusal

__all__ = ["CutAnswer", "Reply", "faulty_response", "full_response", "injected_response", "refused"]

#: Fragments of a dripped answer: enough to resemble a slow line.
_DRIP_CHUNKS = 100

#: Far more than any client should be willing to read.
_OVERSIZED_BYTES = 10 * 1024 * 1024

_PAGE = b"<!doctype html><title>502 Bad Gateway</title><h1>502 Bad Gateway</h1>"


class Reply(msgspec.Struct, frozen=True):
    """A status and a JSON body."""

    status: int
    body: bytes


class CutAnswer(ASGIResponse):
    """No answer: the connection ends."""

    def __init__(self) -> None:
        super().__init__(content_length=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        # ASGI has no event for this, so the server's own connection is closed where it is
        # accessible; else the caller gets a head without a body, which is not an answer, either.
        transport = getattr(getattr(receive, "__self__", None), "transport", None)
        abort: Callable[[], None] | None = getattr(transport, "abort", None)
        if abort is None:
            await self.start_response(send)
            return
        abort()
        while (await receive())["type"] != "http.disconnect":
            continue


class _DrippingAnswer(ASGIResponse):
    """A whole answer in slow fragments."""

    def __init__(self, reply: Reply, seconds: float) -> None:
        super().__init__(body=reply.body, status_code=reply.status, headers=_headers())
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await self.start_response(send)
        size = max(1, len(self.body) // _DRIP_CHUNKS)
        chunks = [self.body[at : at + size] for at in range(0, len(self.body), size)]
        for chunk in chunks:
            await asyncio.sleep(self._seconds / len(chunks))
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def full_response(reply: Reply) -> ASGIResponse:
    """The answer without a fault."""
    return ASGIResponse(body=reply.body, status_code=reply.status, headers=_headers())


def refused(refusal: Refusal) -> Reply:
    """The PG's format of a refusal."""
    body = msgspec.json.encode({"code": refusal.code, "message": refusal.message})
    return Reply(refusal.status, body)


def injected_response(fault: Fault) -> ASGIResponse:
    """The answer to a call that was not carried out."""
    match fault:
        case Fault.REFUSE:
            return CutAnswer()
        case Fault.IN_PROGRESS:
            return full_response(refused(Refusal("IDEMPOTENT_REQUEST_PROCESSING")))
        case Fault.RATE_LIMITED:
            return full_response(refused(Refusal("TOO_MANY_REQUESTS")))
        case Fault.REDIRECT:
            return ASGIResponse(status_code=302, headers=[("location", "/elsewhere")])
        case _:
            return full_response(refused(Refusal("FAILED_INTERNAL_SYSTEM_PROCESSING")))


def faulty_response(reply: Reply, rule: FaultRequest) -> ASGIResponse:
    """The answer to a call that was carried out, changed by its fault."""
    match rule.fault:
        case Fault.COMMIT_THEN_DROP:
            return CutAnswer()
        case Fault.ERROR_AFTER_COMMIT:
            return full_response(refused(Refusal("FAILED_INTERNAL_SYSTEM_PROCESSING")))
        case Fault.GARBAGE:
            return ASGIResponse(body=_PAGE, media_type="text/html")
        case Fault.OVERSIZED:
            return full_response(Reply(200, b'{"padding":"' + b"." * _OVERSIZED_BYTES + b'"}'))
        case Fault.SLOW_DRIP:
            return _DrippingAnswer(reply, rule.seconds)
        case _:
            return full_response(_altered(reply, rule.fault))


def _altered(reply: Reply, fault: Fault) -> Reply:
    """The same payment with one member wrong. A refusal has none to change."""
    if reply.status != 200:
        return reply
    payment = msgspec.json.decode(reply.body, type=dict[str, object])
    match fault:
        case Fault.OTHER_ORDER:
            payment["orderId"] = "another-order-of-another-buyer"
        case Fault.OTHER_KEY:
            payment["paymentKey"] = "tboxanother"
        case Fault.OTHER_AMOUNT:
            payment["totalAmount"] = payment["balanceAmount"] = 1
        case Fault.OTHER_CURRENCY:
            payment["currency"] = "USD"
        case _:
            raise ValueError(f"{fault} does not alter the response")
    return Reply(200, msgspec.json.encode(payment))


def _headers() -> list[tuple[str, str]]:
    return [("x-tosspayments-trace-id", secrets.token_hex(16))]
