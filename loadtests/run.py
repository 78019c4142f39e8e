"""One run: opens the sale, watches the stock while the buyers compete, ends with a verdict."""

# Locust types its own members in part: the values are narrowed where they enter.
# pyright: reportUnknownMemberType=false

import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import gevent
import httpx
import msgspec
import structlog
from gevent.event import Event
from locust.env import Environment
from locust.runners import MasterRunner

from loadtests.buyer_outcomes import Answers
from loadtests.history_recorder import NotRecorded, Recorder
from loadtests.operator_api import OperatorApi
from loadtests.verdict import RequestLine, Sample, Verdict, judge, problems_of_sample, write
from reservation.verification.balance_check import BalanceCheck
from reservation.verification.model.report import Judgement

__all__ = ["Board", "NotBegun", "Run"]

log = structlog.get_logger(__name__)

SAMPLE_SECONDS: Final = 1.0
#: Points of the chart: above it every second one is dropped, so that a soak of any length fits.
SAMPLES_MAX: Final = 2_000
#: Problems that are kept from a run; a broken counter would give one a second.
SEEN_MAX: Final = 50
#: Limit for the workers' last reports after the stop; Locust's come every three seconds.
REPORTS_SECONDS: Final = 15.0


class Board(msgspec.Struct, kw_only=True, rename="camel"):
    """The data of the tab: the stock over time, the counts so far, and at the end the verdict."""

    state: Literal["idle", "running", "settling", "done", "broken", "not begun"] = "idle"
    sale_id: str = ""
    scenario: str = ""
    seconds: float = 0.0
    requests: int = 0
    failures: int = 0
    #: Problems so far; the books are compared at the end.
    problems: list[str] = []
    lives: dict[str, int] = {}
    orders: int = 0
    samples: list[Sample] = []
    verdict: Verdict | None = None


class NotBegun(msgspec.Struct, frozen=True, kw_only=True):
    """A run that could not begin; it has no verdict, and takes the place of the run before it."""

    scenario: str
    reason: str
    verdict: None = None

    def board(self) -> Board:
        """The data of the tab."""
        return Board(state="not begun", scenario=self.scenario, problems=[self.reason])

    def latest(self) -> list[Sample]:
        """No counters: there is no sale."""
        return []


