"""Floor of the comparison: the service's own server, and a handler that decodes and answers.

No framework, no token, no Redis: the rest is the minimum cost of this server in Python. The answer
is a hold's whole answer, made of the service's own schema; only its computed members (ids, times,
signatures) are fixed.
"""

import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from api.http.connection.head import Head
from api.http.fastpath.handler import DirectRequest
from api.http.schemas.reservations import (
    LineAnswer,
    PaymentAnswer,
    PrepareRequest,
    ReservationAnswer,
)
from benchmarks.contenders.listening import serve
from reservation.domain.states import Status

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

#: The headers of a hold's answer.
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-type", b"application/json"),
    (b"x-request-id", b"0" * 16),
]
_LINES = b"".join(b"%b: %b\r\n" % header for header in _HEADERS)


#: As long as the service's own are.
_ORDER_ID = "bench-" + "0" * 24
_CUSTOMER_KEY = "0" * 32
_TOKEN = "v1.00000000." + "0" * 168 + "." + "0" * 43
_BACK = "http://127.0.0.1:8000/v1/payments/toss"
_TIME = "2026-01-01T00:00:00.000Z"
_PRICE = 39_000

_decoder = msgspec.json.Decoder(PrepareRequest)
_encoder = msgspec.json.Encoder()


class Floor:
    """Any path, any method: by the service's own short way where the server has one, or as ASGI."""

    def __init__(self, *, short_way: bool) -> None:
        self.state = SimpleNamespace(prepare_path=self if short_way else None)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        message = await receive()
        body: bytes = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        await _answer(send, answer_to(body) if body else b"{}")

    @staticmethod
    def accepts(method: bytes, url: bytes) -> bool:
        """Whether `take` is for this request."""
        del url
        return method == b"POST"

    @staticmethod
    def take(head: Head, body: bytes, asked: DirectRequest) -> bool:
        """Answer at once."""
        del head
        content = answer_to(body)
        asked.answer(201, b"%bcontent-length: %d\r\n\r\n%b" % (_LINES, len(content), content))
        return True


def answer_to(body: bytes) -> bytes:
    """Decode a prepare, and encode a hold's answer."""
    wish = _decoder.decode(body)
    items = [LineAnswer(sku=line.sku, quantity=line.quantity, price=_PRICE) for line in wish.items]
    payment = PaymentAnswer(
        provider="toss",
        client_key="test_gck_sandbox",
        customer_key=_CUSTOMER_KEY,
        success_url=f"{_BACK}/success?token={_TOKEN}",
        fail_url=f"{_BACK}/fail?token={_TOKEN}",
        checkout_url=None,
    )
    return _encoder.encode(
        ReservationAnswer(
            order_id=_ORDER_ID,
            sale_id="bench",
            status=Status.HELD,
            items=items,
            amount=wish.amount,
            currency="KRW",
            order_name="Hoodie",
            created_at=_TIME,
            updated_at=_TIME,
            expires_at=_TIME,
            token=_TOKEN,
            payment=payment,
        )
    )


async def _answer(send: Send, body: bytes) -> None:
    headers = [*_HEADERS, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


if __name__ == "__main__":
    serve(Floor(short_way="--asgi" not in sys.argv))
