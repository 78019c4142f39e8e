"""Filling of a sale with holds as fast as the script takes them, to measure the script."""

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import redis

from benchmarks.support import aof_rewrites
from benchmarks.support.sale import SALE_ID
from benchmarks.support.script_call import Basket, basket_of, call_of
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.scripts import load

__all__ = ["Filling", "ScriptRate"]

#: Baskets in a call that only fills.
_BATCH: Final = 128
#: Holds between two trims of the outbox, as by the flusher: memory is for holds.
_TRIM_EVERY: Final = 50_000
#: Pipeline depth before the first answer is read, so that the server never waits for this process:
#: the larger of the two. As many single calls as the comparison has connections.
_CALLS_IN_FLIGHT: Final = 4
_HOLDS_IN_FLIGHT: Final = 64
#: Calls are packed long before they are sent.
_NOT_AFTER_MS: Final = 3_600_000
#: Calls between two checks for the end of a rewrite.
_CALLS_PER_SAMPLE: Final = 4

_SECRET: Final = b"order ids of the benchmark"
_numbers = itertools.count(1)


class ScriptRate(msgspec.Struct, frozen=True):
    """One batch size."""

    batch: int
    holds_per_second: float
    #: The server's own measure of one call.
    p50_ms: float
    p999_ms: float
    max_ms: float


class Filling:
    """One sale on one server, reached by its socket."""

    def __init__(self, socket_path: Path) -> None:
        self._redis = redis.Redis(unix_socket_path=str(socket_path), decode_responses=True)
        self._keys = Keys().of(SALE_ID)
        self._epoch = str(self._redis.hget(self._keys.sale, "epoch"))
        self._sha = load("prepare").sha
        self._redis.script_load(load("prepare").source)
        client: Any = self._redis
        self._connection: Any = client.connection_pool.get_connection()

    def close(self) -> None:
        """End the connections."""
        self._connection.disconnect()
        self._redis.close()

    def hold(self, count: int, *, keep_events: bool = False) -> None:
        """Take this many holds, each of another buyer, and wait until the server is idle.

        Args:
            count: how many.
            keep_events: leave the outbox to a flusher.
        """
        for done in range(0, count, _TRIM_EVERY):
            self._send(map(self._packed, self._calls(min(_TRIM_EVERY, count - done), _BATCH)))
            if not keep_events:
                self.trim()
        aof_rewrites.wait(self._redis)

    def hold_for(self, seconds: float) -> int:
        """Take holds as fast as the script does for so long; how many. Their events stay."""
        count, end_at = 0, time.monotonic() + seconds
        while time.monotonic() < end_at:
            self._send(map(self._packed, self._calls(_BATCH * _CALLS_IN_FLIGHT, _BATCH)))
            count += _BATCH * _CALLS_IN_FLIGHT
        return count

    def rate(self, batch: int, *, holds: int, calls: int, keep_events: bool = False) -> ScriptRate:
        """The script's rate of holds in batches of this size.

        Args:
            batch: baskets in a call.
            holds: over which the rate is measured.
            calls: of which each is timed.
            keep_events: leave the outbox to a flusher.
        """
        # Packed before the clock runs: the client shares the machine with the server.
        packed = [self._packed(call) for call in self._calls(holds, batch)]
        started_at = time.perf_counter()
        self._send(packed, max(_CALLS_IN_FLIGHT, _HOLDS_IN_FLIGHT // batch))
        seconds = time.perf_counter() - started_at
        if not keep_events:
            self.trim()
        with aof_rewrites.none_meanwhile(self._redis):
            times = sorted(self.call_times(batch, calls))
        if not keep_events:
            self.trim()
        return ScriptRate(
            batch=batch,
            holds_per_second=holds / seconds,
            p50_ms=times[len(times) // 2] / 1e3,
            p999_ms=times[min(len(times) - 1, int(len(times) * 0.999))] / 1e3,
            max_ms=times[-1] / 1e3,
        )

    def beside_rewrite(self, batch: int) -> list[float]:
        """Milliseconds of each call from the fork of a rewrite of the file until it has ended."""
        aof_rewrites.begin(self._redis)
        times = [us / 1e3 for us in self.call_times(batch, _CALLS_PER_SAMPLE)]
        while aof_rewrites.under_way(self._redis):
            times += [us / 1e3 for us in self.call_times(batch, _CALLS_PER_SAMPLE)]
        self.trim()
        return sorted(times)

    def trim(self) -> None:
        """Cut the outbox to its last entry, which the script reads."""
        self._redis.xtrim(self._keys.outbox, maxlen=1, approximate=False)

    def call_times(self, batch: int, calls: int) -> Iterator[int]:
        """Microseconds of each call by the server's own count, of the script alone."""
        client: Any = self._redis
        spent: int = client.info("commandstats")["cmdstat_evalsha"]["usec"]
        for call in self._calls(calls * batch, batch):
            self._send([self._packed(call)])
            before, spent = spent, client.info("commandstats")["cmdstat_evalsha"]["usec"]
            yield spent - before

    def _calls(self, holds: int, batch: int) -> Iterator[list[str | int]]:
        for first in range(0, holds, batch):
            baskets = [_next_basket() for _ in range(min(batch, holds - first))]
            keys, args = call_of(self._epoch, baskets, not_after_ms=_NOT_AFTER_MS)
            yield ["EVALSHA", self._sha, len(keys), *keys, *args]

    def _packed(self, call: list[str | int]) -> list[bytes]:
        return self._connection.pack_command(*call)

    def _send(self, calls: Iterable[list[bytes]], in_flight: int = _CALLS_IN_FLIGHT) -> None:
        connection, waiting = self._connection, 0
        for call in calls:
            connection.send_packed_command(call)
            waiting += 1
            if waiting == in_flight:
                _check(connection.read_response())
                waiting -= 1
        for _ in range(waiting):
            _check(connection.read_response())


def _next_basket() -> Basket:
    number = next(_numbers)
    return basket_of(_SECRET, f"filler-{number:08d}", str(number), b"{}")


def _check(reply: list[Any]) -> None:
    _, *replies = reply
    refused = [one for one in replies if not isinstance(one, int)] if replies else reply
    if refused:
        raise RuntimeError(f"the script refused: {refused[0]}")
