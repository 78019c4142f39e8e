"""Deterministic OS: clocks and random bytes come from the virtual clock and the seed."""

import os
import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.faults.simulation.loop import CURRENT, VirtualLoop

__all__ = ["EPOCH_MS", "determined"]

#: When virtual time begins: Saturday, 2026-01-03 00:00 UTC. In the past, since code that reads the
#: machine's date itself (PyJWT) must find every token valid.
EPOCH_MS = 1_767_398_400_000


@contextmanager
def determined(loop: VirtualLoop, seed: str) -> Generator[None]:
    """Clocks are the loop's, and random bytes are the seed's.

    The wall clock is the calling process's own, with its skew.
    """
    draw = random.Random(f"{seed} bytes")

    def wall_ns() -> int:
        process = CURRENT.get()
        skew_ms = 0 if process is None else process.skew_ms
        return (EPOCH_MS + skew_ms) * 1_000_000 + int(loop.now * 1e9)

    def no_sleep(_: float) -> None:
        raise AssertionError("a blocking sleep in the event loop")

    answers: dict[str, Any] = {
        "time": lambda: wall_ns() / 1e9,
        "time_ns": wall_ns,
        "monotonic": lambda: loop.now,
        "monotonic_ns": lambda: int(loop.now * 1e9),
        "perf_counter": lambda: loop.now,
        "sleep": no_sleep,
    }
    state = random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(time, name, answer)
        patch.setattr(os, "urandom", draw.randbytes)
        # The source of `secrets` and `SystemRandom`.
        patch.setattr(random, "_urandom", draw.randbytes)
        random.seed(f"{seed} shared")
        try:
            yield
        finally:
            random.setstate(state)
