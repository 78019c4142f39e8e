"""The store of sales in Redis: settings, counters, and the operator's changes."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import (
    StoreUnavailable,
    StoreUncertain,
    UnexpectedReply,
    unwrap,
)
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_event, as_mapping, as_number, as_sale
from reservation.adapters.redis.script_results import (
    AuditWord,
    PutSaleWord,
    RestockWord,
    SwitchWord,
)
from reservation.adapters.redis.script_runner import ScriptRunner, members_json
from reservation.adapters.redis.scripts import load
from reservation.domain.errors import (
    BrokenInvariant,
    IdempotencyKeyReused,
    InsufficientAvailable,
    InvalidSale,
    PreconditionFailed,
    PreconditionRequired,
    SaleClosed,
    SaleRecovering,
    SkuNotFound,
    TotalTooLow,
)
from reservation.domain.sale import TOTAL_MAX, Item, Sale
from reservation.domain.states import SaleStatus

__all__ = ["Counters", "SaleStore"]

#: Errors of reading a damaged sale: a wrong type, a missing field, or text that is not a number.
_DAMAGED: Final = (UnexpectedReply, msgspec.DecodeError, KeyError, ValueError, IndexError)

#: Tries of a read whose items change meanwhile: operators change them less often than that.
READ_ROUNDS_MAX: Final = 5
#: Sales of one round trip: about a millisecond of the server's single thread.
SALES_AT_ONCE: Final = 200


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """A sale's head and counters, read at one instant (audit.lua)."""

    seq: int
    chain: str
    epoch: str
    last_outbox_id: str
    deadlines: int
    confirming: int
    deposits: int
    at_ms: int
    #: SKU -> total, available, held, sold.
    stocks: dict[str, tuple[int, int, int, int]]


