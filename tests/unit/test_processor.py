"""When the processor counts as full: by what this process takes, or by the whole machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from api import processor
from api.processor import LOOK_SECONDS, Processor


class Machine:
    """What the clocks and the system tell, as the test says."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stat = directory / "stat"
        self._now = self._used = 0.0
        self._busy = self._idle = 1_000
        clocks = SimpleNamespace(monotonic=lambda: self._now, process_time=lambda: self._used)
        monkeypatch.setattr(processor, "time", clocks)
        self.passes(0)

    def passes(self, seconds: float, *, used: float = 0.0, idle: float = 1.0) -> None:
        """So long; `used` is this process's share of a core, `idle` the machine's."""
        self._now += seconds
        self._used += used * seconds
        self._idle += round(idle * 1_000)
        self._busy += 1_000 - round(idle * 1_000)
        # user nice system idle iowait irq softirq steal guest guest_nice, then a line a core.
        numbers = [self._busy - 3, 1, 1, self._idle - 9, 9, 1, 0, 0, 0, 0]
        self.stat.write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 1 2 3 4\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("used", "idle", "full"),
    [(0.95, 0.5, True), (0.6, 0.12, True), (0.85, 0.3, False), (0.0, 1.0, False)],
)
def test_it_is_full_by_this_process_or_by_the_whole_machine(
    machine: Machine, used: float, idle: float, full: bool
) -> None:
    looked_at = Processor(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=used, idle=idle)
    assert looked_at.is_full() is full


def test_what_was_seen_stands_until_it_is_looked_at_again(machine: Machine) -> None:
    looked_at = Processor(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=1.0, idle=0.0)
    assert looked_at.is_full()
    machine.passes(LOOK_SECONDS * 0.5)
    assert looked_at.is_full()
    machine.passes(LOOK_SECONDS * 0.6)
    assert not looked_at.is_full()


def test_what_was_seen_stands_while_it_cannot_be_looked_at(machine: Machine) -> None:
    """A crowd may have taken the last file descriptor."""
    looked_at = Processor(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=1.0, idle=0.0)
    assert looked_at.is_full()
    machine.passes(LOOK_SECONDS * 1.1)
    machine.stat.unlink()
    assert looked_at.is_full()
    machine.passes(LOOK_SECONDS * 1.1)
    assert not looked_at.is_full()


def test_where_the_system_tells_nothing_of_the_machine_this_process_counts(
    machine: Machine, tmp_path: Path
) -> None:
    looked_at = Processor(tmp_path / "there is none")
    machine.passes(LOOK_SECONDS * 1.1, used=0.5, idle=0.0)
    assert not looked_at.is_full()
    machine.passes(LOOK_SECONDS * 1.1, used=0.95)
    assert looked_at.is_full()
