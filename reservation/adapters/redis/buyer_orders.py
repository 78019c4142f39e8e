"""Finds a buyer's live orders in a sale."""

from typing import Final

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import unwrap
from reservation.adapters.redis.keys import SaleKeys

__all__ = ["live_orders"]

#: Orders of one buyer searched for live ones, and the batch size.
BUYER_ORDERS_MAX: Final = 100_000
ORDERS_AT_ONCE: Final = 1_000


async def live_orders(
    connections: RedisClient, names: SaleKeys, buyer_id: str, limit: int
) -> list[str]:
    """The ids of the buyer's orders in any of the sale's sorted sets, newest first.

    Raises:
        StoreUnavailable, StoreUncertain: Redis does not reply.
    """
    sets = (names.deadlines, names.confirming, names.deposits)
    live: list[str] = []
    for first in range(0, BUYER_ORDERS_MAX, ORDERS_AT_ONCE):
        last = first + ORDERS_AT_ONCE - 1
        order_ids = await connections.command(
            "ZREVRANGE", names.buyer_orders(buyer_id), first, last
        )
        if not order_ids:
            break
        scores = await connections.pipeline([("ZMSCORE", key, *order_ids) for key in sets])
        found = zip(*map(unwrap, scores), strict=True)
        live += [
            order_id
            for order_id, places in zip(order_ids, found, strict=True)
            if any(score is not None for score in places)
        ]
        if len(live) >= limit or len(order_ids) < ORDERS_AT_ONCE:
            break
    return live[:limit]