class Run:
    """From the first buyer to the verdict, in the process that has no buyers or all of them."""

    def __init__(
        self,
        environment: Environment,
        desk: OperatorApi,
        *,
        sale_id: str,
        scenario: str,
        folder: Path,
        recorder: Recorder | None,
    ) -> None:
        self._environment = environment
        self._desk = desk
        self._folder = folder
        self._recorder = recorder
        self.sale_id = sale_id
        self.scenario = scenario
        self.answers = Answers()
        self.verdict: Verdict | None = None
        #: Workers that had buyers; those whose buyers are gone and have reported all answers; and
        #: those of the latter that have sent Locust's statistics since.
        self.heard: set[str] = set()
        self.silent: set[str] = set()
        self.counted: set[str] = set()
        self._state: Literal["running", "settling", "done", "broken"] = "running"
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._seconds = 0.0
        self._users = 0
        self._samples: deque[Sample] = deque()
        self._seen: list[str] = []
        self._ended = Event()
        self._watcher = gevent.spawn(self._watch)
        self._recording = gevent.spawn(recorder.watch) if recorder else None

    def finish(self) -> None:
        """The buyers have gone: wait until all is settled, judge, write the verdict; once."""
        if self._state != "running":
            return
        self._state = "settling"
        self._seconds = time.monotonic() - self._started
        try:
            self._wait_for_reports()
            statistics = _statistics(self._environment)
            audit = self._desk.settled(self.sale_id)
            self._watcher.kill()
            self._sample()
            books = self._desk.books(self.sale_id, audit, self.answers)
            self.verdict = judge(
                books=books,
                judgement=self._judgement(books),
                answers=self.answers,
                samples=list(self._samples),
                statistics=statistics,
                exceptions=self._exceptions(),
                seen=self._seen,
                sale_id=self.sale_id,
                scenario=self.scenario,
                started_at=self._started_at,
                seconds=round(self._seconds, 3),
                users=self._users,
            )
            write(self.verdict, self._folder)
            _print_verdict(self.verdict, self._folder)
        except (httpx.HTTPError, OSError, RuntimeError, NotRecorded) as error:
            # No books, no verdict; and no verdict is not a clean one.
            self._seen.append(f"the books could not be read: {error}")
            print(f"no verdict: {self._seen[-1]}")
        finally:
            self._watcher.kill()
            if self._recording is not None:
                self._recording.kill()
            self._state = "done" if self.verdict else "broken"
            self._ended.set()

    def _judgement(self, books: BalanceCheck) -> Judgement | None:
        """The judgement on the run's history, if there is one."""
        if self._recorder is None or self._recording is None:
            return None
        self._recording.kill()
        if self.answers.unrecorded:
            self._seen.append(f"{self.answers.unrecorded} calls were too many to be recorded")
        self._folder.mkdir(parents=True, exist_ok=True)
        entries = books.entries if self.answers.sandbox_url else None
        return self._recorder.judge(self._folder, self.answers.operations, entries)

    def wait(self) -> Verdict | None:
        """The verdict, when there is one; None if the books could not be read."""
        self._ended.wait()
        return self.verdict

    def board(self) -> Board:
        """The current state of the run."""
        running = self._state == "running"
        total = self._environment.stats.total
        return Board(
            state=self._state,
            sale_id=self.sale_id,
            scenario=self.scenario,
            seconds=round(time.monotonic() - self._started if running else self._seconds, 1),
            requests=total.num_requests,
            failures=total.num_failures,
            problems=[*self._seen, *self.answers.wrong],
            lives=dict(self.answers.lives.most_common()),
            orders=len(self.answers.orders),
            samples=list(self._samples),
            verdict=self.verdict and msgspec.structs.replace(self.verdict, samples=[]),
        )

    def latest(self) -> list[Sample]:
        """The latest sample of each item."""
        return list({sample.sku: sample for sample in self._samples}.values())

    def _watch(self) -> None:
        while True:
            try:
                self._sample()
            except httpx.HTTPError as error:
                # The buyers meet the same: their failures are counted, and the verdict reads again.
                log.warning("loadtest_look_failed", error=str(error))
            gevent.sleep(SAMPLE_SECONDS)

    def _sample(self) -> None:
        sale = self._desk.sale(self.sale_id)
        seconds = round(time.monotonic() - self._started, 2)
        runner = self._environment.runner
        self._users = max(self._users, runner.user_count if runner else 0)
        for item in sale["items"]:
            sample = Sample(
                seconds=seconds,
                sku=item["sku"],
                total=item["total"],
                available=item["available"],
                held=item["held"],
                sold=item["sold"],
            )
            self._samples.append(sample)
            if len(self._seen) < SEEN_MAX:
                self._seen += problems_of_sample(sample)
        if len(self._samples) > SAMPLES_MAX * len(sale["items"]):
            self._thin_out()

    def _thin_out(self) -> None:
        moments = sorted({sample.seconds for sample in self._samples})
        kept = {*moments[::2], moments[-1]}
        self._samples = deque(one for one in self._samples if one.seconds in kept)

    def _wait_for_reports(self) -> None:
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner):
            return
        give_up_at = time.monotonic() + REPORTS_SECONDS
        while time.monotonic() < give_up_at:
            connected = {client.id for client in runner.clients.all}
            if self.heard <= self.silent and self.heard & connected <= self.counted:
                return
            gevent.sleep(0.1)
        lost = self.heard - self.silent
        if lost:
            self._seen.append(f"{len(lost)} workers did not report their buyers' last answers")

    def _exceptions(self) -> int:
        runner = self._environment.runner
        return sum(int(one["count"]) for one in runner.exceptions.values()) if runner else 0


def _statistics(environment: Environment) -> list[RequestLine]:
    entries = sorted(environment.stats.entries.values(), key=lambda one: (one.name, one.method))
    return [
        RequestLine(
            method=one.method,
            name=one.name,
            requests=one.num_requests,
            failures=one.num_failures,
            per_second=round(one.total_rps, 2),
            median_ms=round(one.median_response_time or 0),
            p95_ms=round(one.get_response_time_percentile(0.95) or 0),
            p99_ms=round(one.get_response_time_percentile(0.99) or 0),
        )
        for one in entries
    ]


def _print_verdict(verdict: Verdict, folder: Path) -> None:
    for problem in verdict.problems:
        print(f"problem: {problem}")
    print(
        f"{'clean' if verdict.ok else 'NOT CLEAN'}: {verdict.sold} of {verdict.total} sold in "
        f"{verdict.sale_id}, {verdict.orders} orders, {verdict.answers_checked} answers checked, "
        f"{verdict.requests} requests by {verdict.users} users; {folder / 'verdict.html'}",
        flush=True,
    )
