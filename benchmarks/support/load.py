"""Load generator: runs wrk against one address and reads its measurements."""

import os
import shutil
import subprocess
from itertools import count
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.support.sale import PRICE, SALE_ID, SKU

__all__ = ["CONNECTIONS", "Load", "Measured", "WrkMissing"]

#: Connections of the comparison: enough that a server never waits for work.
CONNECTIONS: Final = 64

#: One thread of wrk sends more than any contender answers, and the machine has two cores.
_THREADS: Final = 1

#: An answer later than this counts as broken. wrk's histogram has an entry for each microsecond.
_ANSWER_SECONDS_MAX: Final = 10
#: On top of the run itself: connecting, and the last answers.
_END_SECONDS_MAX: Final = 30

_SCRIPT: Final = Path(__file__).with_name("load.lua")
_MARK: Final = "BENCH "

_runs = count(1)


class WrkMissing(Exception):
    """The load generator is not installed."""


class Measured(msgspec.Struct, frozen=True):
    """One run of wrk. Latency is of all answers, refusals too."""

    seconds: float
    sent: int
    answers: int
    #: Answers with a status of 400 or more.
    refused: int
    #: No answer: the connection failed, or it took too long.
    broken: int
    #: Requests that left later than the timetable wanted; 0 if there is none.
    late: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float

    @property
    def good_per_second(self) -> float:
        return (self.answers - self.refused) / self.seconds

    @property
    def answers_per_second(self) -> float:
        return self.answers / self.seconds


class Load:
    """Sends holds of the buyers in a file; each run continues where the last one ended.

    So a cache of tokens gains nothing, and no buyer holds twice before the end of the file: a
    second hold costs more than a first.
    """

    def __init__(self, buyers: Path) -> None:
        self._wrk = shutil.which("wrk")
        if self._wrk is None:
            raise WrkMissing("wrk is not installed (apt-get install wrk)")
        self._buyers = buyers
        self._offset = 0
        with buyers.open("rb") as file:
            self._line_bytes = len(file.readline())

    def run(
        self,
        url: str,
        *,
        seconds: int,
        connections: int = CONNECTIONS,
        rate: float | None = None,
        others: int = 0,
    ) -> Measured:
        """One run; it ends before this returns.

        Args:
            url: the server's address.
            seconds: how long.
            connections: how many, each with one request in progress.
            rate: requests a second; None is as fast as the responses arrive.
            others: sales of `many_sales` that get a tenth of the requests, in turn.
        """
        with self.start(
            url, seconds=seconds, connections=connections, rate=rate, others=others
        ) as process:
            output, errors = process.communicate(timeout=seconds + _END_SECONDS_MAX)
        return self.read(output, errors)

    def start(
        self,
        url: str,
        *,
        seconds: int,
        connections: int = CONNECTIONS,
        rate: float | None = None,
        others: int = 0,
    ) -> subprocess.Popen[str]:
        """The same, started: the caller waits for it and reads it."""
        body = msgspec.json.encode({"items": [{"sku": SKU, "quantity": 1}], "amount": PRICE})
        environ = os.environ | {
            "BENCH_RUN": f"run-{next(_runs)}",
            "BENCH_PATH": f"/v1/sales/{SALE_ID}/reservations",
            "BENCH_OTHERS": str(others),
            "BENCH_OTHER_PATH": "/v1/sales/idle-%05d/reservations",
            "BENCH_BODY": body.decode(),
            "BENCH_BUYERS": str(self._buyers),
            "BENCH_SKIP": str(self._offset),
            "BENCH_RATE": str(rate or 0),
        }
        return subprocess.Popen(
            [
                str(self._wrk), f"--threads={_THREADS}", f"--connections={connections}",
                f"--duration={seconds}s", f"--timeout={_ANSWER_SECONDS_MAX}s",
                f"--script={_SCRIPT}", url,
            ],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def read(self, output: str, errors: str) -> Measured:
        """Parse the finished script's output; the next run starts after the last buyer here."""
        for line in output.splitlines():
            if line.startswith(_MARK):
                measured = msgspec.json.decode(line.removeprefix(_MARK), type=Measured)
                used = (measured.sent + 1) * self._line_bytes
                self._offset = (self._offset + used) % self._buyers.stat().st_size
                return measured
        raise RuntimeError(f"wrk did not finish: {errors or output}")
