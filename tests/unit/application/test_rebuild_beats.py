"""Beats of a rebuild: they end with it, and none is interrupted in its statement."""

import asyncio
from typing import Any, cast

import pytest

from reservation.application.recovery import beats
from reservation.application.recovery.beats import beating


class SlowRebuilds:
    """A repository whose renewals take a moment."""

    def __init__(self) -> None:
        self.started, self.finished = asyncio.Event(), 0

    async def renew(self, *_: str) -> bool:
        self.started.set()
        await asyncio.sleep(0.05)
        self.finished += 1
        return True


class Row:
    """The row of a rebuild."""

    sale_id, epoch = "s", "e"


async def test_the_end_of_a_rebuild_lets_a_beat_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilds = SlowRebuilds()
    monkeypatch.setattr(beats, "BEAT_SECONDS", 0.01)
    async with beating(cast("Any", rebuilds), cast("Any", Row())):
        await rebuilds.started.wait()
        # Of the wait at the end, on a busy machine.
        monkeypatch.setattr(beats, "BEAT_SECONDS", 5.0)
    assert rebuilds.finished == 1
