"""Prometheus exposition of this host: rendered outside the event loop and cached for a second."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import generate_latest

from reservation.telemetry.metrics import registry

__all__ = ["Exposition"]

#: Maximum age of the text. Scrapes come every few seconds; the console polls every two.
KEPT_SECONDS: Final = 1.0


def _make() -> bytes:
    return generate_latest(registry())


class Exposition:
    """One rendering shared by all scrapes within a second."""

    def __init__(
        self,
        make: Callable[[], bytes] = _make,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._monotonic = monotonic
        self._text = b""
        self._made_at = float("-inf")
        self._making: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        """The text, at most a second old; raises the error of the rendering."""
        if self._making is None:
            if self._monotonic() - self._made_at < KEPT_SECONDS:
                return self._text
            self._making = asyncio.create_task(self._renew())
        # A caller that disconnects must not cancel the rendering for the others.
        return await asyncio.shield(self._making)

    async def _renew(self) -> bytes:
        try:
            # Reads the files of all processes in Python: 20 to 50 ms.
            self._text = await asyncio.to_thread(self._make)
            self._made_at = self._monotonic()
            return self._text
        finally:
            self._making = None
