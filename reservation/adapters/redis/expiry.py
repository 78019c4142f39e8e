"""Ends holds whose deadline has passed, many in one call."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import UnexpectedReply, good, told
from reservation.adapters.redis.keys import Keys, SaleKeys
from reservation.adapters.redis.mapping import as_items
from reservation.adapters.redis.script_results import ExpireWord
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.domain.clock import Clock
from reservation.domain.reservation import Line

__all__ = ["EXPIRE_BATCH", "Expiry"]

log = structlog.get_logger(__name__)

#: Orders that one expire call takes: 4 ms of the server's single thread.
EXPIRE_BATCH: Final = 200

#: The buyer and the lines of a hold.
_Held = tuple[str, tuple[Line, ...]]


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
            UnexpectedReply, DecodeError: the error of the first damaged order, where no hold ended;
                where others ended, the error is only logged.
        """
        keys = self._keys.of(sale_id)
        found = await self._buyers_and_lines(keys, order_ids[:EXPIRE_BATCH])
        whole = {one: what for one, what in found.items() if not isinstance(what, Exception)}
        answers = await self._run(sale_id, whole, epoch) if whole else {}
        told_of = found | answers
        wrong = [(one, what) for one, what in told_of.items() if isinstance(what, Exception)]
        expired = list(answers.values()).count(ExpireWord.EXPIRED)
        if wrong:
            order_id, error = wrong[0]
            log.error("holds_damaged", count=len(wrong), order_id=order_id, reason=str(error))
            if not expired:
                raise error
        return expired

    async def _buyers_and_lines(
        self, keys: SaleKeys, order_ids: Sequence[str]
    ) -> dict[str, _Held | Exception]:
        """The buyer and lines of each order that exists; an exception for an unreadable one."""
        replies = await self._connections.pipeline(
            [("HMGET", keys.order(order_id), "buyer", "items") for order_id in order_ids]
        )
        found: dict[str, _Held | Exception] = {}
        for order_id, reply in zip(order_ids, replies, strict=True):
            try:
                buyer_id, items = good(reply)
                if buyer_id is not None and items is not None:
                    found[order_id] = buyer_id, as_items(items)
            except (UnexpectedReply, msgspec.DecodeError) as error:
                found[order_id] = error
        return found

    async def _run(self, sale_id: str, found: dict[str, _Held], epoch: str) -> dict[str, Any]:
        """The script's result for each order: one of its words, or an exception."""
        keys = self._keys.of(sale_id)
        order_keys: list[str] = []
        pairs: list[str | int] = []
        for order_id, (buyer_id, lines) in found.items():
            order_keys += (keys.order(order_id), keys.buyer(buyer_id))
            order_keys += [keys.stock(line.sku) for line in lines]
            pairs += (order_id, len(lines))
        answers = await self._calls.run(
            "expire",
            sale_id,
            epoch=epoch,
            keys=[keys.sale, keys.deadlines, keys.outbox, *order_keys],
            args=[self._clock.now_ms(), *pairs],
        )
        return dict(zip(found, map(told, answers), strict=True))
