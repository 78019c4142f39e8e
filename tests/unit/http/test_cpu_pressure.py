"""CPU saturation of this process, and of its quota or the host."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from api.http.fastpath import cpu_pressure
from api.http.fastpath.cpu_pressure import SAMPLE_SECONDS, CpuPressure

#: A little longer than a sample.
SAMPLE = SAMPLE_SECONDS * 1.1
PERIODS = 5


class Machine:
    """Clocks, /proc and /sys under the test's control."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.stat = root / "proc/stat"
        self.stat.parent.mkdir()
        self._now = self._used = 0.0
        self._busy = self._idle = 1_000
        self._group: Path | None = None
        self._cores = self._group_used = 0.0
        self._periods = self._throttled = 0
        clocks = SimpleNamespace(monotonic=lambda: self._now, process_time=lambda: self._used)
        monkeypatch.setattr(cpu_pressure, "time", clocks)
        self.passes(0)

    def limit(self, cores: float) -> None:
        """Put the process under a quota, as a container of cgroup v2 sees it."""
        (self.root / "proc/self").mkdir()
        (self.root / "proc/self/cgroup").write_text("0::/\n")
        self._group, self._cores = self.root / "sys/fs/cgroup", cores
        self._group.mkdir(parents=True)
        (self._group / "cpu.max").write_text(f"{round(cores * 100_000)} 100000\n")
        self.passes(0)

    def passes(
        self,
        seconds: float,
        *,
        used: float = 0.0,
        idle: float = 1.0,
        quota_used: float = 0.0,
        throttled: int = 0,
    ) -> None:
        """Advance time.

        Args:
            seconds: the interval.
            used: this process's share of a core.
            idle: the host's share.
            quota_used: the group's share of its quota.
            throttled: of `PERIODS` periods.
        """
        self._now += seconds
        self._used += used * seconds
        self._idle += round(idle * 1_000)
        self._busy += 1_000 - round(idle * 1_000)
        # user nice system idle iowait irq softirq steal guest guest_nice, then one line per core.
        numbers = [self._busy - 3, 1, 1, self._idle - 9, 9, 1, 0, 0, 0, 0]
        self.stat.write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 1 2 3 4\n")
        if self._group is not None:
            self._group_used += quota_used * self._cores * seconds
            self._periods += PERIODS
            self._throttled += throttled
            (self._group / "cpu.stat").write_text(
                f"usage_usec {round(self._group_used * 1e6)}\nuser_usec 1\nsystem_usec 1\n"
                f"nr_periods {self._periods}\nnr_throttled {self._throttled}\nthrottled_usec 9\n"
            )


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
def test_pressure_is_that_of_the_process_or_of_the_host(
    machine: Machine, used: float, idle: float, shortage: float
) -> None:
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, used=used, idle=idle)
    assert pressure.shortage() == pytest.approx(shortage)


@pytest.mark.parametrize(
    ("used", "quota_used", "throttled", "shortage"),
    [
        (0.95, 0.5, 0, 1.0),
        (0.4, 0.95, 0, 1.0),
        (0.4, 0.85, 0, 0.5),
        (0.4, 0.8, 0, 0.0),
        (0.4, 0.8, 1, 0.8),
        (0.4, 0.5, 4, 1.0),
        (0.0, 0.0, 0, 0.0),
    ],
)
def test_a_quota_ignores_idle_cores_of_the_host(
    machine: Machine, used: float, quota_used: float, throttled: int, shortage: float
) -> None:
    machine.limit(0.5)
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, used=used, idle=1.0, quota_used=quota_used, throttled=throttled)
    assert pressure.shortage() == pytest.approx(shortage)


def test_a_quota_ignores_other_load_of_the_host(machine: Machine) -> None:
    machine.limit(0.5)
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, used=0.1, idle=0.0, quota_used=0.2)
    assert pressure.shortage() == 0.0


def test_a_new_quota_takes_effect_at_the_second_sample(machine: Machine) -> None:
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, idle=0.0)
    assert pressure.shortage() == 1.0
    machine.limit(0.5)
    machine.passes(SAMPLE, idle=0.0, quota_used=1.0)
    assert pressure.shortage() == 0.0
    machine.passes(SAMPLE, idle=1.0, quota_used=1.0)
    assert pressure.shortage() == 1.0


def test_a_removed_quota_falls_back_to_the_host(machine: Machine) -> None:
    machine.limit(0.5)
    pressure = CpuPressure(machine.root)
    (machine.root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    machine.passes(SAMPLE, idle=0.0)
    assert pressure.shortage() == 0.0
    machine.passes(SAMPLE, idle=0.0)
    assert pressure.shortage() == 1.0


def test_a_result_is_kept_until_the_next_sample(machine: Machine) -> None:
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, used=1.0, idle=0.0)
    assert pressure.shortage() == 1.0
    machine.passes(SAMPLE_SECONDS * 0.5)
    assert pressure.shortage() == 1.0
    machine.passes(SAMPLE_SECONDS * 0.6)
    assert pressure.shortage() == 0.0


def test_a_failed_sample_keeps_the_last_result(machine: Machine) -> None:
    """A surge may have taken the last file descriptor."""
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, used=1.0, idle=0.0)
    assert pressure.shortage() == 1.0
    machine.passes(SAMPLE)
    machine.stat.unlink()
    assert pressure.shortage() == 1.0
    machine.passes(SAMPLE)
    assert pressure.shortage() == 0.0


def test_an_unreadable_file_keeps_the_last_result(machine: Machine) -> None:
    machine.limit(0.5)
    pressure = CpuPressure(machine.root)
    machine.passes(SAMPLE, quota_used=1.0)
    assert pressure.shortage() == 1.0
    (machine.root / "sys/fs/cgroup/cpu.max").write_text("unlimited\n")
    machine.passes(SAMPLE)
    assert pressure.shortage() == 1.0


def test_without_proc_files_only_the_process_counts(machine: Machine, tmp_path: Path) -> None:
    pressure = CpuPressure(tmp_path / "none")
    machine.passes(SAMPLE, used=0.5, idle=0.0)
    assert pressure.shortage() == 0.0
    machine.passes(SAMPLE, used=0.95)
    assert pressure.shortage() == 1.0


def test_the_files_of_this_machine_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pressure = CpuPressure()
    monkeypatch.setattr(cpu_pressure, "SAMPLE_SECONDS", 0.0)
    assert 0.0 <= pressure.shortage() <= 1.0
    if Path("/proc/stat").exists():
        sample = pressure._seen
        assert sample.quota is not None or 0 < sample.idle < sample.ticks
