"""Sale under attack: its crowd, the polls of its head from outside, and the judgement on it."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import msgspec
import redis

from loadtests.recording import write_history
from reservation.verification.balance_check import BalanceCheck, books_of, disagreements, unsettled
from reservation.verification.model.history_format import (
    DECODER,
    VERSION,
    Head,
    History,
    Operation,
)
from reservation.verification.model.report import Judgement
from reservation.verification.verify import Unreadable, verify
from tests.faults.chaos.clients import Orders, Summary
from tests.faults.chaos.environment import Stage
from tests.faults.chaos.hosts_stage import HostsStage
from tests.faults.chaos.losses import separated
from tests.support.service import item, sale_document

__all__ = [
    "Sale",
    "SaleReport",
    "arrive",
    "judged",
    "observe_heads",
    "opened",
    "without_undecided",
]

#: Between two polls of the head: bounds an answer to the few events of this time.
OBSERVE_SECONDS = 0.02
#: The same once the crowd has left.
OBSERVE_AFTER_SECONDS = 0.5
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
    #: Holds that a failover lost, and the answers of that time, which nothing remains to judge by.
    holds_lost: int = 0
    unjudged: int = 0
    #: The longest time from a fork to its rebuild.
    loss_seconds: float = 0.0
    #: Lost holds whose payment a short run leaves undecided.
    payments_left: int = 0


class Sale(msgspec.Struct, kw_only=True):
    """A sale in progress."""

    sale_id: str
    stock: int
    hold_seconds: int
    prices: dict[str, int]
    files: list[Path]
    heads: list[Head]
    #: Each observes for some time after its crowd has left.
    observers: list[asyncio.Task[None]]

    def folder_files(self, folder: Path) -> list[Path]:
        """Every file of its recording."""
        return list(folder.glob(f"{self.sale_id}*"))


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
            # It was created, and the answer was lost: 200 for the repeat, 428 after another change.
            if answer.status_code in {200, 201, 428}:
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
        observers=[],
    )


async def arrive(
    stage: Stage, sale: Sale, chance: random.Random, buyers: int, seconds: float
) -> Summary:
    file = stage.folder / f"{sale.sale_id}-{len(sale.files)}.jsonl"
    sale.files.append(file)
    tokens = f"{file}.tokens" if isinstance(stage, HostsStage) else ""
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
        tokens=tokens,
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
    """Poll the head past the faulty network, in its own thread, and for some time afterwards."""
    heads = stage.heads(sale.sale_id, sale.prices)

    def observe() -> None:
        with suppress(redis.RedisError):
            sale.heads.append(heads.observe())

    while not over.is_set():
        observe()
        time.sleep(OBSERVE_SECONDS)
    until = time.monotonic() + stage.observed_after_seconds
    while time.monotonic() < until:
        observe()
        time.sleep(OBSERVE_AFTER_SECONDS)
    heads.close()


async def judged(
    stage: Stage, sale: Sale, audit: dict[str, Any], entries: list[dict[str, Any]]
) -> SaleReport:
    """Audit, books and history of one sale."""
    await asyncio.gather(*sale.observers)
    orders = await _orders(stage, sale.sale_id)
    books = books_of(sale.sale_id, audit=audit, orders=orders, entries=entries)
    verdict = await asyncio.to_thread(_verified, stage, sale, books.entries)
    problems = [*disagreements(books), *unsettled(books), *verdict.problems]
    left: set[str] = set()
    if isinstance(stage, HostsStage):
        left, not_told = await _told(stage, sale, verdict.lost)
        if left and not stage.waits_for_payments:
            kept = [entry for entry in books.entries if entry["orderId"] not in left]
            audit = _without(audit, left)
            books = books_of(sale.sale_id, audit=audit, orders=orders, entries=kept)
            verdict = await asyncio.to_thread(_verified, stage, sale, books.entries)
            problems = [*disagreements(books), *verdict.problems]
        if not stage.waits_for_payments:
            decided = without_undecided(books)
            problems = [*disagreements(decided), *_still_held(books), *verdict.problems]
        problems += not_told
        if stage.keeps_all and verdict.lost:
            problems.append(f"{len(verdict.lost)} acknowledged holds are lost")
    if not problems and not verdict.judgement.violation_count:
        for file in sale.folder_files(stage.folder):
            file.unlink()
    return SaleReport(
        sale_id=sale.sale_id,
        stock=sale.stock,
        hold_seconds=sale.hold_seconds,
        judgement=verdict.judgement,
        problems=problems,
        holds_lost=len(verdict.lost),
        unjudged=verdict.unjudged,
        loss_seconds=verdict.loss_seconds,
        payments_left=len(left),
    )


def without_undecided(books: BalanceCheck) -> BalanceCheck:
    """The books without the money of undecided payments, which the PG may have or not."""
    undecided = {
        order_id for order_id, order in books.orders.items() if order["status"] == "CONFIRMING"
    }
    kept = [entry for entry in books.entries if entry["orderId"] not in undecided]
    return msgspec.structs.replace(books, entries=kept)


def _still_held(books: BalanceCheck) -> list[str]:
    """Holds of no undecided payment, and events that SQL does not have."""
    confirming = [order for order in books.orders.values() if order["status"] == "CONFIRMING"]
    units = sum(line["quantity"] for order in confirming for line in order["items"])
    held, lag = books.counted("held"), books.audit.get("lag", 0)
    return [f"{held - units} still held and {lag} events behind"] if held != units or lag else []


def _without(audit: dict[str, Any], left: set[str]) -> dict[str, Any]:
    """The audit without the problems of these orders."""
    problems = audit.get("problems", [])
    others = [one for one in problems if not any(order in one for order in left)]
    return audit | {"problems": others, "ok": audit.get("ok") or bool(problems and not others)}


async def _told(stage: HostsStage, sale: Sale, lost: list[str]) -> tuple[set[str], list[str]]:
    """The lost holds whose payment is undecided; and those whose buyers get a wrong answer."""
    left: set[str] = set()
    if not lost:
        return left, []
    tokens, found = await asyncio.to_thread(_tokens, sale), list[str]()
    async with httpx.AsyncClient(base_url=stage.urls[0], timeout=30, trust_env=False) as client:
        for order in lost:
            path, headers = f"/v1/reservations/{order}", {"X-Reservation-Token": tokens[order]}
            answer = await client.get(path, headers=headers)
            told = answer.json()
            if answer.status_code == 200 and told["status"] == "CONFIRMING":
                left.add(order)
            elif (answer.status_code, told.get("code")) != (409, "hold_lost"):
                found.append(f"{order}: it is lost, and its buyer is told {answer.text[:200]}")
    return left, found


async def _orders(stage: Stage, sale_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query = {"saleId": sale_id, "limit": str(ORDERS_PAGE)}
    while True:
        page = await _page(stage, query)
        found += page["orders"]
        if page["nextCursor"] is None:
            return found
        query["cursor"] = page["nextCursor"]


async def _page(stage: Stage, query: dict[str, str]) -> dict[str, Any]:
    """A page of orders; repeated while SQL of a busy machine does not answer in time."""
    give_up_at = time.monotonic() + OPEN_SECONDS_MAX
    while True:
        answer = await stage.operate("GET", "/v1/admin/orders", params=query)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > give_up_at:
            return answer.raise_for_status().json()
        await asyncio.sleep(1.0)


def _tokens(sale: Sale) -> dict[str, str]:
    """The token of each new order."""
    found: dict[str, str] = {}
    for file in sale.files:
        lines = Path(f"{file}.tokens").read_bytes()
        found |= dict(msgspec.json.Decoder(tuple[str, str]).decode_lines(lines))
    return found


class _Verdict(msgspec.Struct, kw_only=True):
    """The judgement on a sale's history, and its losses."""

    judgement: Judgement
    problems: list[str] = []
    lost: list[str] = []
    unjudged: int = 0
    loss_seconds: float = 0.0


