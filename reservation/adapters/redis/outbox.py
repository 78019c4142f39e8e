"""The outbox's reader: a stream with one consumer group, named for its destination.

SQL must not get ahead of a replica that may be promoted: the sale would be closed until a rebuild.
So the events are read with an acknowledgement by the replicas, where one is required.
"""

from collections.abc import Sequence
from typing import Any, Final

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import (
    StoreUnavailable,
    TooFewReplicas,
    UnexpectedReply,
    unwrap,
)
from reservation.adapters.redis.fences import flushed_epoch
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_event
from reservation.domain.errors import BrokenInvariant
from reservation.domain.events import Event

__all__ = ["GROUP", "UNREADABLE", "RedisOutbox"]

#: The consumer group that flushes to SQL.
GROUP: Final = "sql"
#: All flushers share one consumer name, so that a restarted one finds the pending entries.
CONSUMER: Final = "flusher"

#: The errors of reading a stream that is damaged.
UNREADABLE: Final = (BrokenInvariant, KeyError, ValueError, UnexpectedReply)


class RedisOutbox:
    """Reads events in order, acknowledges them, and trims those that SQL has."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys

    async def ensure_group(self, sale_id: str, after_seq: int) -> None:
        """Create the consumer group, to read after this event; an existing one is unchanged."""
        outbox = self._keys.of(sale_id).outbox
        try:
            await self._connections.command("XGROUP", "CREATE", outbox, GROUP, f"{after_seq}-0")
        except UnexpectedReply as error:
            if "requires the key to exist" in str(error):
                raise StoreUnavailable("the outbox is missing") from error
            if "BUSYGROUP" not in str(error):
                raise

    async def epoch(self, sale_id: str) -> str:
        """The epoch in SQL of the sale's events; empty if Redis lacks the sale or it is damaged."""
        try:
            found = await self._connections.command("HGET", self._keys.of(sale_id).sale, "epoch")
        except UnexpectedReply:
            return ""
        return flushed_epoch(found or "")

    async def read_new(self, sale_id: str, count: int) -> list[Event]:
        """Events that no flusher has read yet.

        Raises:
            TooFewReplicas, NotAcknowledged: replicas may lack them.
        """
        return _events(sale_id, await self._read(sale_id, ">", count))

    async def read_pending(self, sale_id: str, count: int) -> list[Event]:
        """Events that were read and not acknowledged, from the oldest on.

        Entries that another flusher has trimmed are only acknowledged: SQL has them. If that
        flusher died before its acknowledgement, they would block the unwritten entries behind them.

        Raises:
            TooFewReplicas, NotAcknowledged: replicas may lack them.
        """
        outbox = self._keys.of(sale_id).outbox
        while True:
            entries = await self._read(sale_id, "0", count)
            gone = [entry_id for entry_id, flat in entries if not flat]
            if gone:
                await self._connections.command("XACK", outbox, GROUP, *gone)
            if len(gone) < len(entries) or not entries:
                return _events(sale_id, entries)

    async def _read(self, sale_id: str, start: str, count: int) -> list[Any]:
        names = self._keys.of(sale_id)
        command = (
            *("XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", count),
            *("STREAMS", names.outbox, start),
        )
        acks = self._connections.acks_of(names.sale)
        try:
            if acks is None or acks.is_overdue:
                reply = await self._connections.command(*command)
            elif not acks.is_open:
                raise TooFewReplicas("replicas may lack the next events")
            else:
                reply = unwrap((await self._connections.acked_read([command], names.sale))[0])
        except UnexpectedReply as error:
            # Never "empty": Redis has lost the stream, and a rebuild recreates it.
            if str(error).startswith("NOGROUP"):
                raise StoreUnavailable("the outbox or its group is missing") from error
            raise
        return reply[0][1] if reply else []

    async def ack(self, sale_id: str, seqs: Sequence[int]) -> None:
        """Acknowledge events that SQL has committed."""
        if seqs:
            outbox = self._keys.of(sale_id).outbox
            await self._connections.command("XACK", outbox, GROUP, *(f"{seq}-0" for seq in seqs))

    async def trim(self, sale_id: str, below_seq: int) -> None:
        """Trim entries below this event, which stays: the scripts check the last entry."""
        outbox = self._keys.of(sale_id).outbox
        await self._connections.command("XTRIM", outbox, "MINID", f"{below_seq}-0")

    async def after(self, sale_id: str, seq: int, count: int) -> list[Event]:
        """Events after this one, read without the group, for the audit."""
        outbox = self._keys.of(sale_id).outbox
        entries = await self._connections.command(
            "XRANGE", outbox, f"({seq}-0", "+", "COUNT", count
        )
        return [as_event(sale_id, entry_id, flat) for entry_id, flat in entries]

    async def backlog(self, sale_id: str) -> int:
        """The number of unacknowledged events; the last event is kept although SQL has it."""
        outbox = self._keys.of(sale_id).outbox
        return max(0, int(await self._connections.command("XLEN", outbox)) - 1)


def _events(sale_id: str, entries: Sequence[Any]) -> list[Event]:
    return [as_event(sale_id, entry_id, flat) for entry_id, flat in entries if flat]
