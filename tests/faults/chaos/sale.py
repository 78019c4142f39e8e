"""Sale under attack: its crowd, the polls of its head from outside, and the judgement on it."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import redis

from loadtests.recording import Heads, write_history
from reservation.verification.balance_check import books_of, disagreements, unsettled
from reservation.verification.model.history_format import DECODER, Head, Operation
from reservation.verification.model.report import Judgement
from reservation.verification.verify import Unreadable, verify
from tests.faults.chaos.clients import Orders, Summary
from tests.faults.chaos.environment import Stage
from tests.support.service import item, sale_document

__all__ = ["Sale", "SaleReport", "arrive", "judged", "observe_heads", "opened"]

#: Between two polls of the head: bounds an answer to the few events of this time.
OBSERVE_SECONDS = 0.02
#: Limit for writing the history of a sale, and judging it.
PAST_SECONDS_MAX = 600.0
#: A crowd completes its last lives: each may wait several times for a hanging PG.
CROWD_SECONDS_MAX = 240.0
#: A service that is deployed while its Redis is down takes longer.
OPEN_SECONDS_MAX = 120.0
ORDERS_PAGE = 100


class SaleReport(msgspec.Struct, frozen=True, kw_only=True):
    """One sale, judged."""

    sale_id: str
    stock: int
    hold_seconds: int
    judgement: Judgement
    problems: list[str]


class Sale(msgspec.Struct, kw_only=True):
    """A sale in progress."""

    sale_id: str
    stock: int
    hold_seconds: int
    prices: dict[str, int]
    files: list[Path]
    heads: list[Head]


async def opened(stage: Stage, chance: random.Random) -> Sale:
    """A sale of three items, with too few units of each."""
    sale_id = f"chaos-{chance.getrandbits(40):010x}"
    hold_seconds = chance.choice([1, 2, 3, 8])
    totals = [chance.choice([1, 50, 400, 4000]) for _ in range(3)]
    items = [
        item(sku, total=total, price=chance.choice([1000, 19_000]), limitPerBuyer=2)
        for sku, total in zip("abc", totals, strict=True)
    ]
    document = sale_document(
        holdSeconds=hold_seconds,
        holdPolicy=chance.choice(["prepare", "prepare", "prepare", "success"]),
        items=items,
    )
    give_up_at = time.monotonic() + OPEN_SECONDS_MAX
    while True:
        with suppress(httpx.HTTPError):
            answer = await stage.operate("PUT", f"/v1/admin/sales/{sale_id}", json=document)
            # 428: it was created, and the answer was lost.
            if answer.status_code in {201, 428}:
                break
        assert time.monotonic() < give_up_at, "no sale could be opened"
        await asyncio.sleep(0.3)
    return Sale(
        sale_id=sale_id,
        stock=sum(totals),
        hold_seconds=hold_seconds,
        prices={one["sku"]: one["price"] for one in items},
        files=[],
        heads=[],
    )


async def arrive(
    stage: Stage, sale: Sale, chance: random.Random, buyers: int, seconds: float
) -> Summary:
    file = stage.folder / f"{sale.sale_id}-{len(sale.files)}.jsonl"
    sale.files.append(file)
    orders = Orders(
        urls=stage.urls,
        environ=stage.environ,
        sale_id=sale.sale_id,
        prices=sale.prices,
        hold_seconds=sale.hold_seconds,
        seconds=seconds,
        buyers=buyers,
        seed=chance.getrandbits(63),
        file=str(file),
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.chaos.clients",
        msgspec.json.encode(orders).decode(),
        stdout=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds + CROWD_SECONDS_MAX):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return msgspec.json.decode(output, type=Summary)


def observe_heads(stage: Stage, sale: Sale, over: asyncio.Event) -> None:
    """Poll the head past the faulty network, in its own thread."""
    heads = Heads(stage.settings, sale.sale_id, sale.prices)
    while not over.is_set():
        with suppress(redis.RedisError):
            sale.heads.append(heads.observe())
        time.sleep(OBSERVE_SECONDS)
    heads.close()


async def judged(
    stage: Stage, sale: Sale, audit: dict[str, Any], entries: list[dict[str, Any]]
) -> SaleReport:
    """Audit, books and history of one sale."""
    orders = await _orders(stage, sale.sale_id)
    books = books_of(sale.sale_id, audit=audit, orders=orders, entries=entries)
    judgement, problems = await asyncio.to_thread(_verified, stage, sale, books.entries)
    return SaleReport(
        sale_id=sale.sale_id,
        stock=sale.stock,
        hold_seconds=sale.hold_seconds,
        judgement=judgement,
        problems=[*disagreements(books), *unsettled(books), *problems],
    )


async def _orders(stage: Stage, sale_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query = {"saleId": sale_id, "limit": str(ORDERS_PAGE)}
    while True:
        answer = await stage.operate("GET", "/v1/admin/orders", params=query)
        page = answer.raise_for_status().json()
        found += page["orders"]
        if page["nextCursor"] is None:
            return found
        query["cursor"] = page["nextCursor"]


def _verified(
    stage: Stage, sale: Sale, entries: list[dict[str, Any]]
) -> tuple[Judgement, list[str]]:
    """The judgement on the sale's history, written by the service's own command."""
    path = stage.folder / f"{sale.sale_id}.jsonl"
    command = [sys.executable, "-m", "api.cli", "history", sale.sale_id]
    ended = subprocess.run(
        command,
        capture_output=True,
        timeout=PAST_SECONDS_MAX,
        check=False,
        env=os.environ | stage.environ,
    )
    if ended.returncode:
        return Judgement(ok=False), [f"no history: {ended.stderr.decode(errors='replace')}"]
    write_history(path, calls=_calls(sale), past=ended.stdout, entries=entries)
    try:
        judgement = verify(path)
    except Unreadable as error:
        return Judgement(ok=False), [f"the history cannot be read: {error}"]
    if not judgement.violation_count:
        for file in (path, *sale.files):
            file.unlink()
    return judgement, []


def _calls(sale: Sale) -> Iterator[Operation | Head]:
    for file in sale.files:
        for record in DECODER.decode_lines(file.read_bytes()):
            assert isinstance(record, Operation)
            yield record
    yield from sale.heads
