"""Reads a whole sale for the audit, a few keys at a time, so that no call blocks the server."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import unwrap
from reservation.adapters.redis.keys import Keys, order_field
from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.tombstones import TombstoneStore
from reservation.domain.reservation import Reservation

__all__ = ["AuditReader", "BuyerState", "OrderRecord", "OrderState", "SaleRecord"]

#: Keys of one round trip: about a millisecond of the server's single thread.
KEYS_AT_ONCE: Final = 200
#: Orders summed per buyer; the limit per buyer keeps real lists far shorter.
BUYER_ORDERS_MAX: Final = 1_000


class BuyerState(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer's hash and the buyer's orders."""

    counted: dict[str, int]
    orders: tuple[Reservation, ...]


class OrderState(msgspec.Struct, frozen=True, kw_only=True):
    """An order's status, and which of the sale's sorted sets contain it."""

    #: Empty if Redis does not have it.
    status: str
    seq: int
    sets: frozenset[str]


class SaleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A sale's own hashes, verbatim."""

    #: Whether the set of all sales contains it.
    listed: bool
    sale: dict[str, str]
    #: By SKU; empty if Redis has no such item.
    stocks: dict[str, dict[str, str]]
    operations: dict[str, str]


class OrderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An order's hash, verbatim, and its scores in the sorted sets; None if it has none."""

    fields: dict[str, str]
    #: Its score in the buyer's list.
    listed: str | None
    #: Its score in the requested set.
    score: str | None
    #: Its tombstone, if it has one.
    tombstone: str | None = None


