"""The vouch: which sales were compared with SQL in this life of the server, for who cannot ask SQL.

A process that starts while SQL is away may sell what another one has compared: the record names the
server's life, so after a restart, a failover or a restored file it counts for nothing.
"""

from collections.abc import Mapping

import msgspec

from reservation.redis.connection import Connections
from reservation.redis.keys import Keys
from reservation.redis.replies import good, run_id_of

__all__ = ["Vouches"]


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """As JSON under `rsv:vouched`."""

    #: The server's run id and the id of its replication history.
    life: str
    #: Sale id -> the epoch that SQL vouched for.
    epochs: dict[str, str]


class Vouches:
    """Reads and keeps the record."""

    def __init__(self, connections: Connections, keys: Keys) -> None:
        self._connections = connections
        self._key = keys.vouched
        self._kept: _Record | None = None

    async def keep(self, run_id: str, epochs: Mapping[str, str]) -> None:
        """Record what was compared in this life, where that is not what was recorded last.

        Raises:
            StoreUnavailable, StoreUncertain: it may not be kept.
        """
        found, life, _ = await self._life()
        record = _Record(life, dict(epochs))
        if found != run_id or not life or record == self._kept:
            return
        # Where the server has changed since, it names another life and counts for nothing.
        await self._connections.command("SET", self._key, msgspec.json.encode(record).decode())
        self._kept = record

    async def read(self) -> tuple[str, dict[str, str] | None]:
        """The server's run id, and the sales that were compared in this life of it.

        None where none were, or where the server does not tell which life this is.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not answer.
        """
        run_id, life, text = await self._life(("GET", self._key))
        if not life or text is None:
            return run_id, None
        try:
            record = msgspec.json.decode(text, type=_Record)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return run_id, None  # A hand in the data: as good as none.
        return run_id, record.epochs if record.life == life else None

    async def _life(self, *more: tuple[str, ...]) -> tuple[str, str, str | None]:
        """The run id, the life's name, and one more reply; both empty where they are hidden."""
        replies = await self._connections.pipeline(
            [("INFO", "server"), ("INFO", "replication"), *more]
        )
        # A replica that was promoted, or a master that went through a failover and came back, has
        # another history although its process is the same.
        server, replication = (reply if isinstance(reply, str) else "" for reply in replies[:2])
        run_id, history = run_id_of(server), _field(replication, "master_replid")
        life = f"{run_id} {history}" if run_id and history else ""
        return run_id, life, good(replies[2]) if more else None


def _field(info: str, name: str) -> str:
    for line in info.splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""
