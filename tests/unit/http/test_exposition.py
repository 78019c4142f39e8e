"""Prometheus' text format: rendered off the event loop, once per second for all scrapes."""

import asyncio
import threading

import pytest

from api.http.exposition import KEPT_SECONDS, Exposition

WAIT_SECONDS = 10.0


class Maker:
    """Renders a text only once the event loop has made progress."""

    def __init__(self) -> None:
        self.proceed = threading.Event()
        self.made = 0
        self.now = 0.0

    def __call__(self) -> bytes:
        assert self.proceed.wait(WAIT_SECONDS)
        self.made += 1
        return b"%d" % self.made

    def monotonic(self) -> float:
        return self.now


async def test_rendering_metrics_does_not_block_the_event_loop() -> None:
    maker = Maker()
    exposition = Exposition(maker, monotonic=maker.monotonic)
    asking = [asyncio.create_task(exposition.text()) for _ in range(16)]
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(maker.proceed.set)
    assert await asyncio.wait_for(asyncio.gather(*asking), WAIT_SECONDS) == [b"1"] * 16


async def test_the_exposition_is_cached_for_a_second() -> None:
    maker = Maker()
    maker.proceed.set()
    exposition = Exposition(maker, monotonic=maker.monotonic)
    assert await exposition.text() == b"1"
    maker.now += KEPT_SECONDS * 0.9
    assert await exposition.text() == b"1"
    maker.now += KEPT_SECONDS * 0.2
    assert await exposition.text() == b"2"


async def test_a_cancelled_caller_does_not_cancel_the_shared_rendering() -> None:
    maker = Maker()
    exposition = Exposition(maker, monotonic=maker.monotonic)
    first, second = (asyncio.create_task(exposition.text()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    maker.proceed.set()
    assert await asyncio.wait_for(second, WAIT_SECONDS) == b"1"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_failed_rendering_is_retried() -> None:
    texts: list[bytes] = []

    def make() -> bytes:
        texts.append(b"x")
        if len(texts) == 1:
            raise OSError("a file is gone")
        return b"text"

    exposition = Exposition(make)
    with pytest.raises(OSError, match="gone"):
        await exposition.text()
    assert await exposition.text() == b"text"
