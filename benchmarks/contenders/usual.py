"""Usual implementation of the sale in Python: Litestar, redis-py, one EVALSHA a request."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
from litestar import Litestar, Request, Response, post
from litestar.params import FromPath
from redis.asyncio import Redis

from api.http.schemas.reservations import PrepareRequest
from benchmarks.contenders.listening import serve
from benchmarks.support.script_call import basket_of, call_of, held_of
from reservation.adapters.redis.scripts import load

SECRET = b"order ids of the benchmark"
CONNECTIONS_MAX = 4_096


class Held(msgspec.Struct, rename="camel"):
    """The answer to a hold."""

    order_id: str
    sale_id: str
    status: str
    amount: int
    created_at: int
    expires_at: int
    items: list[tuple[str, int, int]]


class Refused(msgspec.Struct):
    """The answer to a basket that could not be held."""

    code: str


@post("/v1/sales/{sale_id:str}/reservations", status_code=201)
async def prepare(
    request: Request[Any, Any, Any], sale_id: FromPath[str], data: PrepareRequest
) -> Response[Held | Refused]:
    """Hold one basket."""
    headers = request.headers
    buyer, key = headers["x-buyer"], headers["idempotency-key"]
    basket = basket_of(SECRET, buyer, key, await request.body())
    basket = msgspec.structs.replace(basket, amount=data.amount, quantity=data.items[0].quantity)
    keys, args = call_of(os.environ["BENCH_EPOCH"], [basket])
    redis: Redis = request.app.state.redis
    reply = cast("list[Any]", await redis.evalsha(load("prepare").sha, len(keys), *keys, *args))
    held = held_of(reply)
    if isinstance(held, str):
        return Response(Refused(held), status_code=409)
    return Response(
        Held(
            order_id=basket.order_id,
            sale_id=sale_id,
            status="HELD",
            amount=basket.amount,
            created_at=held.created_at,
            expires_at=held.expires_at,
            items=msgspec.json.decode(held.items, type=list[tuple[str, int, int]]),
        ),
    )


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncGenerator[None]:
    """One client for the process, the script loaded."""
    async with Redis(
        unix_socket_path=os.environ["BENCH_SOCKET"],
        decode_responses=True,
        # Its default of a hundred rejects a larger crowd.
        max_connections=CONNECTIONS_MAX,
    ) as redis:
        await redis.script_load(load("prepare").source)
        app.state.redis = redis
        yield


if __name__ == "__main__":
    serve(Litestar([prepare], lifespan=[lifespan], openapi_config=None, logging_config=None))
