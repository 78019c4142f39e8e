"""Writes a sale into Redis during a rebuild, fenced by an epoch that only the rebuild has.

A retirement fences off the sale in the same way, and removes it.
"""

from collections.abc import AsyncIterable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import (
    NotPermitted,
    StoreUnavailable,
    UnexpectedReply,
    life_of,
    unwrap,
)
from reservation.adapters.redis.fences import RETIRING_EPOCH
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.script_results import RemakeWord, RetireWord
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.adapters.redis.tombstones import TOMBSTONE_SEQ
from reservation.domain.errors import SaleRecovering
from reservation.domain.reservation import Reservation

__all__ = ["RedisSaleHead", "RetireRefusal", "SaleWriter", "Writes"]

log = structlog.get_logger(__name__)

#: Writes of one call: under 10 ms of the server's single thread.
WRITES_MAX: Final = 600
#: Keys scanned, and at most removed, in one step.
SCAN_COUNT: Final = 1_000
#: Errors of reading a damaged head: a wrong type, a missing field, or text that is not a number.
_DAMAGED: Final = (UnexpectedReply, KeyError, ValueError, IndexError)
#: A page of orders, each with its buyer.
SomeOrders = Sequence[tuple[str, str]]


class RedisSaleHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a sale in Redis, and the chain values of some events in the outbox."""

    epoch: str
    seq: int
    chain: str
    #: The chain values of the requested events that the outbox has, by seq.
    chains: Mapping[int, str] = {}

    def chain_at(self, seq: int) -> str | None:
        """The chain value of this event; None if the outbox does not have it."""
        return self.chains.get(seq)


class RetireRefusal(msgspec.Struct, frozen=True):
    """The reason why a sale cannot be retired yet."""

    word: RetireWord
    #: The number of orders in progress, or of the sale's last event.
    count: int = 0


class Writes:
    """A batch of unconditional writes, sent in one call."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.writes: list[list[str | int]] = []
        self._positions: dict[str, int] = {}

    def hset(self, key: str, fields: Mapping[str, str | int]) -> None:
        """Set fields of a hash."""
        flat = [part for pair in fields.items() for part in (pair[0], str(pair[1]))]
        self.writes.append(["HSET", self._position(key), *flat])

    def hdel(self, key: str, field: str) -> None:
        """Remove a field of a hash."""
        self.writes.append(["HDEL", self._position(key), field])

    def unlink(self, key: str) -> None:
        """Remove a key."""
        self.writes.append(["UNLINK", self._position(key)])

    def zadd(self, key: str, member: str, score: int) -> None:
        """Set a member of a sorted set."""
        self.writes.append(["ZADD", self._position(key), str(score), member])

    def text(self) -> str:
        """The batch as restore.lua's argument."""
        return msgspec.json.encode(self.writes).decode()

    @property
    def full(self) -> bool:
        return len(self.writes) >= WRITES_MAX

    def _position(self, key: str) -> int:
        position = self._positions.get(key)
        if position is None:
            self.keys.append(key)
            position = self._positions[key] = len(self.keys)
        return position


