"""Progress of a write-behind: the events that SQL lacks, and the rows that it has."""

import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.support.sale import SKU
from reservation.adapters.redis.keys import Keys

__all__ = ["Written"]

#: After a load of some seconds, with the slowest writer.
_DRAIN_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.05


class Written:
    """The database of our service, or of a contender: both have the two tables.

    Args:
        client: of the Redis.
        database: the SQLite file.
        sale_ids: the sales whose events are written to it.
    """

    def __init__(self, client: Any, database: Path, sale_ids: list[str]) -> None:
        self._client = client
        self._database = database
        self._sales = [Keys().of(sale_id) for sale_id in sale_ids]

    def held(self) -> int:
        """Units that are held in all of the sales, by Redis' own count."""
        return self._sum([(sale.stock(SKU), "held") for sale in self._sales])

    def backlog(self) -> int:
        """Events that SQL lacks."""
        # Read before Redis, so that the difference is never negative.
        with self._connected() as database:
            flushed = database.execute("SELECT SUM(flushed_seq) FROM cursors").fetchone()[0] or 0
        return self._sum([(sale.sale, "seq") for sale in self._sales]) - flushed

    def drain(self) -> float:
        """Wait until SQL lacks none; the seconds that it took."""
        began_at = time.monotonic()
        while time.monotonic() < began_at + _DRAIN_SECONDS:
            if self._has_tables() and self.backlog() == 0:
                return time.monotonic() - began_at
            time.sleep(_POLL_SECONDS)
        raise RuntimeError("the write-behind did not write all events to SQL in time")

    def orders(self) -> tuple[int, int]:
        """Orders, and their lines."""
        with self._connected() as database:
            [(orders,)] = database.execute("SELECT COUNT(*) FROM orders")
            [(lines,)] = database.execute("SELECT COUNT(*) FROM order_lines")
        return orders, lines

    def _sum(self, fields: list[tuple[str, str]]) -> int:
        pipeline = self._client.pipeline(transaction=False)
        for key, field in fields:
            pipeline.hget(key, field)
        return sum(int(value or 0) for value in pipeline.execute())

    def _has_tables(self) -> bool:
        if not self._database.exists():
            return False
        with self._connected() as database:
            [(count,)] = database.execute("SELECT COUNT(*) FROM sqlite_master WHERE name='cursors'")
        return bool(count)

    @contextmanager
    def _connected(self) -> Generator[sqlite3.Connection]:
        database = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)
        try:
            yield database
        finally:
            database.close()
