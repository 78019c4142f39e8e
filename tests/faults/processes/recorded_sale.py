"""Recorded sale: one that ran on its own server, and copies of its files.

Each answer is recorded with the number of the last event and the length of the file then, so that
for any shorter file the answers before its end are known.
"""

import random
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.domain.events import GENESIS, chain_of
from reservation.domain.payment import Cause, Reason
from reservation.domain.sale import Item
from reservation.domain.states import HOLDING, Status
from tests.support.in_process import Bench, bench

__all__ = ["Answered", "RecordedSale", "contents", "record", "started", "whole"]

BUYERS: Final = 60
#: After this many of them SQL gets no more events: a later cut is unknown to SQL.
FLUSHED_BUYERS: Final = 35
ITEMS: Final = tuple(
    Item(sku=sku, name=sku.upper(), price=1000, total=100, limit_per_buyer=10) for sku in "ab"
)


class Answered(msgspec.Struct, frozen=True):
    """The state of the sale at an answer."""

    seq: int
    file_bytes: int


class RecordedSale(msgspec.Struct, frozen=True, kw_only=True):
    """The files and answers of the sale."""

    #: The data directory: Redis' files, and SQLite.
    folder: Path
    sale_id: str
    #: In chronological order.
    answers: list[Answered]
    flushed_seq: int

    @property
    def file(self) -> Path:
        """The file that is appended to."""
        return appended_file(self.folder)

    def copy(self, to: Path) -> "RecordedSale":
        """A copy of all of it, to be damaged."""
        shutil.copytree(self.folder, to, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
        return msgspec.structs.replace(self, folder=to)

    def last_answer(self, file_bytes: int) -> int:
        """The number of the last answered event, in a file of this length."""
        return max((a.seq for a in self.answers if a.file_bytes <= file_bytes), default=0)


def appended_file(folder: Path) -> Path:
    """The file being written; older ones exist as well during a rewrite."""
    files = (folder / "valkey" / "appendonlydir").glob("*.incr.aof")
    return max(files, key=lambda file: int(file.name.split(".")[-3]))


@asynccontextmanager
async def started(folder: Path) -> AsyncGenerator[Bench]:
    """A server and a service on this directory.

    Raises:
        EmbeddedServerError: the server refuses the files.
    """
    server = EmbeddedServer(folder)
    await server.start()
    try:
        async with bench(folder, server.url) as made:
            yield made
    finally:
        await server.stop()


async def record(folder: Path, draw: random.Random) -> RecordedSale:
    """Run a sale, and end its server by SIGKILL."""
    server = EmbeddedServer(folder)
    await server.start()
    answers: list[Answered] = []
    flushed_seq = 0
    try:
        async with bench(folder, server.url) as made:
            sale_id = await made.sale(items=ITEMS)

            async def note() -> int:
                # No other client writes meanwhile, so the file holds this answer and no later one.
                seq = await _seq(made, sale_id)
                answers.append(Answered(seq, appended_file(folder).stat().st_size))
                return seq

            await note()
            for number in range(BUYERS):
                if number == FLUSHED_BUYERS:
                    await made.flush(sale_id)
                    flushed_seq = await note()
                order = await made.hold(sale_id, buyer=f"buyer-{number}")
                await note()
                match draw.choice(["pays", "pays", "leaves", "waits", "comes back"]):
                    case "pays":
                        claimed = await made.claim(order)
                        await note()
                        await made.finish(order, claimed.fence)
                        await note()
                    case "leaves":
                        await made.service.releases.release(order, reason=Reason(Cause.BUYER))
                        await note()
                    case "comes back":
                        await made.claim(order)
                        await note()
                    case _:
                        pass
    finally:
        server.kill()
        await server.stop()
    return RecordedSale(folder=folder, sale_id=sale_id, answers=answers, flushed_seq=flushed_seq)


async def _seq(made: Bench, sale_id: str) -> int:
    key = made.service.keys.of(sale_id).sale
    return int(await made.service.connections.command("HGET", key, "seq") or 0)


async def whole(made: Bench, sale_id: str) -> int:
    """Check that Redis is consistent, whatever SQL has; the number of its last event."""
    keys = made.service.keys.of(sale_id)
    command = made.service.connections.command
    seq = await _seq(made, sale_id)
    if seq == 0:
        assert await made.keys(sale_id) == []
        return 0
    counted: dict[str, dict[str, int]] = {sku: {"held": 0, "sold": 0} for sku in "ab"}
    for key in await made.keys(sale_id):
        if ":order:" in key:
            status, items = await command("HMGET", key, "status", "items")
            counter = "held" if Status(status) in HOLDING else "sold"
            if Status(status) in {*HOLDING, Status.CONFIRMED}:
                for sku, quantity, *_ in msgspec.json.decode(items):
                    counted[sku][counter] += quantity
    counters = await made.service.sale_store.counters(sale_id)
    assert counters is not None
    for sku, (total, available, held, sold) in counters.stocks.items():
        assert total == available + held + sold
        assert (held, sold) == (counted[sku]["held"], counted[sku]["sold"])
    assert counters.seq == seq
    assert counters.last_outbox_id == f"{seq}-0"
    await _chained(made, sale_id, counters.chain)
    assert keys.outbox in await made.keys(sale_id)
    return seq


async def _chained(made: Bench, sale_id: str, last: str) -> None:
    """The events left in the outbox form one chain, which ends at the sale's chain value."""
    events = await made.service.outbox.after(sale_id, 0, 10_000)
    chain = GENESIS if events and events[0].seq == 1 else None
    for before, event in zip([None, *events], events, strict=False):
        assert before is None or event.seq == before.seq + 1
        if chain is not None:
            assert event.chain == chain_of(
                chain,
                seq=event.seq,
                event=event.event,
                order_id=event.order_id,
                at_ms=event.at_ms,
                data=event.data,
            )
        chain = event.chain
    assert not events or events[-1].chain == last


async def contents(url: str, *, flushed_seq: int) -> dict[Any, Any]:
    """The server's state, in a form that compares across servers.

    It excludes the reader's position, which follows SQL's own; the events that SQL has already, of
    which the outbox keeps the last until the next trim; and the counters of the prepare rate, which
    expire within seconds.
    """
    async with Redis.from_url(url, protocol=2) as client:
        found: dict[Any, Any] = {}
        for key in sorted(await client.keys("*")):
            if ":rate:" in str(key):
                continue
            match await client.type(key):
                case b"hash":
                    fields = await client.hgetall(key)
                    # The id of a call. If damaged, a repeat gets no claim; the settler takes over.
                    fields.pop(b"claim_id", None)
                    found[key] = fields
                case b"zset" if str(key).endswith(":confirming'"):
                    # A lease may end at any time within the hour; only its members are compared.
                    found[key] = await client.zrange(key, 0, -1)
                case b"zset":
                    found[key] = await client.zrange(key, 0, -1, withscores=True)
                case b"set":
                    found[key] = await client.smembers(key)
                case b"stream":
                    found[key] = await client.xrange(key, min=f"({flushed_seq}-0")
                case _:
                    found[key] = await client.get(key)
        return found