def _verified(stage: Stage, sale: Sale, entries: list[dict[str, Any]]) -> _Verdict:
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
        no_history = f"no history: {ended.stderr.decode(errors='replace')}"
        return _Verdict(judgement=Judgement(ok=False), problems=[no_history])
    calls = chain(_calls(sale), stage.trusted(sale.sale_id, sale.heads))
    lost, unjudged, loss_seconds = [], 0, 0.0
    if isinstance(stage, HostsStage):
        now = History(
            version=VERSION, unix_ms=time.time_ns() // 1_000_000, monotonic_ns=time.monotonic_ns()
        )
        losses = separated(ended.stdout, calls, now)
        calls, lost, unjudged = losses.calls, losses.lost, losses.unjudged
        loss_seconds = losses.longest_seconds
    write_history(path, calls=calls, past=ended.stdout, entries=entries)
    try:
        judgement = verify(path)
    except Unreadable as error:
        unreadable = f"the history cannot be read: {error}"
        return _Verdict(judgement=Judgement(ok=False), problems=[unreadable])
    return _Verdict(judgement=judgement, lost=lost, unjudged=unjudged, loss_seconds=loss_seconds)


def _calls(sale: Sale) -> Iterator[Operation]:
    for file in sale.files:
        for record in DECODER.decode_lines(file.read_bytes()):
            assert isinstance(record, Operation)
            yield record
