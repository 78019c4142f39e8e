"""Chaos run: sale after sale under a crowd, fault after fault in three lanes, and a judgement."""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import redis

from tests.faults.chaos.clients import Summary
from tests.faults.chaos.environment import Stage, staged
from tests.faults.chaos.fault import Fault
from tests.faults.chaos.redis_faults import REDIS_FAULTS, nothing_is_left_wrong
from tests.faults.chaos.release_stage import ReleaseStage
from tests.faults.chaos.sale import Sale, SaleReport, arrive, judged, observe_heads, opened
from tests.faults.chaos.service_faults import AROUND_FAULTS, PROCESS_FAULTS, UPGRADE_FAULTS

__all__ = ["SETTLE_SECONDS_MAX", "AttackPlan", "Done", "Report", "attack"]

#: Between two faults of a lane.
PAUSES = ((4.0, 10.0), (6.0, 14.0), (1.0, 5.0))
#: A payment whose answer was lost is settled within minutes; the promise is thirteen.
SETTLE_SECONDS_MAX = 800.0
STORM_SECONDS = 4.0


class AttackPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a run."""

    seed: int
    seconds: float
    sale_seconds: float = 40.0
    buyers: int = 40
    settle_seconds: float = SETTLE_SECONDS_MAX
    #: Only faults whose kind has this in it.
    only: str = ""
    #: The commit of a released version that runs beside the working tree; empty for none.
    beside: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A fault that was carried out."""

    kind: str
    what: str
    at_seconds: float
    took_seconds: float


class Report(msgspec.Struct, kw_only=True):
    """The results of a run."""

    plan: AttackPlan
    seconds: float = 0.0
    settled_seconds: float = 0.0
    undecided: int = 0
    faults: list[Done] = []
    sales: list[SaleReport] = []
    calls: int = 0
    disconnects: int = 0
    lives: dict[str, int] = {}
    statuses: dict[str, int] = {}
    problems: list[str] = []

    @property
    def answers(self) -> int:
        return sum(sale.judgement.answers for sale in self.sales)

    @property
    def events(self) -> int:
        return sum(sale.judgement.events for sale in self.sales)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(done.kind for done in self.faults)

    @property
    def violations(self) -> list[str]:
        """Everything that was found wrong."""
        found = list(self.problems)
        for sale in self.sales:
            found += [f"{sale.sale_id}: {problem}" for problem in sale.problems]
            found += [
                f"{sale.sale_id}, line {one.line}: {one.name}: {one.reason}"
                for one in sale.judgement.violations
            ]
        return found


async def attack(plan: AttackPlan, folder: Path) -> Report:
    """Run the plan.

    Args:
        plan: the duration, and the seed of all draws.
        folder: the directory of all results.
    """
    report = Report(plan=plan)
    chance = random.Random(plan.seed)
    made = ReleaseStage(folder, plan.beside, chance) if plan.beside else Stage(folder)
    async with staged(made) as stage:
        sales = await _under_attack(stage, plan, chance, report)
        await nothing_is_left_wrong(stage)
        with suppress(httpx.HTTPError):
            await stage.ask_pg("POST", "/_faults", json={"clear": True})
        began = time.monotonic()
        audits = await _settled(stage, sales, plan.settle_seconds)
        report.settled_seconds = time.monotonic() - began
        entries = (await stage.ask_pg("GET", "/_ledger"))["entries"]
        for sale in sales:
            report.sales.append(await judged(stage, sale, audits[sale.sale_id], entries))
    report.undecided = sum(one.judgement.undecided for one in report.sales)
    if report.undecided:
        report.problems.append(f"{report.undecided} payments are undecided")
    return report


