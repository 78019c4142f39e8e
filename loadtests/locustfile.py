"""A flash sale under Locust: options, the runs, the tab, and an exit status that is a verdict."""

# Locust types its own members in part: what they give is narrowed where it enters.
# pyright: reportUnknownMemberType=false

import os
from argparse import SUPPRESS
from pathlib import Path
from typing import Any, Final

import gevent
import msgspec
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from api.auth import Guests
from loadtests.answers import Answers
from loadtests.desk import Desk
from loadtests.run import Run
from loadtests.shapes import SCENARIOS, target_at
from loadtests.tab import add_stock_tab
from loadtests.users import MIX, Buyer, Plan, mix_of
from loadtests.verdict import Verdict
from reservation.settings import Settings

__all__ = ["Buyer", "SaleShape"]

#: How often a worker tells the master what its buyers were told.
REPORT_SECONDS: Final = 1.0
#: What a worker's message to the master is called.
MESSAGE: Final = "answers"


class Tests:
    """The runs of this process: the one that is going on, and what came of all of them."""

    def __init__(self) -> None:
        self.settings = Settings.load(os.environ)
        #: What this process's own buyers are told.
        self.answers = Answers()
        self.current: Run | None = None
        self.verdicts: list[Verdict | None] = []

    def exit_status(self) -> int:
        """0 only where there was a verdict and every one is clean."""
        clean = [verdict is not None and verdict.ok for verdict in self.verdicts]
        return 0 if clean and all(clean) else 1

    def finish(self, run: Run) -> None:
        """Judge a run, once."""
        run.finish()
        self.verdicts.append(run.verdict)


tests = Tests()


class SaleShape(LoadTestShape):
    """The chosen scenario; `--users` is its peak, `--run-time` its length."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Buyers at this second; at the end stop them, and wait for the verdict."""
        runner = self.runner
        if runner is None or runner.environment.parsed_options is None:
            return None
        options = runner.environment.parsed_options
        target = target_at(
            options.scenario,
            self.get_run_time(),
            peak=max(1, int(options.num_users or 1)),
            run_seconds=float(options.run_time) if options.run_time else None,
        )
        if target is None:
            # A master that quits at once would not hear its workers' last reports.
            runner.stop()
            if tests.current is not None:
                tests.current.wait()
        return target


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """What a run can be told, in the terminal and in the form of the web UI."""
    parser.add_argument(
        "--scenario",
        choices=list(SCENARIOS),
        default="opening",
        help="opening: a spike that ebbs away. steady: a level. soak: tides. "
        "stampede: everybody at one item. sold-out: a crowd before a single piece.",
    )
    parser.add_argument(
        "--sale", default="", help="An open sale's id; empty: a new sale for each run."
    )
    parser.add_argument("--stock", type=int, default=100, help="Pieces of each item of a new sale.")
    parser.add_argument("--items", type=int, default=2, help="Items of a new sale.")
    parser.add_argument(
        "--hold-seconds", type=int, default=10, help="How long a new sale holds for a buyer."
    )
    parser.add_argument(
        "--mix", default=MIX, help="Which buyers there are, in shares of all: kind=share,..."
    )
    parser.add_argument(
        "--think-seconds", type=float, default=0.5, help="Mean pause of a user between two buyers."
    )
    parser.add_argument(
        "--report-dir",
        default="var/loadtests",
        include_in_web_ui=False,
        help="Where verdict.json and verdict.html are written.",
    )
    # Not for people: how the master tells its workers which sale it has opened.
    parser.add_argument("--running-sale", default="", include_in_web_ui=False, help=SUPPRESS)


@events.init.add_listener
def begin(environment: Environment, runner: Any, web_ui: Any, **_: Any) -> None:
    """Connect what this process is: a master, a worker, or both in one."""
    options = environment.parsed_options
    environment.host = environment.host or tests.settings.public_url
    # The buyers all come from one address, so they are not asked for at the door.
    Buyer.guests = Guests(msgspec.structs.replace(tests.settings, guest_rate=None))
    Buyer.answers = tests.answers
    if isinstance(runner, MasterRunner):
        runner.register_message(MESSAGE, _hear)
    if isinstance(runner, WorkerRunner):
        gevent.spawn(_report_on_and_on, runner)
    if web_ui is not None and options is not None:
        add_stock_tab(web_ui, options.web_base_path or "", lambda: tests.current)


@events.test_start.add_listener
def open_sale(environment: Environment, **_: Any) -> None:
    """Open the sale, if this process decides; and know what the buyers are going to do."""
    options = environment.parsed_options
    if options is None:
        raise RuntimeError("this locustfile needs Locust's command line")
    mix = mix_of(options.mix)
    if not isinstance(environment.runner, WorkerRunner):
        desk = Desk(environment.host or "", tests.settings.admin_api_key)
        options.running_sale = options.sale or desk.open_sale(
            items=1 if options.scenario == "stampede" else options.items,
            stock=1 if options.scenario == "sold-out" else options.stock,
            hold_seconds=options.hold_seconds,
        )
        tests.current = Run(
            environment,
            desk,
            sale_id=options.running_sale,
            scenario=options.scenario,
            folder=Path(options.report_dir),
        )
        if not isinstance(environment.runner, MasterRunner):
            tests.answers = Buyer.answers = tests.current.answers
    Buyer.plan = Plan(
        sale_id=options.running_sale,
        mix=mix,
        think_seconds=options.think_seconds,
        one_item=options.scenario == "stampede",
    )


@events.test_stop.add_listener
def close(environment: Environment, **_: Any) -> None:
    """The buyers have gone: tell what they saw, or judge."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        _report(runner, last=True)
    elif tests.current is not None:
        gevent.spawn(tests.finish, tests.current)


@events.quitting.add_listener
def leave_with_a_verdict(environment: Environment, **_: Any) -> None:
    """The exit status is the verdict's; latency alone never fails a run."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        environment.process_exit_code = 0
        return
    if runner is not None:
        runner.stop()
    if tests.current is not None:
        tests.current.wait()
        gevent.sleep(0)
    else:
        print("no run, no verdict: nothing was proved")
    environment.process_exit_code = tests.exit_status()


def _report_on_and_on(runner: WorkerRunner) -> None:
    while True:
        gevent.sleep(REPORT_SECONDS)
        _report(runner, last=False)


def _report(runner: WorkerRunner, *, last: bool) -> None:
    runner.send_message(MESSAGE, {"report": tests.answers.take(), "last": last})


def _hear(environment: Environment, msg: Any, **_: Any) -> None:
    del environment
    run = tests.current
    if run is not None:
        run.answers.merge(msg.data["report"])
        if msg.data["last"]:
            run.reported.add(msg.node_id)
