"""Tombstones in Redis: the short records of orders that ended without a claim.

A tombstone replaces an order's hash and its entry in the buyer's list. SQL has the rest of the
order. A buyer's tombstones share a bucket, a hash in which one field counts them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import unwrap
from reservation.adapters.redis.keys import Keys, buyer_field, order_field
from reservation.adapters.redis.mapping import as_mapping, as_number
from reservation.adapters.redis.script_results import RestoreOrderWord
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.domain.states import Status

__all__ = [
    "ORDERS_AT_ONCE",
    "TOMBSTONE_SEQ",
    "Added",
    "Tombstone",
    "TombstoneStore",
    "digest_in",
    "tombstone_text",
]

#: Orders of one call: about 2 ms of the server's single thread.
ORDERS_AT_ONCE: Final = 100
#: The field of a sale's hash that exists once the sale has tombstones.
TOMBSTONE_SEQ: Final = "tombstone_seq"
#: Buckets of one call, when all are listed: under a millisecond.
BUCKETS_AT_ONCE: Final = 512
_TEXT: Final = re.compile(r"[RE] [0-9]+ ([A-Za-z0-9_-]+)")
_LETTERS: Final = {Status.RELEASED: "R", Status.EXPIRED: "E"}


def tombstone_text(status: str, seq: int, digest: str) -> str:
    """A tombstone as Redis has it; empty for a status that no tombstone has."""
    letter = _LETTERS.get(Status(status))
    return f"{letter} {seq} {digest}" if letter else ""


def digest_in(text: str) -> str | None:
    """The digest in a tombstone; None if it is damaged."""
    found = _TEXT.fullmatch(text)
    return found[1] if found else None


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """An order that SQL has, and its tombstone."""

    order_id: str
    buyer_id: str
    text: str


class Added(msgspec.Struct, frozen=True):
    """The result of one call that adds tombstones."""

    #: Orders replaced.
    made: int
    #: Orders or buckets that are damaged; they stay as they are.
    damaged: int


class TombstoneStore:
    """Reads, adds and removes tombstones."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._calls = ScriptRunner(connections)
        self._keys = keys

    async def seqs(self, sale_ids: Sequence[str]) -> dict[str, int]:
        """The event up to which ended orders were replaced, for each sale with tombstones."""
        replies = await self._connections.pipeline(
            [("HGET", self._keys.of(sale_id).sale, TOMBSTONE_SEQ) for sale_id in sale_ids]
        )
        found = {
            sale_id: as_number(unwrap(reply)) or 0 if unwrap(reply) else None
            for sale_id, reply in zip(sale_ids, replies, strict=True)
        }
        return {sale_id: seq for sale_id, seq in found.items() if seq is not None}

    async def read(self, sale_id: str, wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
        """The tombstones that these orders of these buyers have, by order id."""
        pairs = list(wanted)
        names = self._keys.of(sale_id)
        replies = await self._connections.pipeline(
            [("HGET", names.ended(buyer_id), order_field(one)) for one, buyer_id in pairs]
        )
        found = zip((order_id for order_id, _ in pairs), map(unwrap, replies), strict=True)
        return {order_id: text for order_id, text in found if text is not None}

    async def count_of_buyer(self, sale_id: str, buyer_id: str) -> int:
        """The number of the buyer's tombstones; 1 if the count is damaged."""
        key = self._keys.of(sale_id).ended(buyer_id)
        text = await self._connections.command("HGET", key, buyer_field(buyer_id))
        return 0 if text is None else as_number(text) or 1

    async def buckets(self, sale_id: str) -> list[str]:
        """The names of the sale's buckets that exist."""
        names = self._keys.of(sale_id).all_ended()
        found: list[str] = []
        for first in range(0, len(names), BUCKETS_AT_ONCE):
            some = names[first : first + BUCKETS_AT_ONCE]
            replies = await self._connections.pipeline([("EXISTS", name) for name in some])
            found += [name for name, reply in zip(some, replies, strict=True) if int(unwrap(reply))]
        return found

    async def bucket(self, name: str) -> dict[str, str]:
        """The fields of one bucket, at one instant."""
        return as_mapping(await self._connections.command("HGETALL", name))

    def is_bucket_of(self, sale_id: str, name: str, buyer_id: str) -> bool:
        """Whether a buyer's tombstones belong in this bucket."""
        return self._keys.of(sale_id).ended(buyer_id) == name

    async def add(
        self,
        sale_id: str,
        tombstones: Sequence[Tombstone],
        *,
        epoch: str,
        keep_ms: int,
        up_to: int = 0,
    ) -> Added:
        """Replace orders by their tombstones (add_tombstones.lua); at most `ORDERS_AT_ONCE`.

        Args:
            sale_id: their sale.
            tombstones: as SQL has the orders.
            epoch: of the sale.
            keep_ms: time from an order's deadline to its tombstone.
            up_to: the event up to which the sale's ended orders were replaced; 0 leaves it.
        """
        names = self._keys.of(sale_id)
        keys = [names.sale, names.outbox]
        args: list[str | int] = [keep_ms, up_to]
        for one in tombstones:
            keys += (
                names.order(one.order_id),
                names.buyer_orders(one.buyer_id),
                names.ended(one.buyer_id),
            )
            args += (one.order_id, one.text)
        # A failover that loses the tombstones restores the orders.
        reply = await self._calls.run(
            "add_tombstones", sale_id, epoch=epoch, keys=keys, args=args, acked=False
        )
        return Added(*map(int, reply[1:]))

    async def restore(
        self,
        sale_id: str,
        tombstone: Tombstone,
        fields: Mapping[str, str],
        *,
        created_at_ms: int,
        epoch: str,
    ) -> RestoreOrderWord:
        """Replace a tombstone by its order (restore_order.lua).

        Args:
            sale_id: its sale.
            tombstone: as SQL has the order.
            fields: the order's hash.
            created_at_ms: the order's time in its buyer's list.
            epoch: of the sale.

        Raises:
            HoldLost: Redis has neither the order nor a tombstone of it.
        """
        names = self._keys.of(sale_id)
        flat = [part for pair in fields.items() for part in pair]
        reply = await self._calls.run(
            "restore_order",
            sale_id,
            epoch=epoch,
            keys=[
                names.sale,
                names.outbox,
                names.order(tombstone.order_id),
                names.buyer_orders(tombstone.buyer_id),
                names.ended(tombstone.buyer_id),
            ],
            args=[
                tombstone.order_id,
                tombstone.buyer_id,
                created_at_ms,
                tombstone.text,
                *flat,
            ],
            # The acknowledgement of the call that follows covers it.
            acked=False,
        )
        return RestoreOrderWord(reply[0])
