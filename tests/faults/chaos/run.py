"""Chaos run: sale after sale under load, faults from three groups in parallel, and a verdict."""

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
from tests.faults.chaos.hosts_faults import (
    CLUSTER_FAULTS,
    LINK_FAULTS,
    MACHINE_FAULTS,
    SENTINEL_FAULTS,
)
from tests.faults.chaos.hosts_stage import HostsStage
from tests.faults.chaos.redis_faults import REDIS_FAULTS
from tests.faults.chaos.release_stage import ReleaseStage
from tests.faults.chaos.sale import Sale, SaleReport, arrive, judged, observe_heads, opened
from tests.faults.chaos.service_faults import AROUND_FAULTS, PROCESS_FAULTS, UPGRADE_FAULTS

__all__ = ["SETTLE_SECONDS_MAX", "AttackPlan", "Done", "Report", "attack"]

#: Seconds between two faults of a group, at least and at most.
PAUSES = ((4.0, 10.0), (6.0, 14.0), (1.0, 5.0))
#: The same on several hosts, where the links are a fourth group. A failover takes seconds.
HOSTS_PAUSES = ((6.0, 14.0), (8.0, 16.0), (1.0, 5.0), (2.0, 8.0))
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
    #: The layout of Redis on several hosts; empty for one machine.
    hosts: str = ""
    #: Further settings of the service on several hosts.
    environ: dict[str, str] = {}
    #: Whether a failover may lose no acknowledged hold.
    keeps_all: bool = False


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
    #: Rebuilds of sales that lost events.
    rebuilds: int = 0

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
    async with staged(_stage(plan, folder, chance)) as stage:
        over = asyncio.Event()
        operator = asyncio.create_task(_operate(stage, over))
        try:
            sales = await _under_attack(stage, plan, chance, report)
            await stage.heal()
            with suppress(httpx.HTTPError):
                await stage.ask_pg("POST", "/_faults", json={"clear": True})
            began = time.monotonic()
            audits = await _settled(stage, sales, plan.settle_seconds)
            report.settled_seconds = time.monotonic() - began
        finally:
            over.set()
            report.rebuilds = await operator
        entries = (await stage.ask_pg("GET", "/_ledger"))["entries"]
        for sale in sales:
            report.sales.append(await judged(stage, sale, audits[sale.sale_id], entries))
    report.undecided = sum(one.judgement.undecided for one in report.sales)
    # Payments whose key the PG does not have are decided after twelve minutes.
    if report.undecided and not (plan.hosts and plan.settle_seconds < SETTLE_SECONDS_MAX):
        report.problems.append(f"{report.undecided} payments are undecided")
    return report


def _stage(plan: AttackPlan, folder: Path, chance: random.Random) -> Stage:
    if plan.hosts:
        return HostsStage(
            folder,
            plan.hosts,
            chance,
            plan.environ,
            keeps_all=plan.keeps_all,
            waits_for_payments=plan.settle_seconds >= SETTLE_SECONDS_MAX,
        )
    return ReleaseStage(folder, plan.beside, chance) if plan.beside else Stage(folder)


async def _operate(stage: Stage, over: asyncio.Event) -> int:
    """What operators do meanwhile; the number of rebuilds."""
    if not isinstance(stage, HostsStage):
        return 0
    await asyncio.gather(stage.rebuild_lost_sales(over), stage.restart_crashed_pool(over))
    if stage.pool_crashes:
        _say(f"           the pooler ended by itself: {stage.pool_crashes} times")
    return stage.rebuilds.total()


def _groups(plan: AttackPlan, storm: Fault) -> tuple[tuple[Fault, ...], ...]:
    """The faults of each group."""
    around = (*AROUND_FAULTS, storm)
    if plan.hosts:
        redis_faults = CLUSTER_FAULTS if plan.hosts == "cluster" else SENTINEL_FAULTS
        # The PG has a host of its own, with faults of its own.
        own = tuple(fault for fault in PROCESS_FAULTS if "PG" not in fault.kind)
        return redis_faults, (*own, *MACHINE_FAULTS), around, LINK_FAULTS
    deployed = UPGRADE_FAULTS if plan.beside else ()
    return REDIS_FAULTS, (*PROCESS_FAULTS, *deployed), around


async def _under_attack(
    stage: Stage, plan: AttackPlan, chance: random.Random, report: Report
) -> list[Sale]:
    """Sales and faults side by side until the time is over."""
    began = time.monotonic()
    sales: list[Sale] = []
    sales.append(await opened(stage, chance))
    stage.sale_id = sales[0].sale_id
    storm = Fault("five times as many come", 5, partial(_storm, sales, report))
    groups = _groups(plan, storm)
    over = asyncio.Event()
    harm = [
        asyncio.create_task(
            _harm(stage, group, pauses, random.Random(chance.getrandbits(64)), report, began, over)
        )
        for group, pauses in zip(groups, HOSTS_PAUSES if plan.hosts else PAUSES, strict=True)
    ]
    try:
        while True:
            await _continue(stage, sales[-1], plan, chance, report)
            # A failed group may have left a component down: further sales would prove nothing.
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
    group: Sequence[Fault],
    pauses: tuple[float, float],
    chance: random.Random,
    report: Report,
    began: float,
    over: asyncio.Event,
) -> None:
    """The faults of one group, one after the other."""
    faults = [fault for fault in group if report.plan.only in fault.kind]
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
            # A fault of another group prevented it: it does not count as carried out.
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
    over = asyncio.Event()
    sale.observers.append(asyncio.create_task(asyncio.to_thread(observe_heads, stage, sale, over)))
    try:
        summary = await arrive(stage, sale, chance, plan.buyers, plan.sale_seconds)
    finally:
        over.set()
    _count(report, summary)
    _say(f"           {sale.sale_id}: {summary.calls} calls for {sale.stock} units")


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
                # An order that is lost is not counted as held while its payment is undecided.
                decided = audit.get("ok", False) or not isinstance(stage, HostsStage)
                if (
                    decided and not held and not audit.get("lag", 1)
                ) or time.monotonic() > give_up_at:
                    audits[sale.sale_id] = audit
                    break
            await asyncio.sleep(0.5)
    return audits


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
