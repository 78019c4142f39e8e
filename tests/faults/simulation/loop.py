"""Event loop in virtual time: if nothing is ready, it jumps to the next timer.

Every callback belongs to a simulated process, or to none (the network, the servers). A process that
is frozen keeps its callbacks back; one that was killed never gets them again.
"""

import asyncio
import selectors
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any

__all__ = ["CURRENT", "NEUTRAL", "Halted", "NothingLeft", "VirtualLoop"]

#: Virtual seconds that one run may take: far above the slowest settling, so that an endless wait is
#: distinct from a long one.
SECONDS_MAX = 100_000.0


class Halted:
    """An owner whose callbacks may be held back."""

    def __init__(self) -> None:
        self.halted = False
        self.kept_back: list[asyncio.Handle] = []


#: The simulated process that runs now; None for code that belongs to no process.
CURRENT: ContextVar[Any] = ContextVar("CURRENT", default=None)
#: The context of the network and of the servers: no process can hold them up.
NEUTRAL = Context()


class NothingLeft(Exception):
    """A task waits, and no event will ever come; or time is up."""


class _NoWaiting(selectors.SelectSelector):
    """Lets virtual time pass instead of waiting."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise NothingLeft("all wait, and there is no timer")
        if timeout > 0:
            self.loop.now += timeout
            if self.loop.now > SECONDS_MAX:
                raise NothingLeft(f"{SECONDS_MAX} s are over")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Deterministic: no threads, no sockets, no clock but its own."""

    def __init__(self) -> None:
        self.now = 1.0
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        owner = CURRENT.get() if context is None else context.get(CURRENT)
        if owner is None or not owner.halted:
            return super().call_soon(callback, *args, context=context)
        return _keep_back(owner, callback, args, self, context or copy_context())

    def call_soon_threadsafe(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        # There is one thread.
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        owner = CURRENT.get() if context is None else context.get(CURRENT)
        if owner is None:
            return super().call_at(when, callback, *args, context=context)
        context = context or copy_context()
        timer = _Timer(owner, callback, args, self, context)
        timer.handle = super().call_at(when, timer.fire, context=context)
        return timer.handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """At once, in the one thread there is."""
        return self.create_task(_at_once(func, args))

    def resume(self, owner: Halted) -> None:
        """Release all callbacks that were held back for a process."""
        owner.halted = False
        self._ready.extend(owner.kept_back)  # type: ignore[attr-defined]
        owner.kept_back = []


async def _at_once(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return func(*args)


class _Timer:
    """A process's timer, which may be delayed when due and cancelled afterwards."""

    __slots__ = ("_args", "_callback", "_context", "_loop", "_owner", "handle")

    def __init__(
        self,
        owner: Halted,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context,
    ) -> None:
        self._owner, self._callback, self._args = owner, callback, args
        self._loop, self._context = loop, context
        self.handle: asyncio.TimerHandle | None = None

    def fire(self) -> None:
        if self._owner.halted:
            _keep_back(self._owner, self._fire_late, (), self._loop, self._context)
        else:
            self._callback(*self._args)

    def _fire_late(self) -> None:
        if self.handle is not None and not self.handle.cancelled():
            self._callback(*self._args)


def _keep_back(
    owner: Halted,
    callback: Callable[..., Any],
    args: tuple[Any, ...],
    loop: VirtualLoop,
    context: Context,
) -> asyncio.Handle:
    handle = asyncio.Handle(callback, args, loop, context)
    owner.kept_back.append(handle)
    return handle