class SaleStore:
    """Reads and changes sales."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._calls = ScriptRunner(connections)
        self._keys = keys
        #: The ids of the last read.
        self._ids: tuple[str, ...] = ()

    async def ids(self) -> list[str]:
        """The ids of all sales, sorted.

        In a cluster, if the master of the set does not answer, the result of the last read.
        """
        try:
            ids = sorted(await self._connections.command("SMEMBERS", self._keys.sales))
        except (StoreUnavailable, StoreUncertain):
            if not self._connections.is_cluster or not self._ids:
                raise
            return list(self._ids)
        self._ids = tuple(ids)
        return ids

    def is_away(self, sale_id: str) -> bool:
        """Whether the sale's master in a cluster does not answer; other sales are served."""
        node = self._connections.node_of(sale_id)
        return self._connections.is_cluster and (node is None or node.is_away)

    async def count(self) -> int:
        """The number of all sales."""
        return int(await self._connections.command("SCARD", self._keys.sales))

    async def exists(self, sale_id: str) -> bool:
        """Whether Redis has a sale of this id."""
        try:
            epoch = await self._connections.command("HGET", self._keys.of(sale_id).sale, "epoch")
        except UnexpectedReply:
            return True  # Damaged, but it exists.
        return epoch is not None

    async def heads(self, sale_ids: Sequence[str] | None = None) -> dict[str, tuple[str, int]]:
        """Epoch and seq of these sales, by default of every one; ("", -1) for a damaged hash.

        A sale that Redis does not have is left out.
        """
        heads = dict[str, tuple[str, int]]()
        if sale_ids is None:
            sale_ids = await self.ids()
        for start in range(0, len(sale_ids), SALES_AT_ONCE):
            some = sale_ids[start : start + SALES_AT_ONCE]
            replies = await self._connections.pipeline(
                [("HMGET", self._keys.of(sale_id).sale, "epoch", "seq") for sale_id in some]
            )
            for sale_id, reply in zip(some, replies, strict=True):
                if isinstance(reply, UnexpectedReply):
                    heads[sale_id] = "", -1
                    continue
                if isinstance(reply, StoreUnavailable | StoreUncertain):
                    # One master of several is away (`is_away`).
                    continue
                epoch, seq = unwrap(reply)
                # An announced sale has no hash yet.
                if epoch is not None:
                    number = as_number(seq)
                    heads[sale_id] = epoch, -1 if number is None else number
        return heads

    async def ends(self, sale_ids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """The epoch of each sale, and the time of its end or last change, in Unix ms.

        Sales whose hash or last event cannot be read are omitted.
        """
        found: dict[str, tuple[str, int]] = {}
        for start in range(0, len(sale_ids), SALES_AT_ONCE):
            some = sale_ids[start : start + SALES_AT_ONCE]
            commands: list[tuple[str | int, ...]] = []
            for sale_id in some:
                names = self._keys.of(sale_id)
                commands.append(("HMGET", names.sale, "epoch", "closes_at"))
                commands.append(("XREVRANGE", names.outbox, "+", "-", "COUNT", 1))
            replies = iter(await self._connections.pipeline(commands))
            for sale_id in some:
                head, last = next(replies), next(replies)
                try:
                    epoch, closes_at = unwrap(head)
                    [(entry_id, flat)] = unwrap(last)
                    at_ms = as_event(sale_id, entry_id, flat).at_ms
                    found[sale_id] = epoch or "", max(int(closes_at), at_ms)
                except (*_DAMAGED, BrokenInvariant, TypeError):
                    continue
        return found

    async def read_many(self, sale_ids: Sequence[str]) -> dict[str, Sale | Exception | None]:
        """These sales with their counters; an exception for a damaged one, None for a gone one."""
        found: dict[str, Sale | Exception | None] = {}
        for start in range(0, len(sale_ids), SALES_AT_ONCE):
            some = sale_ids[start : start + SALES_AT_ONCE]
            replies = await self._connections.pipeline(
                [("HGETALL", self._keys.of(sale_id).sale) for sale_id in some]
            )
            fields: dict[str, dict[str, str]] = {}
            skus: dict[str, list[str]] = {}
            for sale_id, reply in zip(some, replies, strict=True):
                try:
                    fields[sale_id] = as_mapping(unwrap(reply))
                    skus[sale_id] = _skus_of(fields[sale_id])
                except _DAMAGED as error:
                    found[sale_id] = error
            stocks = await self._stocks(skus)
            for sale_id in skus:
                try:
                    found[sale_id] = _joined(sale_id, fields[sale_id], stocks[sale_id])
                except _DAMAGED as error:
                    found[sale_id] = error
        return found

    async def _stocks(self, skus: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
        """The stock hash, as replied, of each item of these sales."""
        wanted = [(sale_id, sku) for sale_id, names in skus.items() for sku in names]
        replies: list[Any] = []
        for start in range(0, len(wanted), SALES_AT_ONCE):
            replies += await self._connections.pipeline(
                [
                    ("HGETALL", self._keys.of(sale_id).stock(sku))
                    for sale_id, sku in wanted[start : start + SALES_AT_ONCE]
                ]
            )
        stocks: dict[str, dict[str, Any]] = {sale_id: {} for sale_id in skus}
        for (sale_id, sku), reply in zip(wanted, replies, strict=True):
            stocks[sale_id][sku] = reply
        return stocks

    async def read(self, sale_id: str) -> Sale | None:
        """The sale with its counters, or None if Redis has none.

        The counters of one SKU are read together; those of two may be an instant apart.
        """
        keys = self._keys.of(sale_id)
        for _ in range(READ_ROUNDS_MAX):
            fields = as_mapping(await self._connections.command("HGETALL", keys.sale))
            if not fields:
                return None
            skus = msgspec.json.decode(fields["skus"], type=list[str])
            replies = await self._connections.pipeline(
                [("HGETALL", keys.stock(sku)) for sku in skus]
            )
            stocks = {
                sku: as_mapping(unwrap(reply)) for sku, reply in zip(skus, replies, strict=True)
            }
            # An empty hash: the item left the sale between the two reads.
            if all(stocks.values()):
                return as_sale(sale_id, fields, stocks)
        return None

    @property
    def requires_acks(self) -> bool:
        """Whether replicas must acknowledge changes."""
        return self._connections.acks.wanted > 0

    async def counters(self, sale_id: str) -> Counters | None:
        """Every counter of the sale at one instant, or None if Redis has no such sale."""
        keys = self._keys.of(sale_id)
        for _ in range(READ_ROUNDS_MAX):
            text = await self._connections.command("HGET", keys.sale, "skus")
            if text is None:
                return None
            skus = msgspec.json.decode(text, type=list[str])
            reply = await self._connections.call(
                load("audit"),
                [
                    keys.sale,
                    keys.outbox,
                    keys.deadlines,
                    keys.confirming,
                    keys.deposits,
                    *(keys.stock(sku) for sku in skus),
                ],
                [text],
            )
            if reply[0] == AuditWord.COUNTERS:
                return _counters(skus, reply[1:])
        return None

    async def announce(self, sale_id: str) -> None:
        """Add the id to the set of sales, before the sale's own keys are written."""
        await self._connections.command("SADD", self._keys.sales, sale_id)

    async def put(
        self,
        sale_id: str,
        *,
        epoch: str,
        version: int,
        digest: str,
        settings: Mapping[str, str],
        items: Sequence[Item],
        leaving: Sequence[str],
        data: str,
    ) -> int:
        """Create (version 0) or change a sale (put_sale.lua); returns its version.

        Args:
            version: the version that the caller read, 0 to create.
            digest: of the whole change; repeated, it gets the same answer.
            settings: fields of the sale's hash.
            items: the items of the sale, in order.
            leaving: SKUs of the version that was read, but not among the items.
            data: the event's data, JSON.

        Raises:
            PreconditionRequired, PreconditionFailed, InvalidSale, TotalTooLow, SaleRecovering.
        """
        keys = self._keys.of(sale_id)
        skus = [item.sku for item in items]
        fields = [part for pair in settings.items() for part in pair]
        rows = [
            part
            for item in items
            for part in (item.sku, item.name, item.price, item.total, item.limit_per_buyer)
        ]
        reply = await self._calls.run(
            "put_sale",
            sale_id,
            epoch=epoch,
            keys=[keys.sale, keys.outbox, *(keys.stock(sku) for sku in [*skus, *leaving])],
            args=[
                version,
                digest,
                msgspec.json.encode(skus).decode(),
                data,
                len(settings),
                len(items),
                *fields,
                *rows,
            ],
        )
        word = PutSaleWord(reply[0])
        return int(reply[1]) if word is PutSaleWord.DONE else _put_refusal(word, reply[1:])

    async def restock(
        self,
        sale_id: str,
        *,
        epoch: str,
        operation: str,
        digest: str,
        sku: str,
        delta: int,
        members: dict[str, str],
    ) -> None:
        """Add units of one item, or withdraw free ones (restock.lua).

        Raises:
            SkuNotFound, InsufficientAvailable, InvalidSale, IdempotencyKeyReused, SaleRecovering.
        """
        keys = self._keys.of(sale_id)
        reply = await self._calls.run(
            "restock",
            sale_id,
            epoch=epoch,
            keys=[keys.sale, keys.outbox, keys.operations, keys.stock(sku)],
            args=[operation, digest, sku, delta, TOTAL_MAX, members_json(members)],
        )
        match RestockWord(reply[0]):
            case RestockWord.DONE:
                return
            case RestockWord.KEY_REUSED:
                raise IdempotencyKeyReused
            case RestockWord.SKU_NOT_FOUND:
                raise SkuNotFound(sku=sku)
            case RestockWord.INSUFFICIENT:
                raise InsufficientAvailable(available={sku: int(reply[1])})
            case RestockWord.TOO_MANY:
                raise InvalidSale(f"An item may have at most {TOTAL_MAX} units.", sku=sku)
            case RestockWord.TOO_LATE | RestockWord.RECOVERING | RestockWord.WENT_BACK:
                raise AssertionError(reply)

    async def switch(
        self, sale_id: str, *, epoch: str, status: SaleStatus, operator: str, reason: str
    ) -> None:
        """Pause, resume or close a sale (switch.lua).

        Raises:
            SaleClosed: it was closed for good.
            SaleRecovering.
        """
        keys = self._keys.of(sale_id)
        data = {"status": status.value, "operator": operator, "reason": reason}
        reply = await self._calls.run(
            "switch",
            sale_id,
            epoch=epoch,
            keys=[keys.sale, keys.outbox],
            args=[status.value, msgspec.json.encode(data).decode()],
        )
        if reply[0] == SwitchWord.CLOSED:
            raise SaleClosed("A closed sale cannot be reopened.")


def _skus_of(fields: Mapping[str, str]) -> list[str]:
    return msgspec.json.decode(fields["skus"], type=list[str]) if fields else []


def _joined(sale_id: str, fields: Mapping[str, str], replies: Mapping[str, Any]) -> Sale | None:
    stocks = {sku: as_mapping(unwrap(reply)) for sku, reply in replies.items()}
    # An empty hash: the item left the sale between the two reads.
    return as_sale(sale_id, fields, stocks) if fields and all(stocks.values()) else None


def _put_refusal(word: PutSaleWord, facts: Sequence[str]) -> NoReturn:
    match word:
        case PutSaleWord.EXISTS:
            raise PreconditionRequired
        case PutSaleWord.CHANGED:
            raise PreconditionFailed
        case PutSaleWord.FIXED:
            raise InvalidSale(f"{facts[0]} cannot be changed after the sale is created.")
        case PutSaleWord.TOTAL_TOO_LOW:
            raise TotalTooLow(sku=facts[0], heldAndSold=int(facts[1]))
        case PutSaleWord.ITEM_IN_USE:
            raise InvalidSale("An item with held or sold units cannot be removed.", sku=facts[0])
        case PutSaleWord.RECOVERING:
            raise SaleRecovering
        case PutSaleWord.TOO_LATE | PutSaleWord.WENT_BACK | PutSaleWord.DONE:
            raise AssertionError(word)


def _counters(skus: Sequence[str], facts: Sequence[str]) -> Counters:
    numbers = [int(text) if text else 0 for text in facts[8:]]
    rows = [tuple(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
    return Counters(
        seq=int(facts[0]),
        chain=facts[1],
        epoch=facts[2],
        last_outbox_id=facts[3],
        deadlines=int(facts[4]),
        confirming=int(facts[5]),
        deposits=int(facts[6]),
        at_ms=int(facts[7]),
        stocks={sku: (row[0], row[1], row[2], row[3]) for sku, row in zip(skus, rows, strict=True)},
    )
