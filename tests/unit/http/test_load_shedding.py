"""Load shedding: rejects excess prepares at a bounded rate, lower while the CPU is saturated."""

import asyncio
from collections.abc import Callable

import pytest

from api.http.fastpath import load_shedding as turned_away
from api.http.fastpath.load_shedding import LoadShedder

#: Longer than any test waits.
NEVER = 3_600.0


class Crowd:
    """Newcomers, and the order in which they were rejected."""

    def __init__(self, *, shortage: Callable[[], float] = lambda: 0.0) -> None:
        self.turned_away = LoadShedder(shortage)
        self.told: list[str] = []
        self.done: list[str] = []

    def comes(self, *names: str, gone: bool = False, broken: bool = False) -> None:
        for name in names:
            newcomer = Newcomer(self, name, gone=gone, broken=broken)
            self.turned_away.add(newcomer, 503, b"", lambda name=name: self.done.append(name))


class Newcomer:
    def __init__(self, crowd: Crowd, name: str, *, gone: bool, broken: bool) -> None:
        self.disconnected = gone
        self._crowd, self._name, self._broken = crowd, name, broken

    def write(self, status: int, message: bytes) -> None:
        assert (status, message) == (503, b"")
        if self._broken:
            raise OSError("cannot be written")
        if not self.disconnected:
            self._crowd.told.append(self._name)


def named(count: int) -> list[str]:
    return [f"{number:02}" for number in range(count)]


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not seen():  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.001)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_few_are_told_in_each_turn_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 3)
    crowd = Crowd()
    crowd.comes(*named(7))
    told = []
    for _ in range(4):
        told.append(len(crowd.told))
        await turns(1)
    assert told == [0, 3, 6, 7]
    assert sorted(crowd.done) == named(7)


async def test_most_of_them_have_just_come_and_some_have_waited_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 4)
    monkeypatch.setattr(turned_away, "ONE_OF_THE_FIRST_IN", 2)
    crowd = Crowd()
    crowd.comes(*named(8))
    await turns(1)
    assert crowd.told == ["00", "07", "01", "06"]


async def test_who_gave_up_takes_nobody_s_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 3)
    crowd = Crowd()
    crowd.comes(*named(50), gone=True)
    crowd.comes("one", "two", "three")
    await turns(1)
    assert sorted(crowd.told) == ["one", "three", "two"]


async def test_one_that_cannot_be_told_leaves_those_behind_it_their_turn() -> None:
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: raised.append(context["exception"])
    )
    crowd = Crowd()
    crowd.comes("one")
    crowd.comes("two", broken=True)
    crowd.comes("three")
    await turns(3)
    assert sorted(crowd.told) == ["one", "three"]
    assert [str(one) for one in raised] == ["cannot be written"]


async def test_while_the_processor_is_full_the_next_are_told_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 3)
    monkeypatch.setattr(turned_away, "PAUSE_SECONDS", NEVER)
    crowd = Crowd(shortage=lambda: 1.0)
    crowd.comes(*named(7))
    await turns(20)
    assert len(crowd.told) == 3


async def test_the_shorter_the_time_the_longer_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 3)
    monkeypatch.setattr(turned_away, "PAUSE_SECONDS", 0.4)
    pauses: list[float] = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda pause, _: pauses.append(pause)
    )
    for shortage in (1.0, 0.25):
        Crowd(shortage=lambda shortage=shortage: shortage).comes(*named(7))
        await turns(3)
    assert pauses == [0.4, 0.1]


async def test_who_comes_in_the_pause_waits_for_its_end_though_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rejecting them one by one would cost most."""
    monkeypatch.setattr(turned_away, "PAUSE_SECONDS", 0.05)
    crowd = Crowd(shortage=lambda: 1.0)
    crowd.comes("first")
    await turns(3)
    crowd.comes("in the pause")
    await turns(3)
    assert crowd.told == ["first"]
    await until(lambda: len(crowd.told) == 2)


async def test_once_it_is_full_no_more_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned_away, "TOLD_A_TURN", 3)
    monkeypatch.setattr(turned_away, "PAUSE_SECONDS", 0.001)
    short = [1.0, 0.0]
    crowd = Crowd(shortage=lambda: short.pop(0) if short else 0.0)
    crowd.comes(*named(20))
    await until(lambda: len(crowd.told) == 20)
    assert sorted(crowd.done) == named(20)
