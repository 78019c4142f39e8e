"""Calls of scripts: once or repeated, and with an acknowledgement by replicas.

An acknowledged call is one write to the socket: the script, a touch of its sale where the reply may
report an earlier call's change, and WAIT (docs/adr/0037-acknowledgement-by-replicas.md).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
from redis.exceptions import NoScriptError, RedisError

from reservation.adapters.redis.errors import (
    NotAcknowledged,
    StoreUnavailable,
    StoreUncertain,
    unwrap,
)
from reservation.adapters.redis.replica_acks import ReplicaAcks
from reservation.adapters.redis.scripts import Script, load
from reservation.telemetry import tracing

__all__ = ["Command", "ScriptCalls"]

log = structlog.get_logger(__name__)

#: Tries of an idempotent call: with their back-off they span a restart of the server.
ATTEMPTS_MAX: Final = 5
ATTEMPT_PAUSES_SECONDS: Final = (0.05, 0.2, 0.6, 1.5)

#: A command and its arguments.
Command = Sequence[str | int | bytes]


class ScriptCalls(ABC):
    """Runs scripts over the connections of a client."""

    #: Whether enough replicas acknowledge changes.
    acks: ReplicaAcks

    @abstractmethod
    async def command(self, *parts: str | int | bytes) -> Any:
        """Send one command and return its reply."""

    @abstractmethod
    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write."""

    @abstractmethod
    async def acked_pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write, with a WAIT for the last change among them."""

    async def call(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[str | int],
        *,
        acked: bool = False,
        touched: str = "",
    ) -> Any:
        """Run a script once.

        Args:
            script: the script to run.
            keys: its keys.
            args: its arguments.
            acked: whether replicas must acknowledge its changes.
            touched: the key of a sale that is touched after it, so that the acknowledgement
                covers an earlier call's change as well; empty for none.

        Raises:
            NotAcknowledged: the script ran, and too few replicas have its changes.
            StoreUnavailable: the script did not run.
            StoreUncertain: the reply was lost.
            BrokenInvariant: the script found inconsistent data and changed nothing.
        """
        send = self._call_acked if acked and self.acks.wanted else self._call
        if tracing.tracer is None:
            return await send(script, keys, args, touched)
        with tracing.tracer.step(f"redis {script.name}", script=script.name):
            return await send(script, keys, args, touched)

    async def _call(
        self, script: Script, keys: Sequence[str], args: Sequence[str | int], touched: str = ""
    ) -> Any:
        del touched
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return await self.command(*command)
        except NoScriptError:
            # The server restarted or flushed its scripts, and nothing ran. Both commands go to one
            # server, over one connection.
            _, reply = await self.pipeline([_loading(script), command])
        try:
            return unwrap(reply)
        except RedisError as error:
            raise StoreUnavailable(str(error)) from error

    async def _call_acked(
        self, script: Script, keys: Sequence[str], args: Sequence[str | int], touched: str
    ) -> Any:
        """`_call` with a WAIT in the same write to the socket."""
        commands: list[tuple[str | int, ...]] = [
            ("EVALSHA", script.sha, len(keys), *keys, *args),
            *_touch(touched),
        ]
        replies, acked = await self._acked_or_not(commands)
        if isinstance(replies[0], NoScriptError):
            # Nothing of it ran. All commands go to one server.
            replies, acked = await self._acked_or_not([_loading(script), *commands])
            replies = replies[1:]
        if isinstance(replies[-1], NoScriptError):
            # Only the touch is missing; the acknowledgement may lack an earlier change.
            try:
                _, acked = await self._acked_or_not([_loading(load("touch")), *_touch(touched)])
            except StoreUnavailable as error:
                raise StoreUncertain(str(error)) from error
        reply = replies[0]
        if isinstance(reply, NoScriptError):
            raise StoreUnavailable(str(reply))
        if isinstance(reply, Exception) or acked:
            return unwrap(reply)
        raise NotAcknowledged(reply)

    async def _acked_or_not(self, commands: Sequence[Command]) -> tuple[list[Any], bool]:
        """The replies, and whether enough replicas acknowledged the changes."""
        try:
            return await self.acked_pipeline(commands), True
        except NotAcknowledged as short:
            return short.reply, False

    async def acked_read(self, commands: Sequence[Command], touched: str) -> list[Any]:
        """Read keys of one slot, once enough replicas have every change that the replies show.

        Args:
            commands: reads.
            touched: the key of the sale that they belong to.

        Raises:
            NotAcknowledged: too few replicas have it.
            StoreUnavailable, StoreUncertain: as `pipeline`.
        """
        if not self.acks.wanted:
            return await self.pipeline(commands)
        *replies, touch = await self.acked_pipeline([*commands, *_touch(touched)])
        if isinstance(touch, NoScriptError):
            # The reads are not repeated: XREADGROUP would go on to the next entries.
            _, touch = await self.acked_pipeline([_loading(load("touch")), *_touch(touched)])
        unwrap(touch)
        return replies

    async def call_again(
        self,
        script: Script,
        keys: Sequence[str],
        args: Callable[[], Sequence[str | int]],
        *,
        acked: bool = False,
        touched: str = "",
    ) -> Any:
        """Run an idempotent script and retry it until the server replies.

        Args:
            script: an idempotent script.
            keys: its keys.
            args: builds the arguments for each try, because `not_after` changes.
            acked, touched: as `call` has them.

        Raises:
            NotAcknowledged: a try ran, and too few replicas have its changes.
            StoreUnavailable: no try ran.
            StoreUncertain: a try may have run.
        """
        uncertain: StoreUncertain | None = None
        for attempt in range(ATTEMPTS_MAX):
            try:
                return await self.call(script, keys, args(), acked=acked, touched=touched)
            except NotAcknowledged:
                # Each further try would wait for the same replicas.
                raise
            except StoreUncertain as error:
                uncertain = error
                failure: Exception = error
            except StoreUnavailable as error:
                failure = error
            if attempt < len(ATTEMPT_PAUSES_SECONDS):
                log.info("redis_call_retried", script=script.name, reason=str(failure))
                await asyncio.sleep(ATTEMPT_PAUSES_SECONDS[attempt])
            else:
                raise uncertain or failure
        raise AssertionError("unreachable")


def _touch(key: str) -> list[tuple[str | int, ...]]:
    return [("EVALSHA", load("touch").sha, 1, key)] if key else []


def _loading(script: Script) -> tuple[str, ...]:
    return ("SCRIPT", "LOAD", script.source)
