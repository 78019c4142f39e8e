"""Matrix of faults and crashes: no payment is lost, doubled or guessed in any of them.

Each payment goes from prepare through the PG to its end while the clocks of the PG, of Redis
and of the service change. Then the PG's ledger must match the orders to the won.
"""

import os
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.faults.payments.books import Report, check, listed
from tests.faults.payments.environment import World, world
from tests.faults.payments.matrix import CELLS, Plan, again, matrix, strangers
from tests.faults.payments.workload import Wave

#: Payments of one wave: the sandbox takes a thousand faults at once, and scans them all.
WAVE: Final = 250
#: The PG's outage in each wave, in turn: longer than the leases of two processes that died one
#: after the other, and longer than a payment can be confirmed again.
OUTAGES_SECONDS: Final = (200.0, 480.0, 660.0)
#: Of the random payments.
FAULT_RATE: Final = 0.3
DEATH_RATE: Final = 0.3
#: The process chosen to crash may lose the race to a webhook or to its peer. Cells missed so are
#: run again, this often; one that cannot be reached stays empty.
ROUNDS_MAX: Final = 3
SOAK_STRANGERS: Final = 10_000
SOAK_TIMES: Final = 3


@pytest.fixture
def seed() -> int:
    """Seed of everything but the interleaving; pass it to repeat a run."""
    return int(os.environ.get("MONEY_SEED") or secrets.randbelow(1 << 31))


def waves_of(made: World, plans: list[Plan], draw: random.Random, rate: float) -> Iterator[Wave]:
    for number, start in enumerate(range(0, len(plans), WAVE)):
        outage_seconds = OUTAGES_SECONDS[number % len(OUTAGES_SECONDS)]
        part = plans[start : start + WAVE]
        yield Wave(made, part, outage_seconds=outage_seconds, rate=rate, draw=draw)


def report_of(waves: list[Wave]) -> Report:
    return Report([story for wave in waves for story in wave.stories])


async def go_again(made: World, waves: list[Wave], draw: random.Random) -> list[str]:
    """Run the missed cells in additional waves; returns the courses that were missed instead."""
    missed: list[str] = []
    for _ in range(ROUNDS_MAX):
        report = report_of(waves)
        missed += report.missed()
        for wave in waves_of(made, list(again(report.empty(), draw)), draw, 0.0):
            await wave.run()
            waves.append(wave)
    return missed


async def settle_all(
    made: World,
    seed: int,
    test: str,
    capsys: pytest.CaptureFixture[str],
    *,
    times: int,
    others: int = 0,
) -> None:
    """Take all payments to their end, report, and fail on any finding."""
    draw = random.Random(seed)
    replay = f"MONEY_SEED={seed} python -m pytest -m '' {test}"
    began = time.monotonic()
    waves = [
        *waves_of(made, list(matrix(draw, times)), draw, 0.0),
        *waves_of(made, list(strangers(draw, others, deaths=DEATH_RATE)), draw, FAULT_RATE),
    ]
    for wave in waves:
        await wave.run()
    missed = await go_again(made, waves, draw)
    wrong = await check(made, waves)
    report = report_of(waves)
    with capsys.disabled():
        sys.stdout.write("\n".join([report.text(), *missed, ""]))
        sys.stdout.write(f"{time.monotonic() - began:.0f} s; again: {replay}\n")
    problems = [*wrong, *(f"empty: {cell}" for cell in report.empty()), *report.late()]
    assert not problems, f"{listed(problems)}\nagain: {replay}"


@pytest.fixture
async def settle(
    tmp_path: Path,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Callable[..., Awaitable[None]]]:
    """`settle_all` in a world of the test's own."""
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        yield partial(settle_all, made, seed, request.node.nodeid, capsys)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_books_balance_after_each_fault_and_each_crash(
    settle: Callable[..., Awaitable[None]],
) -> None:
    assert len(CELLS) >= 500
    await settle(times=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_the_books_balance_after_ten_thousand_payments(
    settle: Callable[..., Awaitable[None]],
) -> None:
    await settle(times=SOAK_TIMES, others=SOAK_STRANGERS)
