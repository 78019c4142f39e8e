"""Simulated processes: each may be killed or frozen at any await."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any

from tests.faults.simulation.loop import CURRENT, Halted, VirtualLoop

__all__ = ["Process"]


class Process(Halted):
    """One life of a process: its tasks, its luck, its clock.

    Args:
        name: its name in the trace.
        loop: where it runs.
        draw: the random source of the network and of SQL; of this life alone, so that dead
            processes draw nothing from live ones.
        skew_ms: its wall clock minus the true one.
    """

    def __init__(
        self, name: str, loop: VirtualLoop, draw: random.Random, *, skew_ms: int = 0
    ) -> None:
        super().__init__()
        self.name = name
        self.loop = loop
        self.draw = draw
        self.skew_ms = skew_ms
        self.alive = True
        #: An ASGI application, while it takes requests.
        self.serves: Any = None
        #: Resources that end with the process: connections, open requests.
        self._ends: dict[int, Callable[[], None]] = {}
        self._ends_made = 0
        self._context: Context = copy_context()
        self._context.run(CURRENT.set, self)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this process."""
        return self.loop.create_task(work, context=self._context.copy())

    def at_end(self, end: Callable[[], None]) -> int:
        """Call this when the process dies; returns a number for `forget`."""
        self._ends_made += 1
        self._ends[self._ends_made] = end
        return self._ends_made

    def forget(self, number: int) -> None:
        """Remove that call."""
        self._ends.pop(number, None)

    def kill(self) -> None:
        """SIGKILL: no line of it runs any more; its sent messages are still in flight."""
        self.alive, self.halted, self.serves = False, True, None
        ends, self._ends = self._ends, {}
        for end in ends.values():
            end()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.halted = True

    def thaw(self) -> None:
        """SIGCONT; no effect on a dead process."""
        if self.alive:
            self.loop.resume(self)
