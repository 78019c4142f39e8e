"""The vouch: which sales were compared with SQL in this life of the server, for who cannot ask SQL.

A process that starts while SQL is away may sell what another one has compared: the record names the
server's life, so after a restart, a failover or a restored file it counts for nothing.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotPermitted, StoreUnavailable, good, life_of
from reservation.adapters.redis.keys import Keys

__all__ = ["Vouches"]


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """As JSON under `rsv:vouched`."""

    #: As `replies.life_of` names it.
    life: str
    #: Sale id -> the epoch that SQL vouched for.
    epochs: dict[str, str]


class Vouches:
    """Reads and keeps the record."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._key = keys.vouched
        self._kept: _Record | None = None

    async def keep(self, life: str, epochs: Mapping[str, str]) -> None:
        """Record what was compared in this life, where that is not what was recorded last.

        Raises:
            StoreUnavailable, StoreUncertain: it may not be kept.
        """
        found, _ = await self._look(("PING",))
        record = _Record(life, dict(epochs))
        if found != life or not life or record == self._kept:
            return
        # Where the server has changed since, it names another life and counts for nothing.
        await self._connections.command("SET", self._key, msgspec.json.encode(record).decode())
        self._kept = record

    async def read(self) -> tuple[str, dict[str, str] | None]:
        """The server's life, and the sales that were compared in it.

        None where none were, or where the server does not tell which life this is.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not answer, or is a replica.
        """
        life, text = await self._look(("GET", self._key))
        if not life or text is None:
            return life, None
        try:
            record = msgspec.json.decode(text, type=_Record)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return life, None  # A hand in the data: as good as none.
        return life, record.epochs if record.life == life else None

    async def _look(self, command: tuple[str, ...]) -> tuple[str, Any]:
        """The server's life, empty where it is hidden, and the reply to one more command."""
        info, reply = await self._connections.pipeline([("INFO", "server", "replication"), command])
        shown = "" if isinstance(info, NotPermitted) else good(info)
        if self._connections.note_role(shown):
            raise StoreUnavailable("the server is a replica")
        return life_of(shown) if shown else "", good(reply)
