"""The vouch: the sales compared with SQL in this life of the server, for use while SQL is down.

A process that starts while SQL is down may sell the sales that another process has compared. The
record names the server's life, so a restart, a failover or a restored file voids it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotPermitted, StoreUnavailable, life_of, unwrap
from reservation.adapters.redis.keys import Keys

__all__ = ["Vouches"]


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """As JSON under `rsv:vouched`."""

    #: As `errors.life_of` returns it.
    life: str
    #: Sale id -> the epoch that SQL vouched for.
    epochs: dict[str, str]


class Vouches:
    """Reads and writes the record."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._key = keys.vouched
        #: By the server's own name.
        self._written: dict[str, _Record] = {}

    async def keep(self, node: RedisClient, life: str, epochs: Mapping[str, str]) -> None:
        """Record the sales that were compared in this life, where the last record differs.

        Raises:
            StoreUnavailable, StoreUncertain: the write may have failed.
        """
        record = _Record(life, dict(epochs))
        if not life or record == self._written.get(node.identity):
            return
        found, _ = await self._query(node, ("PING",))
        if found != life:
            return
        # Where the server has changed since, the record names another life and is void.
        text = msgspec.json.encode(record).decode()
        await self._connections.command("SET", self._key_at(node), text)
        self._written[node.identity] = record

    async def read(self, node: RedisClient) -> tuple[str, dict[str, str] | None]:
        """The server's life, and the sales that were compared in it.

        None if none were, or if the server hides its life.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not reply, or is a replica.
        """
        life, text = await self._query(node, ("GET", self._key_at(node)))
        if not life or text is None:
            return life, None
        try:
            record = msgspec.json.decode(text, type=_Record)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return life, None  # A manual edit: as good as no record.
        return life, record.epochs if record.life == life else None

    async def forget(self) -> None:
        """Remove the record of each server, because SQL has other epochs now.

        Raises:
            StoreUnavailable, StoreUncertain: a server does not reply.
        """
        await self._connections.know_servers()
        for node in self._connections.nodes:
            # A server without slots has no record.
            if (key := self._connections.key_at(node, self._key)) is not None:
                await self._connections.command("DEL", key)
        self._written.clear()

    def _key_at(self, node: RedisClient) -> str:
        key = self._connections.key_at(node, self._key)
        if key is None:
            # A server without slots has no sales.
            raise StoreUnavailable("the server has no slots")
        return key

    async def _query(self, node: RedisClient, command: tuple[str, ...]) -> tuple[str, Any]:
        """The server's life, empty if hidden, and the reply to one more command."""
        info, reply = await node.unguarded().pipeline([("INFO", "server", "replication"), command])
        shown = "" if isinstance(info, NotPermitted) else unwrap(info)
        if node.note_role(shown):
            raise StoreUnavailable("the server is a replica")
        return life_of(shown) if shown else "", unwrap(reply)
