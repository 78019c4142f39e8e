"""The floor: the service's own server, and a handler that decodes a prepare and answers it.

No framework, no token, no Redis: what is left is what this server costs in Python at least.
"""

import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from api.prepare_path import Asked
from api.schemas import PrepareRequest
from benchmarks.servers.listening import serve

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_CONTENT_TYPE = b"content-type: application/json\r\n"


class Answer(msgspec.Struct, rename="camel"):
    """As many members as a hold's answer has."""

    order_id: str
    sale_id: str
    status: str
    amount: int
    items: list[Any]


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
    def may_take(method: bytes, url: bytes) -> bool:
        """Whether `take` is for this request."""
        del url
        return method == b"POST"

    @staticmethod
    def take(url: bytes, headers: Headers, body: bytes, asked: Asked) -> bool:
        """Answer at once."""
        del url, headers
        content = answer_to(body)
        asked.answer(201, b"%bcontent-length: %d\r\n" % (_CONTENT_TYPE, len(content)), content)
        return True


def answer_to(body: bytes) -> bytes:
    """Decode a prepare, and encode as much as a hold's answer has."""
    wish = _decoder.decode(body)
    return _encoder.encode(
        Answer("bench-000000000000000000000000", "bench", "HELD", wish.amount, wish.items)
    )


async def _answer(send: Send, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
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