class SaleWriter:
    """The steps of a rebuild that touch Redis; each may be repeated."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._calls = ScriptRunner(connections)
        self._outbox = RedisOutbox(connections, keys)
        self._keys = keys

    async def read_head(self, sale_id: str, seq: int) -> RedisSaleHead | None:
        """The sale's head, and the outbox at one event; None if Redis has no such sale."""
        _, found = await self.read_heads({sale_id: (seq,)})
        return found[sale_id]

    async def read_heads(
        self, seqs: Mapping[str, Collection[int]], node: RedisClient | None = None
    ) -> tuple[str, dict[str, RedisSaleHead | None]]:
        """The heads of several sales, and the life of the server that has them.

        The head of a missing or damaged sale is None: both need a rebuild.

        Args:
            seqs: sale id -> the events at which its outbox is read.
            node: the server of these sales, in a cluster; by default that of the first sale.

        Raises:
            StoreUnavailable: the server is a replica, whose sales are another server's.
        """
        commands: list[tuple[str | int, ...]] = [("INFO", "server", "replication")]
        for sale_id, wanted in seqs.items():
            names = self._keys.of(sale_id)
            commands.append(("HMGET", names.sale, "epoch", "seq", "chain"))
            commands += [("XRANGE", names.outbox, f"{seq}-0", f"{seq}-0") for seq in wanted]
        # A sale that moves meanwhile is read at its new master.
        server = node.unguarded() if node is not None and not seqs else self._connections
        info, *answers = await server.pipeline(commands)
        replies = iter(answers)
        # The server's ACL may deny INFO; preflight reports it, and an operator may vouch for it.
        shown = "" if isinstance(info, NotPermitted) else unwrap(info)
        if (node or self._connections).note_role(shown):
            raise StoreUnavailable("the server is a replica")
        found: dict[str, RedisSaleHead | None] = {}
        for sale_id, wanted in seqs.items():
            of_sale = [next(replies) for _ in range(1 + len(wanted))]
            try:
                head, *entries = [unwrap(reply) for reply in of_sale]
                found[sale_id] = _found(head, entries)
            except _DAMAGED as error:
                # One damaged sale must not keep the others closed.
                log.debug("sale_head_unreadable", sale_id=sale_id, reason=str(error))
                found[sale_id] = None
        return life_of(shown) if shown else "", found

    async def epoch(self, sale_id: str) -> str:
        """The sale's epoch in Redis; empty if it has none."""
        return await self._connections.command("HGET", self._keys.of(sale_id).sale, "epoch") or ""

    async def fence_off(
        self, sale_id: str, fields: Mapping[str, str], *, epoch: str, instead_of: str
    ) -> None:
        """Put the sale under the rebuild's own epoch: from here on every script refuses it.

        One atomic write, so that concurrent readers find a complete sale.

        Args:
            sale_id: the sale.
            fields: the fields of its hash, except the epoch.
            epoch: the new one.
            instead_of: the epoch before SQL was read: if another rebuild has begun since, that read
                is stale.

        Raises:
            SaleRecovering: the sale is under another epoch.
        """
        await self._connections.command("SADD", self._keys.sales, sale_id)
        writes = Writes()
        writes.hset(self._keys.of(sale_id).sale, {**fields, "epoch": epoch})
        try:
            await self.write(sale_id, writes, epoch=instead_of)
        except SaleRecovering:
            # The reply to the first try may have been lost.
            if await self.epoch(sale_id) != epoch:
                raise

    async def has_keys(self, sale_id: str) -> bool:
        """Whether Redis has a key of the sale besides its hash.

        Every sale has an outbox, and every order was in one of the other keys or in the outbox.
        """
        return await self._connections.command("EXISTS", *self._own_keys(sale_id)) > 0

    def _own_keys(self, sale_id: str) -> list[str]:
        names = self._keys.of(sale_id)
        sets = (names.deadlines, names.confirming, names.deposits)
        return [*sets, names.operations, names.outbox, names.transfers]

    async def clear(
        self, sale_id: str, *, epoch: str, orders: AsyncIterable[SomeOrders], skus: Iterable[str]
    ) -> None:
        """Remove every key of the sale but its hash, a few at a time.

        Args:
            sale_id: the sale.
            epoch: the epoch that fences it off.
            orders: its orders and their buyers, a page at a time.
            skus: its items.

        Raises:
            SaleRecovering: another rebuild of this sale has begun and owns its keys.
        """
        names = self._keys.of(sale_id)
        async for page in orders:
            writes = Writes()
            for order_id, buyer_id in page:
                for key in names.of_basket(order_id, buyer_id):
                    writes.unlink(key)
                writes = await self._write_when_full(sale_id, writes, epoch)
            await self.write(sale_id, writes, epoch=epoch)
        writes = Writes()
        for sku in skus:
            writes.unlink(names.stock(sku))
            writes = await self._write_when_full(sale_id, writes, epoch)
        for bucket in names.all_ended():
            writes.unlink(bucket)
            writes = await self._write_when_full(sale_id, writes, epoch)
        # The sale's hash stays, and has no tombstones from here on.
        writes.hdel(names.sale, TOMBSTONE_SEQ)
        # Last, because `has_keys` reads them.
        for key in self._own_keys(sale_id):
            writes.unlink(key)
        await self.write(sale_id, writes, epoch=epoch)

    async def clear_unknown(self, sale_id: str, *, epoch: str) -> None:
        """Remove orders, items and buyers that SQL does not have; it scans all keys of the server.

        Raises:
            SaleRecovering: another rebuild of this sale has begun and owns its keys.
        """
        kept = {self._keys.of(sale_id).sale, *self._own_keys(sale_id)}
        async for keys in self._connections.scan(f"{self._keys.of(sale_id).all}*", SCAN_COUNT):
            writes = Writes()
            for key in keys:
                if key not in kept:
                    writes.unlink(key)
            await self.write(sale_id, writes, epoch=epoch)

    async def _write_when_full(self, sale_id: str, writes: Writes, epoch: str) -> Writes:
        if not writes.full:
            return writes
        await self.write(sale_id, writes, epoch=epoch)
        return Writes()

    async def fence_retired(
        self, sale_id: str, head: RedisSaleHead, *, ended_ms: int
    ) -> RetireRefusal | None:
        """Fence off a sale in which nothing is in progress (retire.lua); None if it succeeds.

        Args:
            sale_id: the sale.
            head: its last event, as SQL has it.
            ended_ms: minimum time since its end and last change; 0 at an operator's request.

        Raises:
            SaleRecovering: the sale is under another epoch.
        """
        names = self._keys.of(sale_id)
        reply = await self._calls.run_unmarked(
            "retire",
            epoch=head.epoch,
            keys=[names.sale, names.deadlines, names.confirming, names.deposits, names.outbox],
            args=[head.seq, head.chain, ended_ms, RETIRING_EPOCH],
        )
        word = RetireWord(reply[0])
        return None if word is RetireWord.DONE else RetireRefusal(word, *map(int, reply[1:]))

    async def fence_again(self, sale_id: str, *, epoch: str) -> None:
        """Fence off a retired sale that a server with an older state has again.

        Args:
            sale_id: the sale, retired in SQL.
            epoch: its epoch in SQL.

        Raises:
            SaleRecovering: its epoch changed meanwhile.
        """
        found = await self.epoch(sale_id)
        if found in ("", RETIRING_EPOCH + epoch):
            return
        log.warning("retired_sale_came_back", sale_id=sale_id)
        writes = Writes()
        writes.hset(self._keys.of(sale_id).sale, {"epoch": RETIRING_EPOCH + epoch})
        await self.write(sale_id, writes, epoch=found)

    async def remove_retired(
        self, sale_id: str, *, epoch: str, orders: AsyncIterable[SomeOrders], skus: Iterable[str]
    ) -> None:
        """Remove every key of a fenced-off sale; its hash and its id in the set come last.

        Args:
            sale_id: the sale.
            epoch: its epoch in SQL.
            orders: its orders and their buyers, a page at a time.
            skus: its items.

        Raises:
            SaleRecovering: the sale is not fenced off.
        """
        # Without the hash, an earlier call has removed all but the id in the set.
        if await self.epoch(sale_id):
            fence = RETIRING_EPOCH + epoch
            await self.clear(sale_id, epoch=fence, orders=orders, skus=skus)
            writes = Writes()
            writes.unlink(self._keys.of(sale_id).sale)
            await self.write(sale_id, writes, epoch=RETIRING_EPOCH + epoch)
        await self._connections.command("SREM", self._keys.sales, sale_id)

    async def write(self, sale_id: str, writes: Writes, *, epoch: str) -> None:
        """Send a batch (restore.lua).

        Raises:
            SaleRecovering: another rebuild of this sale has begun.
        """
        if writes.writes:
            await self._calls.run_unmarked(
                "restore",
                epoch=epoch,
                keys=[self._keys.of(sale_id).sale, *writes.keys],
                args=[writes.text()],
            )

    async def begin_outbox(
        self, sale_id: str, *, epoch: str, after_seq: int, event: str, data: str
    ) -> None:
        """Append the first event after SQL's last (reopen.lua), and create the consumer group."""
        names = self._keys.of(sale_id)
        await self._calls.run_unmarked(
            "reopen", epoch=epoch, keys=[names.sale, names.outbox], args=[event, data]
        )
        await self._outbox.ensure_group(sale_id, after_seq)

    async def remake(self, order: Reservation, *, epoch: str) -> tuple[RemakeWord, list[str]]:
        """Take the hold of a lost order again (remake.lua).

        Returns:
            The result word and its facts: with `due` the overdue holds whose end may help.

        Raises:
            SaleRecovering: another rebuild of this sale has begun.
        """
        names = self._keys.of(order.sale_id)
        items = [[line.sku, line.quantity, line.price] for line in order.lines]
        reply = await self._calls.run_unmarked(
            "remake",
            epoch=epoch,
            keys=[
                names.sale,
                names.deadlines,
                names.outbox,
                names.order(order.order_id),
                names.buyer(order.buyer_id),
                names.buyer_orders(order.buyer_id),
                names.ended(order.buyer_id),
                *(names.stock(line.sku) for line in order.lines),
            ],
            args=[
                order.order_id,
                order.buyer_id,
                msgspec.json.encode(items).decode(),
                order.amount,
                order.order_name,
                msgspec.json.encode(order.order_name).decode(),
                order.digest,
            ],
        )
        return RemakeWord(reply[0]), reply[1:]

    async def hand_over(self, sale_id: str, *, epoch: str, to_epoch: str) -> None:
        """End the fencing: set the epoch that SQL vouches for."""
        writes = Writes()
        writes.hset(self._keys.of(sale_id).sale, {"epoch": to_epoch})
        try:
            await self.write(sale_id, writes, epoch=epoch)
        except SaleRecovering:
            # The reply to the first try may have been lost.
            if await self.epoch(sale_id) != to_epoch:
                raise


def _found(head: Sequence[str | None], answers: Sequence[Sequence[Any]]) -> RedisSaleHead | None:
    epoch, seq, chain = head
    if seq is None or chain is None:
        return None
    entries = [entry for answer in answers for entry in answer]
    chains = {int(name.partition("-")[0]): as_mapping(flat)["chain"] for name, flat in entries}
    return RedisSaleHead(epoch=epoch or "", seq=int(seq), chain=chain, chains=chains)
