"""Ends holds whose deadline has passed, many in one call."""

from collections.abc import Container, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import UnexpectedReply, as_reply, unwrap
from reservation.adapters.redis.keys import Keys, SaleKeys
from reservation.adapters.redis.mapping import as_items
from reservation.adapters.redis.script_results import ExpireWord
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.domain.clock import Clock
from reservation.domain.reservation import Line

__all__ = ["EXPIRE_BATCH", "Ended", "Expiry", "Hold", "OverdueHolds"]

log = structlog.get_logger(__name__)

#: Orders that one expire call takes: 4 ms of the server's single thread.
EXPIRE_BATCH: Final = 200

#: Overdue holds whose lines one search reads in one call: 10 ms of the server's thread.
SEARCHED_MAX: Final = 10_000
SEARCHED_AT_ONCE: Final = 500


class Hold(msgspec.Struct, frozen=True):
    """The buyer and the lines of a hold."""

    buyer_id: str
    lines: tuple[Line, ...]


class Ended(msgspec.Struct, frozen=True):
    """The result of one call for a batch of orders."""

    #: Holds that this call expired, and those that had no deadline any more.
    expired: int = 0
    settled: int = 0
    #: The orders that no call can expire: damaged or missing.
    damaged: tuple[str, ...] = ()
    #: The error that the first damaged order raised.
    error: Exception | None = None

    @property
    def freed_stock(self) -> bool:
        """Whether any of the orders holds nothing more since it was named."""
        return self.expired + self.settled > 0


class OverdueHolds(msgspec.Struct, frozen=True):
    """Overdue holds by order id, the oldest first."""

    holds: dict[str, Hold]
    #: Whether there are no others.
    complete: bool


class Expiry:
    """Runs expire.lua for orders that are due."""

    def __init__(
        self, connections: RedisClient, calls: ScriptRunner, keys: Keys, *, clock: Clock
    ) -> None:
        self._connections = connections
        self._calls = calls
        self._keys = keys
        self._clock = clock

    async def __call__(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> int:
        """Expire those of the orders that are due (expire.lua); returns their number.

        Raises:
            UnexpectedReply, DecodeError: the error of the first damaged order, if no hold ended;
                where others ended, the error is only logged.
        """
        ended = await self.end(sale_id, order_ids, epoch=epoch)
        if ended.error is not None and not ended.expired:
            raise ended.error
        return ended.expired

    async def end(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        """Expire those of the orders that are due (expire.lua), at most EXPIRE_BATCH.

        Damaged orders are logged and left as they are.
        """
        keys = self._keys.of(sale_id)
        asked = order_ids[:EXPIRE_BATCH]
        found = await self._holds(keys, asked)
        whole = {one: reply for one, reply in found.items() if not isinstance(reply, Exception)}
        answers = await self._run(sale_id, whole, epoch) if whole else {}
        by_order = found | answers
        wrong = {one: reply for one, reply in by_order.items() if isinstance(reply, Exception)}
        error = next(iter(wrong.values()), None)
        if error is not None:
            order_id = next(iter(wrong))
            log.error("holds_damaged", count=len(wrong), order_id=order_id, reason=str(error))
        words = list(answers.values())
        return Ended(
            expired=words.count(ExpireWord.EXPIRED),
            settled=words.count(ExpireWord.SETTLED),
            damaged=tuple(one for one in asked if one in wrong or one not in found),
            error=error,
        )

    async def overdue(
        self,
        sale_id: str,
        skus: AbstractSet[str],
        *,
        skip: Container[str],
        limit: int = EXPIRE_BATCH,
    ) -> OverdueHolds:
        """The overdue holds with any of these items, at most `limit`, without the orders in `skip`.

        Holds whose lines cannot be read are left out.
        """
        keys = self._keys.of(sale_id)
        time, _ = await self._connections.pipeline([("TIME",), ("EXISTS", keys.sale)])
        seconds, micros = unwrap(time)
        server_ms = int(seconds) * 1000 + int(micros) // 1000
        # One snapshot: holds that end during the search do not shift its pages.
        order_ids = await self._connections.command(
            "ZRANGEBYSCORE",
            keys.deadlines,
            "-inf",
            min(server_ms, self._clock.now_ms()),
            "LIMIT",
            0,
            SEARCHED_MAX + 1,
        )
        left = [one for one in order_ids[:SEARCHED_MAX] if one not in skip]
        holds: dict[str, Hold] = {}
        for start in range(0, len(left), SEARCHED_AT_ONCE):
            page = await self._holds(keys, left[start : start + SEARCHED_AT_ONCE])
            for order_id, hold in page.items():
                if isinstance(hold, Exception) or skus.isdisjoint(line.sku for line in hold.lines):
                    continue
                holds[order_id] = hold
                if len(holds) == limit:
                    return OverdueHolds(holds, complete=False)
        return OverdueHolds(holds, complete=len(order_ids) <= SEARCHED_MAX)

    async def _holds(self, keys: SaleKeys, order_ids: Sequence[str]) -> dict[str, Hold | Exception]:
        """The buyer and lines of each order that exists; an exception for an unreadable one."""
        replies = await self._connections.pipeline(
            [("HMGET", keys.order(order_id), "buyer", "items") for order_id in order_ids]
        )
        found: dict[str, Hold | Exception] = {}
        for order_id, reply in zip(order_ids, replies, strict=True):
            try:
                buyer_id, items = unwrap(reply)
                if buyer_id is not None and items is not None:
                    found[order_id] = Hold(buyer_id, as_items(items))
            except (UnexpectedReply, msgspec.DecodeError) as error:
                found[order_id] = error
        return found

    async def _run(self, sale_id: str, found: dict[str, Hold], epoch: str) -> dict[str, Any]:
        """The script's result for each order: one of its words, or an exception."""
        keys = self._keys.of(sale_id)
        order_keys: list[str] = []
        pairs: list[str | int] = []
        for order_id, hold in found.items():
            order_keys += (keys.order(order_id), keys.buyer(hold.buyer_id))
            order_keys += [keys.stock(line.sku) for line in hold.lines]
            pairs += (order_id, len(hold.lines))
        answers = await self._calls.run(
            "expire",
            sale_id,
            epoch=epoch,
            keys=[keys.sale, keys.deadlines, keys.outbox, *order_keys],
            args=[self._clock.now_ms(), *pairs],
            # A later hold of these units is acknowledged, and with it this earlier change.
            acked=False,
        )
        return dict(zip(found, map(as_reply, answers), strict=True))
