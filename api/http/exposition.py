"""Prometheus' text of this host: made outside the event loop and kept for a second."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import generate_latest

from reservation.telemetry.metrics import registry

__all__ = ["Exposition"]

#: How old an answer may be. Scrapes come every few seconds; the console asks every two.
KEPT_SECONDS: Final = 1.0


def _make() -> bytes:
    return generate_latest(registry())


class Exposition:
    """One text for all who ask within a second, however many they are."""

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
        """The text of at most a second ago; raises the error of the attempt to make it."""
        if self._making is None:
            if self._monotonic() - self._made_at < KEPT_SECONDS:
                return self._text
            self._making = asyncio.create_task(self._renew())
        # A caller that leaves must not end it for the others.
        return await asyncio.shield(self._making)

    async def _renew(self) -> bytes:
        try:
            # All files of all processes, in Python: 20 to 50 ms.
            self._text = await asyncio.to_thread(self._make)
            self._made_at = self._monotonic()
            return self._text
        finally:
            self._making = None
