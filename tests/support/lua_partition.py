"""Lua partition: one partition on a real server, driven by its scripts alone."""

import itertools
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys, lane_of
from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.redis.scripts import load
from tests.support.lua_sale import EPOCH, NOW, LuaSale

#: Partitions of the sale; the tests drive one or two of them.
PARTITIONS = 3
_sales = itertools.count()


class LuaPartition(LuaSale):
    """A partition with units of `a` (10 at 1000, 3 a buyer) and `b` (5 at 500, 5 a buyer)."""

    def __init__(self, connections: RedisClient, sale_id: str = "", partition: int = 0) -> None:
        super().__init__(connections)
        self.partition = partition
        #: The epoch that the partition's SQL would have.
        self.epoch = EPOCH
        self.id = lane_of(sale_id or f"{self.id}-{next(_sales)}", partition)
        self.keys = Keys().of(self.id)

    async def put(self, *, version: int = 0, **changes: Any) -> Any:
        """put_sale.lua; a new partition begins without refills."""
        if version == 0:
            changes.setdefault("refills", 0)
        return await super().put(version=version, **changes)

    async def call(self, name: str, keys: Sequence[str], *args: str | int, **how: Any) -> Any:
        """Run a script under the partition's epoch."""
        if how.get("epoch") is None:
            how["epoch"] = self.epoch
        return await super().call(name, keys, *args, **how)

    async def lend(
        self, receiver: int = 1, sku: str = "a", units: int = 1, *, after: int = 0, **how: Any
    ) -> Any:
        """lend.lua."""
        names = self.keys
        keys = [names.sale, names.deadlines, names.outbox, names.transfers, names.stock(sku)]
        caller_ms = how.pop("caller_ms", NOW.now_ms())
        operation = how.pop("operation", secrets.token_hex(4))
        return await self.call(
            "lend", keys, caller_ms, receiver, sku, units, after, operation, **how
        )

    async def lend_again(
        self, receiver: int = 1, sku: str = "a", *, number: int = 1, up_to: int = 1, **how: Any
    ) -> Any:
        """lend_again.lua."""
        names = self.keys
        keys = [names.sale, names.outbox, names.transfers, names.stock(sku)]
        not_after = self.connections.server_now_ms() + 5_000 - how.pop("late", 0) * 10_000
        epoch = how.pop("epoch", self.epoch)
        args = [not_after, epoch, receiver, sku, number, up_to]
        return await self.connections.call(load("lend_again"), keys, args)

    async def borrow(
        self,
        donor: int = 1,
        sku: str = "a",
        *,
        number: int = 1,
        up_to: int = 1,
        waiting: dict[str, Any] | None = None,
        **how: Any,
    ) -> Any:
        """borrow.lua; `waiting` is the basket that waits for the units."""
        names = self.keys
        skus = [sku, *(each for each in (waiting or {}).get("lines", {}) if each != sku)]
        keys = [names.sale, names.deadlines, names.outbox, names.confirming, names.deposits]
        keys += [names.transfers, *map(names.stock, skus)]
        wish: list[Any] = []
        if waiting is not None:
            keys += names.of_basket(waiting["order"], waiting["buyer"])
            if how.pop("bucket", self.buckets):
                keys.append(names.ended(waiting["buyer"]))
            lines = " ".join(f"{skus.index(s) + 1} {n}" for s, n in waiting["lines"].items())
            wish = [waiting["digest"], waiting["name"], json.dumps(waiting["name"])]
            wish += [waiting["amount"], waiting["admitted"], lines]
        limits = [*how.pop("rate", (0, 0)), *how.pop("sustained", (0, 0))]
        limits.append(how.pop("unpaid_max", 0))
        args = [how.pop("caller_ms", NOW.now_ms()), *map(str, limits), donor, number, up_to]
        return await self.call("borrow", keys, *args, len(skus), *skus, *wish, **how)

    async def reading(self, skus: Sequence[str] = ("a", "b"), **how: Any) -> Any:
        """reading.lua."""
        names = self.keys
        keys = [names.sale, names.deadlines, names.outbox, names.transfers]
        args = [how.pop("partitions", PARTITIONS), *skus]
        return await self.call("reading", [*keys, *map(names.stock, skus)], *args, **how)

    async def refills(self) -> int:
        """How many refills the partition has counted."""
        return int(await self.connections.command("HGET", self.keys.sale, "refills"))

    async def transfers(self) -> dict[str, str]:
        """The partition's transfers: number and units of each direction, peer and SKU."""
        flat = await self.connections.command("HGETALL", self.keys.transfers)
        lots = as_mapping(flat).items()
        return {field: " ".join(text.split(" ")[:2]) for field, text in lots}

    async def last_event(self, back: int = 0) -> tuple[str, dict[str, Any]]:
        """The last event and its data; `back` is the number of later events."""
        entries = await self.connections.command(
            "XREVRANGE", self.keys.outbox, "+", "-", "COUNT", back + 1
        )
        fields = as_mapping(entries[back][1])
        return fields["event"], json.loads(fields["data"])


@pytest.fixture
async def partition(each_server_url: str) -> AsyncIterator[LuaPartition]:
    """An open partition, on Valkey and on Redis 7.0; its invariants are checked at the end."""
    connections = RedisClient(each_server_url, clock=NOW)
    await connections.measure_offset()
    made = LuaPartition(connections)
    assert await made.put() == ["done", "1"]
    yield made
    await made.check()
    await connections.aclose()
