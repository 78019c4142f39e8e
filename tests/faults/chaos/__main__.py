"""Chaos run: `python -m tests.faults.chaos --minutes 10` attacks the whole service and reports."""

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.chaos.hosts_stage import LAYOUTS
from tests.faults.chaos.release_stage import commit_of
from tests.faults.chaos.report import write
from tests.faults.chaos.run import SETTLE_SECONDS_MAX, AttackPlan, attack
from tests.faults.chaos.service_faults import UPGRADE_FAULTS
from tests.support.hangups import pass_on_hangups

#: Minimum coverage: a run below it proves nothing.
FAULTS_MIN = 10
ANSWERS_MIN = 10_000
#: On several hosts a minute has fewer of both.
HOSTS_KINDS_MIN = 5
HOSTS_ANSWERS_MIN = 500
#: With a release beside the working tree: how often one of the two takes the place of the other.
DEPLOYMENTS_MIN = 1


def main() -> int:
    """Run and report; returns 1 if a violation was found or the coverage is too low."""
    pass_on_hangups()
    given = argparse.ArgumentParser(prog="python -m tests.faults.chaos")
    given.add_argument("--minutes", type=float, default=9.0)
    given.add_argument("--seed", type=int, default=0, help="draws everything; 0 takes a new one")
    given.add_argument("--buyers", type=int, default=220)
    given.add_argument("--sale-seconds", type=float, default=40.0)
    given.add_argument("--settle-seconds", type=float, default=SETTLE_SECONDS_MAX)
    given.add_argument("--only", default="", help="faults whose name has this in it")
    given.add_argument(
        "--beside", default="", help="a released version that runs beside the working tree"
    )
    given.add_argument(
        "--hosts", choices=LAYOUTS, default="", help="several hosts, with this layout of Redis"
    )
    given.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting on the hosts"
    )
    given.add_argument("--keeps-all", action="store_true", help="no acknowledged hold may be lost")
    given.add_argument("--report", type=Path, default=Path("var/chaos"))
    asked = given.parse_args()
    plan = AttackPlan(
        seed=asked.seed or secrets.randbelow(1 << 31),
        seconds=asked.minutes * 60,
        sale_seconds=asked.sale_seconds,
        buyers=asked.buyers,
        settle_seconds=asked.settle_seconds,
        only=asked.only,
        beside=commit_of(asked.beside) if asked.beside else "",
        hosts=asked.hosts,
        environ=dict(one.split("=", 1) for one in asked.set),
        keeps_all=asked.keeps_all,
    )
    sys.stdout.write(f"seed {plan.seed}\n")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    sys.stdout.write(f"everything is kept in {folder} unless all is well\n")
    report = asyncio.run(attack(plan, folder))
    sys.stdout.write(write(report, asked.report))
    enough = len(report.faults) >= FAULTS_MIN and report.answers >= ANSWERS_MIN
    if plan.hosts:
        enough = len(report.kinds) >= HOSTS_KINDS_MIN and report.answers >= HOSTS_ANSWERS_MIN
    if plan.beside:
        enough = enough and report.kinds[UPGRADE_FAULTS[0].kind] >= DEPLOYMENTS_MIN
    if not enough or report.violations:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