async def _under_attack(
    stage: Stage, plan: AttackPlan, chance: random.Random, report: Report
) -> list[Sale]:
    """Sales and faults side by side until the time is over."""
    began = time.monotonic()
    sales: list[Sale] = []
    sales.append(await opened(stage, chance))
    stage.sale_id = sales[0].sale_id
    storm = Fault("five times as many come", 5, partial(_storm, sales, report))
    deployed = UPGRADE_FAULTS if plan.beside else ()
    lanes = (REDIS_FAULTS, (*PROCESS_FAULTS, *deployed), (*AROUND_FAULTS, storm))
    over = asyncio.Event()
    harm = [
        asyncio.create_task(
            _harm(stage, lane, pauses, random.Random(chance.getrandbits(64)), report, began, over)
        )
        for lane, pauses in zip(lanes, PAUSES, strict=True)
    ]
    try:
        while True:
            await _continue(stage, sales[-1], plan, chance, report)
            # A lane that failed may have left a part down: the rest would prove nothing.
            broken = any(task.done() and task.exception() for task in harm)
            if broken or time.monotonic() - began >= plan.seconds:
                break
            sales.append(await opened(stage, chance))
            stage.sale_id = sales[-1].sale_id
    finally:
        over.set()
        # Each fault in progress is brought to its end: every part must run again.
        await asyncio.gather(*harm)
    if isinstance(stage, ReleaseStage):
        await asyncio.gather(_continue(stage, sales[-1], plan, chance, report), stage.raise_level())
        _say(f"{time.monotonic() - began:7.1f} s  the level is raised")
    report.seconds = time.monotonic() - began
    return sales


async def _harm(
    stage: Stage,
    lane: Sequence[Fault],
    pauses: tuple[float, float],
    chance: random.Random,
    report: Report,
    began: float,
    over: asyncio.Event,
) -> None:
    """The faults of one lane, one after the other."""
    faults = [fault for fault in lane if report.plan.only in fault.kind]
    if not faults:
        return
    weights = [fault.weight for fault in faults]
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(*pauses)):
                await over.wait()
                return
        fault = chance.choices(faults, weights)[0]
        at = time.monotonic() - began
        try:
            what = await fault.do(stage, chance)
        except (redis.RedisError, OSError, httpx.HTTPError) as error:
            # Another lane's fault prevented it: it does not count as carried out.
            _say(f"{at:7.1f} s  {fault.kind}: not carried out: {error!r}")
            continue
        if what:
            took = time.monotonic() - began - at
            report.faults.append(Done(kind=fault.kind, what=what, at_seconds=at, took_seconds=took))
            _say(f"{at:7.1f} s  {fault.kind}: {what}")


async def _continue(
    stage: Stage, sale: Sale, plan: AttackPlan, chance: random.Random, report: Report
) -> None:
    """One crowd at one sale, with its head polled from outside."""
    observing = asyncio.create_task(
        asyncio.to_thread(observe_heads, stage, sale, over := asyncio.Event())
    )
    try:
        summary = await arrive(stage, sale, chance, plan.buyers, plan.sale_seconds)
    finally:
        over.set()
        await observing
    _count(report, summary)
    _say(f"           {sale.sale_id}: {summary.calls} calls of {sale.stock} pieces")


async def _storm(sales: list[Sale], report: Report, stage: Stage, chance: random.Random) -> str:
    """Another crowd at the same sale, for some moments."""
    buyers = 5 * report.plan.buyers
    summary = await arrive(stage, sales[-1], chance, buyers, STORM_SECONDS)
    _count(report, summary)
    return f"{summary.calls} calls of {buyers} buyers"


def _count(report: Report, summary: Summary) -> None:
    report.calls += summary.calls
    report.disconnects += summary.disconnects
    report.lives = dict(Counter(report.lives) + Counter(summary.lives))
    report.statuses = dict(Counter(report.statuses) + Counter(summary.statuses))
    report.problems += summary.accused


async def _settled(stage: Stage, sales: list[Sale], seconds: float) -> dict[str, dict[str, Any]]:
    """Each sale's audit once nothing is held and SQL has it all, or the last before the limit."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        # A refund whose process died has moved its money before its order is updated.
        with suppress(httpx.HTTPError):
            pending = await stage.operate(
                "GET", "/v1/admin/refunds", params={"status": "pending", "limit": "1"}
            )
            if pending.is_success and not pending.json()["refunds"]:
                break
        await asyncio.sleep(0.5)
    audits: dict[str, dict[str, Any]] = {}
    for sale in sales:
        while True:
            with suppress(httpx.HTTPError):
                answer = await stage.operate("GET", f"/v1/admin/sales/{sale.sale_id}/audit")
                audit = answer.json()
                held = sum(row["held"] for row in audit.get("skus", [{"held": 1}]))
                if (not held and not audit.get("lag", 1)) or time.monotonic() > give_up_at:
                    audits[sale.sale_id] = audit
                    break
            await asyncio.sleep(0.5)
    return audits


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
