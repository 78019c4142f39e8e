"""Write-behind of the contenders: events of the stream into SQLite, in batches.

The number of a sale's last event is in the same transaction as its rows, so a restart neither loses
nor repeats one, and the streams need no group and no acknowledgements. There is one writer, as
SQLite has one.
"""

import os
import signal
import sqlite3
import time
from types import FrameType
from typing import Any, Final

import msgspec
import redis

from reservation.adapters.redis.keys import Keys

#: Entries of each stream; enough to share the cost of a commit.
_BATCH: Final = 1_000
#: A short batch waits for more events: each commit is synced.
_LINGER_SECONDS: Final = 0.05
#: How soon a writer without events notices that it must end.
_BLOCK_MS: Final = 500
_CURRENCY: Final = "KRW"

#: The cache and the log of the service's own database.
_PRAGMAS: Final = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "cache_size = -65536",
    "wal_autocheckpoint = 8192",
)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS orders (
  order_id TEXT PRIMARY KEY,
  sale_id TEXT NOT NULL,
  buyer_id TEXT NOT NULL,
  status TEXT NOT NULL,
  amount INTEGER NOT NULL,
  currency TEXT NOT NULL,
  order_name TEXT NOT NULL,
  created_at_ms INTEGER NOT NULL,
  expires_at_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS order_lines (
  order_id TEXT NOT NULL,
  sku TEXT NOT NULL,
  quantity INTEGER NOT NULL,
  price INTEGER NOT NULL,
  PRIMARY KEY (order_id, sku)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursors (sale_id TEXT PRIMARY KEY, flushed_seq INTEGER NOT NULL);
"""
_ORDER: Final = "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_LINE: Final = "INSERT INTO order_lines VALUES (?, ?, ?, ?)"
_CURSOR: Final = "INSERT OR REPLACE INTO cursors VALUES (?, ?)"


class Prepared(msgspec.Struct):
    """The data of an event `prepared`."""

    to: str
    buyer: str
    name: str
    amount: int
    expires_at: int = msgspec.field(name="expiresAt")
    items: list[tuple[str, int, int]]


_decoder: Final = msgspec.json.Decoder(Prepared)

Entry = tuple[bytes, dict[bytes, bytes]]


class Writer:
    """Reads the streams of all sales, and writes them to a database."""

    def __init__(self, client: Any, database: sqlite3.Connection) -> None:
        self._client = client
        self._database = database
        database.executescript(_SCHEMA)
        seqs: dict[str, int] = dict(database.execute("SELECT sale_id, flushed_seq FROM cursors"))
        self._sales: dict[bytes, str] = {}
        #: The last event of each stream that the database has.
        self._ids: dict[bytes, bytes] = {}
        keys = Keys()
        for name in client.smembers(keys.sales):
            sale_id = name.decode()
            stream = keys.of(sale_id).outbox.encode()
            self._sales[stream] = sale_id
            self._ids[stream] = b"%d-0" % seqs.get(sale_id, 0)

    def run_once(self) -> int:
        """Write the next batch; the number of its events."""
        found: list[tuple[bytes, list[Entry]]]
        found = self._client.xread(self._ids, count=_BATCH, block=_BLOCK_MS)
        if not found:
            return 0
        self._write(found)
        with self._client.pipeline(transaction=False) as pipeline:
            for stream, entries in found:
                self._ids[stream] = last = entries[-1][0]
                # The last entry stays: the script compares it with the sale.
                pipeline.xtrim(stream, minid=last, approximate=False)
            pipeline.execute()
        return sum(len(entries) for _, entries in found)

    def _write(self, found: list[tuple[bytes, list[Entry]]]) -> None:
        orders: list[tuple[object, ...]] = []
        lines: list[tuple[object, ...]] = []
        cursors: list[tuple[str, int]] = []
        for stream, entries in found:
            sale_id = self._sales[stream]
            cursors.append((sale_id, int(entries[-1][0].removesuffix(b"-0"))))
            for _, event in entries:
                if event[b"event"] != b"prepared":
                    continue
                order_id, data = event[b"order"].decode(), _decoder.decode(event[b"data"])
                orders.append(
                    (
                        order_id, sale_id, data.buyer, data.to, data.amount, _CURRENCY, data.name,
                        int(event[b"at"]), data.expires_at,
                    )
                )  # fmt: skip
                lines += [(order_id, *item) for item in data.items]
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        database.executemany(_ORDER, orders)
        database.executemany(_LINE, lines)
        database.executemany(_CURSOR, cursors)
        database.execute("COMMIT")


def main() -> None:
    """Write until SIGTERM."""
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        ended.append(number)

    signal.signal(signal.SIGTERM, end)
    database = sqlite3.connect(os.environ["BENCH_DATABASE"], isolation_level=None)
    for pragma in _PRAGMAS:
        database.execute(f"PRAGMA {pragma}")
    # Bytes and the older protocol: nothing is decoded or built that is not needed.
    with redis.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], protocol=2) as client:
        writer = Writer(client, database)
        while not ended:
            if 0 < writer.run_once() < _BATCH:
                time.sleep(_LINGER_SECONDS)
    database.close()


if __name__ == "__main__":
    main()
