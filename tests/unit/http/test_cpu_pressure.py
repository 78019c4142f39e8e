"""CPU saturation of this process and of the host."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from api.http.fastpath import cpu_pressure as processor
from api.http.fastpath.cpu_pressure import LOOK_SECONDS, CpuPressure


class Machine:
    """Clocks and /proc/stat under the test's control."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stat = directory / "stat"
        self._now = self._used = 0.0
        self._busy = self._idle = 1_000
        clocks = SimpleNamespace(monotonic=lambda: self._now, process_time=lambda: self._used)
        monkeypatch.setattr(processor, "time", clocks)
        self.passes(0)

    def passes(self, seconds: float, *, used: float = 0.0, idle: float = 1.0) -> None:
        """Advance time; `used` is this process's share of a core, `idle` the machine's."""
        self._now += seconds
        self._used += used * seconds
        self._idle += round(idle * 1_000)
        self._busy += 1_000 - round(idle * 1_000)
        # user nice system idle iowait irq softirq steal guest guest_nice, then one line per core.
        numbers = [self._busy - 3, 1, 1, self._idle - 9, 9, 1, 0, 0, 0, 0]
        self.stat.write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 1 2 3 4\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("used", "idle", "shortage"),
    [
        (0.95, 0.5, 1.0),
        (0.6, 0.05, 1.0),
        (0.6, 0.12, 1.0),
        (0.6, 0.15, 0.5),
        (0.85, 0.18, 0.0),
        (0.0, 1.0, 0.0),
    ],
)
def test_time_is_short_for_this_process_or_for_the_whole_machine(
    machine: Machine, used: float, idle: float, shortage: float
) -> None:
    looked_at = CpuPressure(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=used, idle=idle)
    assert looked_at.shortage() == pytest.approx(shortage)


def test_what_was_seen_stands_until_it_is_looked_at_again(machine: Machine) -> None:
    looked_at = CpuPressure(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=1.0, idle=0.0)
    assert looked_at.shortage() == 1.0
    machine.passes(LOOK_SECONDS * 0.5)
    assert looked_at.shortage() == 1.0
    machine.passes(LOOK_SECONDS * 0.6)
    assert looked_at.shortage() == 0.0


def test_what_was_seen_stands_while_it_cannot_be_looked_at(machine: Machine) -> None:
    """A crowd may have taken the last file descriptor."""
    looked_at = CpuPressure(machine.stat)
    machine.passes(LOOK_SECONDS * 1.1, used=1.0, idle=0.0)
    assert looked_at.shortage() == 1.0
    machine.passes(LOOK_SECONDS * 1.1)
    machine.stat.unlink()
    assert looked_at.shortage() == 1.0
    machine.passes(LOOK_SECONDS * 1.1)
    assert looked_at.shortage() == 0.0


def test_where_the_system_tells_nothing_of_the_machine_this_process_counts(
    machine: Machine, tmp_path: Path
) -> None:
    looked_at = CpuPressure(tmp_path / "there is none")
    machine.passes(LOOK_SECONDS * 1.1, used=0.5, idle=0.0)
    assert looked_at.shortage() == 0.0
    machine.passes(LOOK_SECONDS * 1.1, used=0.95)
    assert looked_at.shortage() == 1.0
