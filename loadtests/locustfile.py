"""Locust file of a flash sale: options, the runs, the tab, and an exit status that is a verdict."""

# Locust types its own members in part: the values are narrowed where they enter.
# pyright: reportUnknownMemberType=false

import logging
import os
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import Any, Final

import gevent
import httpx
import msgspec
import redis
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import STATE_INIT, MasterRunner, WorkerRunner

from api.http.auth.guests import Guests
from loadtests.buyer_mix import MIX, mix_of
from loadtests.buyer_outcomes import Answers
from loadtests.history_recorder import Recorder
from loadtests.operator_api import CannotBegin, OperatorApi, address_of
from loadtests.run import NotBegun, Run
from loadtests.shapes import SCENARIOS, target_at
from loadtests.spawned_service import OWN_SERVICE
from loadtests.stock_tab import add_stock_tab
from loadtests.users import KINDS, Buyer, Plan
from reservation.config.settings import Settings

__all__ = ["Buyer", "SaleShape"]

log = logging.getLogger("loadtests")

#: Interval of a worker's reports to the master.
REPORT_SECONDS: Final = 1.0
#: Name of a worker's message to the master.
MESSAGE: Final = "answers"


class Session:
    """The runs of this process, and their results."""

    def __init__(self) -> None:
        self.settings = Settings.load(os.environ, None if OWN_SERVICE in os.environ else ".env")
        #: The answers to this process's own buyers.
        self.answers = Answers()
        self.runs: list[Run | NotBegun] = []

    @property
    def current(self) -> Run | NotBegun | None:
        """The current run, or the last one."""
        return self.runs[-1] if self.runs else None

    @property
    def begun(self) -> Run | None:
        """The same, where it could begin."""
        return self.current if isinstance(self.current, Run) else None

    def open(self, environment: Environment) -> bool:
        """Open a sale and begin a run; False, after a message, where that is impossible."""
        options = _options(environment)
        try:
            mix_of(options.mix, KINDS)
            # Locust's form accepts any text.
            environment.host = address_of(environment.host or "")
            desk = OperatorApi(environment.host, self.settings.admin_api_key)
            desk.check(Buyer.guests.new("")[1])
            options.running_sale = options.sale or desk.open_sale(
                items=1 if options.scenario == "stampede" else options.items,
                stock=1 if options.scenario == "sold-out" else options.stock,
                hold_seconds=options.hold_seconds,
            )
            recorder = (
                Recorder(self.settings, desk, options.running_sale) if options.record else None
            )
        except (CannotBegin, ValueError, httpx.HTTPError, redis.RedisError) as error:
            reason = f"no run: {_sentence(error)}"
            self.runs.append(NotBegun(scenario=options.scenario, reason=reason))
            # Locust shows its log in the terminal and in the tab LOGS.
            log.error(reason)  # noqa: TRY400 - a sentence, and no traceback
            return False
        run = Run(
            environment,
            desk,
            sale_id=options.running_sale,
            scenario=options.scenario,
            folder=Path(options.report_dir),
            recorder=recorder,
        )
        self.runs.append(run)
        if not isinstance(environment.runner, MasterRunner):
            self.answers = Buyer.answers = run.answers
        return True

    def exit_status(self) -> int:
        """0 only where there was a verdict, and every one is clean."""
        clean = [run.verdict is not None and run.verdict.ok for run in self.runs]
        return 0 if clean and all(clean) else 1


session = Session()


