"""Network between the service and Redis, which may be slow, lose messages, or go down."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

__all__ = ["Link", "Trouble"]

_CHUNK = 1 << 18


class Trouble(Enum):
    """The network's effect on messages."""

    NONE = "none"
    #: A script's call is dropped with its connection before the server has it.
    LOSES_REQUESTS = "loses requests"
    #: It is carried out, and its reply is dropped with the connection.
    LOSES_REPLIES = "loses replies"
    #: Everything is accepted and nothing passes.
    BLACK_HOLE = "black hole"
    #: Everything passes, later.
    SLOW = "slow"


class Link:
    """Listens on its own socket and passes bytes both ways.

    Args:
        target: the server's socket.
        path: our own.
    """

    def __init__(self, target: Path, path: Path) -> None:
        self._target, self._path = target, path
        self._trouble = Trouble.NONE
        self._delay = 0.0
        self._well = asyncio.Event()
        self._well.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        #: Connections that were cut off in the middle of a message.
        self.lost = 0

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_CHUNK)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()

    @contextmanager
    def trouble(self, trouble: Trouble, delay: float = 0.0) -> Iterator[None]:
        """The network has this trouble during the block; messages queued in it are dropped then."""
        self._trouble, self._delay = trouble, delay
        if trouble is Trouble.BLACK_HOLE:
            self._well.clear()
        try:
            yield
        finally:
            self._trouble, self._delay = Trouble.NONE, 0.0
            self._well.set()
            if trouble is Trouble.BLACK_HOLE:
                self.reset()

    def reset(self) -> None:
        """Cut every connection."""
        self.lost += len(self._open)
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            there, upstream = await asyncio.open_unix_connection(self._target, limit=_CHUNK)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, upstream, Trouble.LOSES_REQUESTS))
                group.create_task(self._pump(there, writer, Trouble.LOSES_REPLIES))
        except* (OSError, _CutError):
            pass
        finally:
            self._open.discard(writer)
            for one in (writer, upstream):
                if one is not None:
                    one.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, loses: Trouble
    ) -> None:
        while data := await source.read(_CHUNK):
            await self._well.wait()
            if self._trouble is loses and (loses is Trouble.LOSES_REPLIES or b"EVALSHA" in data):
                self.lost += 1
                raise _CutError
            if self._delay:
                await asyncio.sleep(self._delay)
            to.write(data)
            await to.drain()
        raise _CutError


class _CutError(Exception):
    """One end is closed: so is the other."""