class AuditReader:
    """Reads a sale; changes nothing."""

    def __init__(self, connections: RedisClient, keys: Keys, store: ReservationStore) -> None:
        self._connections = connections
        self._keys = keys
        self._store = store
        self.tombstones = TombstoneStore(connections, keys)

    async def buyers(self, sale_id: str, after_seq: int) -> AsyncGenerator[list[str]]:
        """The buyers of the orders in the outbox after this event, a few at a time.

        SQL has the buyers of earlier events. Some may come twice.
        """
        names = self._keys.of(sale_id)
        last = f"{after_seq}-0"
        while entries := await self._connections.command(
            "XRANGE", names.outbox, f"({last}", "+", "COUNT", KEYS_AT_ONCE
        ):
            last = entries[-1][0]
            order_ids = {as_mapping(flat).get("order", "") for _, flat in entries} - {""}
            replies = await self._connections.pipeline(
                [("HGET", names.order(order_id), "buyer") for order_id in sorted(order_ids)]
            )
            yield sorted({buyer_id for buyer_id in map(unwrap, replies) if buyer_id})

    async def counts(self, sale_id: str, buyer_ids: Sequence[str]) -> dict[str, dict[str, int]]:
        """The unit counts in each of these buyers' hashes."""
        names = self._keys.of(sale_id)
        counts: dict[str, dict[str, int]] = {}
        for start in range(0, len(buyer_ids), KEYS_AT_ONCE):
            some = buyer_ids[start : start + KEYS_AT_ONCE]
            replies = await self._connections.pipeline(
                [("HGETALL", names.buyer(buyer_id)) for buyer_id in some]
            )
            for buyer_id, reply in zip(some, replies, strict=True):
                fields = as_mapping(unwrap(reply))
                counts[buyer_id] = {sku: int(quantity) for sku, quantity in fields.items()}
        return counts

    async def states(self, sale_id: str, buyer_ids: Sequence[str]) -> dict[str, BuyerState]:
        """These buyers' hashes and orders; a hash and its orders are read an instant apart."""
        names = self._keys.of(sale_id)
        counts = await self.counts(sale_id, buyer_ids)
        order_ids: dict[str, list[str]] = {}
        for start in range(0, len(buyer_ids), KEYS_AT_ONCE):
            some = buyer_ids[start : start + KEYS_AT_ONCE]
            replies = await self._connections.pipeline(
                [
                    ("ZREVRANGE", names.buyer_orders(buyer_id), 0, BUYER_ORDERS_MAX - 1)
                    for buyer_id in some
                ]
            )
            order_ids |= zip(some, map(unwrap, replies), strict=True)
        orders = await self.reservations([one for ids in order_ids.values() for one in ids])
        return {
            buyer_id: BuyerState(
                counted=counts[buyer_id],
                orders=tuple(orders[one] for one in order_ids[buyer_id] if one in orders),
            )
            for buyer_id in buyer_ids
        }

    async def reservations(self, order_ids: Sequence[str]) -> dict[str, Reservation]:
        """Those of these orders that exist in Redis."""
        found: dict[str, Reservation] = {}
        for start in range(0, len(order_ids), KEYS_AT_ONCE):
            for order in await self._store.read_many(order_ids[start : start + KEYS_AT_ONCE]):
                if order is not None:
                    found[order.order_id] = order
        return found

    async def members(self, sale_id: str) -> AsyncGenerator[list[str]]:
        """The orders in the sale's sorted sets, a few at a time; some may come twice."""
        names = self._keys.of(sale_id)
        for key in (names.deadlines, names.confirming, names.deposits):
            cursor = "0"
            while True:
                cursor, flat = await self._connections.command(
                    "ZSCAN", key, cursor, "COUNT", KEYS_AT_ONCE
                )
                if flat:
                    yield list(flat[::2])
                if cursor == "0":
                    break

    async def orders(self, sale_id: str, order_ids: Sequence[str]) -> dict[str, OrderState]:
        """The states of these orders."""
        states: dict[str, OrderState] = {}
        for start in range(0, len(order_ids), KEYS_AT_ONCE):
            states |= await self._orders(sale_id, order_ids[start : start + KEYS_AT_ONCE])
        return states

    async def _orders(self, sale_id: str, order_ids: Sequence[str]) -> dict[str, OrderState]:
        names = self._keys.of(sale_id)
        sets = {
            "deadlines": names.deadlines,
            "confirming": names.confirming,
            "deposits": names.deposits,
        }
        commands: list[tuple[str, ...]] = []
        for order_id in order_ids:
            commands.append(("HMGET", names.order(order_id), "status", "seq"))
            commands += [("ZSCORE", key, order_id) for key in sets.values()]
        replies = await self._connections.pipeline(commands)
        states: dict[str, OrderState] = {}
        for position, order_id in enumerate(order_ids):
            head, *scores = (unwrap(reply) for reply in replies[position * 4 : position * 4 + 4])
            states[order_id] = OrderState(
                status=head[0] or "",
                seq=int(head[1] or 0),
                sets=frozenset(
                    name for name, score in zip(sets, scores, strict=True) if score is not None
                ),
            )
        return states

    async def sale(self, sale_id: str, skus: Sequence[str]) -> SaleRecord:
        """The sale's own hashes, including those of these items."""
        names = self._keys.of(sale_id)
        listed, *hashes = await self._connections.pipeline(
            [
                ("SISMEMBER", self._keys.sales, sale_id),
                ("HGETALL", names.sale),
                ("HGETALL", names.operations),
                *(("HGETALL", names.stock(sku)) for sku in skus),
            ]
        )
        sale, operations, *stocks = (as_mapping(unwrap(reply)) for reply in hashes)
        return SaleRecord(
            listed=bool(unwrap(listed)),
            sale=sale,
            stocks=dict(zip(skus, stocks, strict=True)),
            operations=operations,
        )

    async def records(
        self, sale_id: str, wanted: Mapping[str, tuple[str, str]]
    ) -> dict[str, OrderRecord]:
        """These orders, verbatim; the parts of one order are read at nearly one instant.

        Args:
            sale_id: the sale of the orders.
            wanted: order id -> its buyer's id, and the sorted set that should contain it:
                `deadlines`, `confirming`, `deposits` or "".
        """
        records: dict[str, OrderRecord] = {}
        order_ids = list(wanted)
        for start in range(0, len(order_ids), KEYS_AT_ONCE):
            some = order_ids[start : start + KEYS_AT_ONCE]
            records |= await self._records(sale_id, {key: wanted[key] for key in some})
        return records

    async def _records(
        self, sale_id: str, wanted: Mapping[str, tuple[str, str]]
    ) -> dict[str, OrderRecord]:
        names = self._keys.of(sale_id)
        commands: list[tuple[str, ...]] = []
        for order_id, (buyer_id, place) in wanted.items():
            commands.append(("HGETALL", names.order(order_id)))
            commands.append(("ZSCORE", names.buyer_orders(buyer_id), order_id))
            commands.append(("HGET", names.ended(buyer_id), order_field(order_id)))
            if place:
                commands.append(("ZSCORE", getattr(names, place), order_id))
        replies = iter([unwrap(reply) for reply in await self._connections.pipeline(commands)])
        return {
            order_id: OrderRecord(
                fields=as_mapping(next(replies)),
                listed=next(replies),
                tombstone=next(replies),
                score=next(replies) if place else None,
            )
            for order_id, (_, place) in wanted.items()
        }
