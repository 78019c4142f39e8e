"""Load shedding: rejects excess prepares at a bounded rate, lower while the CPU is saturated."""

import asyncio
from collections.abc import Callable

import pytest

from api.http.fastpath import load_shedding
from api.http.fastpath.load_shedding import LoadShedder

#: Longer than any test waits.
NEVER = 3_600.0


class Crowd:
    """Newcomers, and the order in which they were rejected."""

    def __init__(self, *, shortage: Callable[[], float] = lambda: 0.0) -> None:
        self.load_shedding = LoadShedder(shortage)
        self.refused: list[str] = []
        self.done: list[str] = []

    def add(self, *names: str, disconnected: bool = False, broken: bool = False) -> None:
        for name in names:
            newcomer = Newcomer(self, name, disconnected=disconnected, broken=broken)
            self.load_shedding.add(newcomer, 503, b"", lambda name=name: self.done.append(name))


class Newcomer:
    def __init__(self, crowd: Crowd, name: str, *, disconnected: bool, broken: bool) -> None:
        self.disconnected = disconnected
        self._crowd, self._name, self._broken = crowd, name, broken

    def write(self, status: int, message: bytes) -> None:
        assert (status, message) == (503, b"")
        if self._broken:
            raise OSError("cannot be written")
        if not self.disconnected:
            self._crowd.refused.append(self._name)


def named(count: int) -> list[str]:
    return [f"{number:02}" for number in range(count)]


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not seen():  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.001)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_refusals_per_loop_turn_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    crowd = Crowd()
    crowd.add(*named(7))
    refused = []
    for _ in range(4):
        refused.append(len(crowd.refused))
        await turns(1)
    assert refused == [0, 3, 6, 7]
    assert sorted(crowd.done) == named(7)


async def test_a_turn_refuses_newest_and_oldest_arrivals_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 4)
    monkeypatch.setattr(load_shedding, "OLDEST_FIRST_EVERY", 2)
    crowd = Crowd()
    crowd.add(*named(8))
    await turns(1)
    assert crowd.refused == ["00", "07", "01", "06"]


async def test_disconnected_clients_use_up_no_slot_of_the_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    crowd = Crowd()
    crowd.add(*named(50), disconnected=True)
    crowd.add("one", "two", "three")
    await turns(1)
    assert sorted(crowd.refused) == ["one", "three", "two"]


async def test_a_failed_write_does_not_stop_the_refusals_behind_it() -> None:
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: raised.append(context["exception"])
    )
    crowd = Crowd()
    crowd.add("one")
    crowd.add("two", broken=True)
    crowd.add("three")
    await turns(3)
    assert sorted(crowd.refused) == ["one", "three"]
    assert [str(one) for one in raised] == ["cannot be written"]


async def test_under_cpu_saturation_refusals_are_paced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    monkeypatch.setattr(load_shedding, "PAUSE_SECONDS", NEVER)
    crowd = Crowd(shortage=lambda: 1.0)
    crowd.add(*named(7))
    await turns(20)
    assert len(crowd.refused) == 3


async def test_the_pause_grows_with_the_cpu_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    monkeypatch.setattr(load_shedding, "PAUSE_SECONDS", 0.4)
    pauses: list[float] = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda pause, _: pauses.append(pause)
    )
    for shortage in (1.0, 0.25):
        Crowd(shortage=lambda shortage=shortage: shortage).add(*named(7))
        await turns(3)
    assert pauses == [0.4, 0.1]


async def test_arrivals_during_a_pause_wait_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rejecting them one by one would cost most."""
    monkeypatch.setattr(load_shedding, "PAUSE_SECONDS", 0.05)
    crowd = Crowd(shortage=lambda: 1.0)
    crowd.add("first")
    await turns(3)
    crowd.add("in the pause")
    await turns(3)
    assert crowd.refused == ["first"]
    await until(lambda: len(crowd.refused) == 2)


async def test_refusals_are_not_paced_once_the_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    monkeypatch.setattr(load_shedding, "PAUSE_SECONDS", 0.001)
    short = [1.0, 0.0]
    crowd = Crowd(shortage=lambda: short.pop(0) if short else 0.0)
    crowd.add(*named(20))
    await until(lambda: len(crowd.refused) == 20)
    assert sorted(crowd.done) == named(20)
