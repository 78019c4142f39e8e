"""Worker whose wall clock is off by the seconds in a file: an `--entry` of `entrypoints worker`."""

import os
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.clock import SystemClock
from reservation.workers import runner

__all__ = ["CLOCK_FILE", "run"]

#: The environment variable that names the file.
CLOCK_FILE = "WORKER_CLOCK_FILE"


class OffsetClock(SystemClock):
    """The machine's clock, and an offset that the test sets while the worker runs."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def now_ms(self) -> int:
        text = self._file.read_text() if self._file.exists() else ""
        return time.time_ns() // 1_000_000 + int(1000 * float(text or 0))


async def run(settings: Settings) -> None:
    """Run the worker on that clock."""
    clock = OffsetClock(Path(os.environ[CLOCK_FILE]))

    def opened_on_it(settings: Settings, **more: Any) -> AbstractAsyncContextManager[Service]:
        return opened(settings, clock=clock, **more)

    runner.opened = opened_on_it
    await runner.run(settings)
