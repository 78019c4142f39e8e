"""World clock of a test: ours, Redis' and the PG's, turned by hand together.

Time stops until it is turned, so its measurements do not depend on the machine.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from reservation.adapters.redis import scripts
from reservation.domain.clock import SystemClock
from tests.support.sandbox import RunningSandbox

__all__ = ["SetClock", "WorldClock", "scripts_by"]

#: The key of the scripts' time, in place of TIME.
KEY = "turned-clock:now_ms"

_SERVER_MS = """local function server_ms()
    local time = redis.call("TIME")
    return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
"""
_TURNED_MS = f"""local function server_ms()
    return tonumber(redis.call("GET", "{KEY}"))
end
"""


class SetClock(SystemClock):
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.at_ms = super().now_ms()

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic(self) -> float:
        return self.at_ms / 1000


class WorldClock:
    """The clock of the services."""

    def __init__(self, redis: Redis, sandbox: RunningSandbox) -> None:
        self._redis = redis
        self._sandbox = sandbox
        self._turned = 0.0
        self._sandbox_offset = 0.0
        self._now_ms = time.time_ns() // 1_000_000

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic(self) -> float:
        # A wait is in the machine's time.
        return time.monotonic() + self._turned

    async def start(self) -> None:
        """From here on the scripts can read the time."""
        await self._redis.set(KEY, self._now_ms)

    async def turn(self, seconds: float) -> None:
        """Advance all clocks at once.

        The PG's clock cannot stop. It has gone on by as much as the machine's, and is turned by the
        rest.
        """
        self._now_ms += round(seconds * 1000)
        self._turned += seconds
        await self._redis.set(KEY, self._now_ms)
        behind = self._now_ms / 1000 - time.time() - self._sandbox_offset
        if behind > 0:
            self._sandbox_offset = self._sandbox.turn_clock(behind)["offsetSeconds"]


@contextmanager
def scripts_by(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts unchanged, but for their source of time."""
    turned = folder / "lua"
    shutil.copytree(scripts.script_folder(), turned)
    now = turned / "lib" / "now.lua"
    text = now.read_text()
    assert _SERVER_MS in text
    now.write_text(text.replace(_SERVER_MS, _TURNED_MS))
    with patch.context() as patched:
        patched.setattr(scripts, "script_folder", lambda: turned)
        _read_anew()
        try:
            yield
        finally:
            _read_anew()


def _read_anew() -> None:
    """Nothing read from one folder may be taken for the content of the other."""
    scripts.load.cache_clear()
    scripts.all_scripts.cache_clear()
