"""The floor: the service's own server, and a handler that decodes a prepare and answers it.

No framework, no token, no Redis: what is left is what this server costs in Python at least.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from api.schemas import PrepareRequest
from benchmarks.servers.listening import serve

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Answered(msgspec.Struct, rename="camel"):
    """As many members as a hold's answer has."""

    order_id: str
    sale_id: str
    status: str
    amount: int
    items: list[Any]


_decoder = msgspec.json.Decoder(PrepareRequest)
_encoder = msgspec.json.Encoder()


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Any path, any method."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
        return
    message = await receive()
    body: bytes = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    if not body:
        await _answer(send, b"{}")
        return
    wish = _decoder.decode(body)
    answer = Answered("bench-000000000000000000000000", "bench", "HELD", wish.amount, wish.items)
    await _answer(send, _encoder.encode(answer))


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
    serve(application)