class SaleShape(LoadTestShape):
    """The chosen scenario; `--users` is its peak, `--run-time` its length."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Buyers at this second: the sale opens before the first, the verdict is after the last."""
        runner = self.runner
        if runner is None:
            return None
        if runner.state == STATE_INIT:
            if not session.open(runner.environment):
                return None
            self.reset_time()
        options = _options(runner.environment)
        target = target_at(
            options.scenario,
            self.get_run_time(),
            peak=max(1, int(options.num_users or 1)),
            run_seconds=float(options.run_time) if options.run_time else None,
        )
        if target is None and session.begun is not None:
            # A master that quits at once would not hear its workers' last reports.
            runner.stop()
            session.begun.wait()
        return target


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """The options of a run, in the terminal and in the form of the web UI."""
    parser.add_argument(
        "--scenario",
        choices=list(SCENARIOS),
        default="opening",
        help="opening: a spike that ebbs away. steady: a level. soak: tides. "
        "stampede: all buyers want one item. sold-out: a crowd for a single unit.",
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
    parser.add_argument(
        "--record",
        action="store_true",
        include_in_web_ui=False,
        help="Record every call and judge the history too; needs the service's own settings.",
    )
    # Internal: the master passes the sale it has opened to its workers.
    parser.add_argument("--running-sale", default="", include_in_web_ui=False, help=SUPPRESS)


@events.init.add_listener
def begin(environment: Environment, runner: Any, web_ui: Any, **_: Any) -> None:
    """Connect this process in its role: a master, a worker, or both in one."""
    # A log line for each poll of the stock would hide everything else.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    environment.host = environment.host or session.settings.operator_url
    # The buyers all come from one address, so the guest rate limit is off.
    Buyer.guests = Guests(msgspec.structs.replace(session.settings, guest_rate=None))
    Buyer.answers = session.answers
    if isinstance(runner, MasterRunner):
        runner.register_message(MESSAGE, _on_message)
    if isinstance(runner, WorkerRunner):
        gevent.spawn(_report_on_and_on, runner)
    if web_ui is not None:
        base_path: str = _options(environment).web_base_path or ""
        add_stock_tab(web_ui, base_path, lambda: session.current)


@events.test_start.add_listener
def brief(environment: Environment, **_: Any) -> None:
    """Pass the plan to this process's buyers."""
    options = _options(environment)
    Buyer.begin(
        Plan(
            sale_id=options.running_sale,
            mix=mix_of(options.mix, KINDS),
            think_seconds=options.think_seconds,
            one_item=options.scenario == "stampede",
            recorded=options.record,
        )
    )


@events.test_stop.add_listener
def close(environment: Environment, **_: Any) -> None:
    """The buyers have gone: report their answers, or judge."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        _report(runner, last=True)
    elif session.begun is not None:
        gevent.spawn(session.begun.finish)


@events.worker_report.add_listener
def count(client_id: str, **_: Any) -> None:
    """Statistics of a worker; its last are those after its buyers have gone."""
    run = session.begun
    if run is not None and client_id in run.silent:
        run.counted.add(client_id)


@events.quitting.add_listener
def leave_with_a_verdict(environment: Environment, **_: Any) -> None:
    """The exit status is the verdict's; latency alone never fails a run."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        environment.process_exit_code = 0
        return
    if runner is not None:
        runner.stop()
    if session.begun is not None:
        session.begun.wait()
    elif session.current is None:
        print("no run, no verdict: nothing was proved")
    environment.process_exit_code = session.exit_status()


def _sentence(error: Exception) -> str:
    """The library's own text has an address of its documentation behind it."""
    if isinstance(error, httpx.HTTPStatusError):
        answer = error.response
        asked = f"{error.request.method} {error.request.url.path}"
        return f"{asked} was answered {answer.status_code}: {answer.text[:200]}"
    return str(error) or type(error).__name__


def _options(environment: Environment) -> Namespace:
    if environment.parsed_options is None:
        raise RuntimeError("this locustfile needs Locust's command line")
    return environment.parsed_options


def _report_on_and_on(runner: WorkerRunner) -> None:
    while True:
        gevent.sleep(REPORT_SECONDS)
        _report(runner, last=False)


def _report(runner: WorkerRunner, *, last: bool) -> None:
    runner.send_message(MESSAGE, {"report": session.answers.take(), "last": last})


def _on_message(environment: Environment, msg: Any, **_: Any) -> None:
    del environment
    run = session.begun
    if run is not None:
        if run.answers.merge(msg.data["report"]):
            run.heard.add(msg.node_id)
        if msg.data["last"]:
            run.silent.add(msg.node_id)
