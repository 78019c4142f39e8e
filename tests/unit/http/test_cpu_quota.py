"""The CPU quota of a control group, read from files in the format of cgroup v2 and v1."""

from pathlib import Path

import pytest

from api.http.fastpath.cpu_quota import QuotaUse, quota_use

#: As a container with 1.5 CPUs has it on cgroup v2.
STAT_V2 = """\
usage_usec 48215907
user_usec 37904113
system_usec 10311794
core_sched.force_idle_usec 0
nr_periods 4021
nr_throttled 317
throttled_usec 20815402
nr_bursts 0
burst_usec 0
"""
#: The same on cgroup v1.
STAT_V1 = "nr_periods 4021\nnr_throttled 317\nthrottled_time 20815402113\n"
#: A host with both versions: the controllers have version 1.
PATHS_V1 = """\
12:pids:/docker/3f1c
5:cpuset:/docker/3f1c
4:cpu,cpuacct:/docker/3f1c
1:name=systemd:/docker/3f1c
0::/system.slice/docker.service
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_a_v2_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.stat": STAT_V2,
        },
    )
    group = root / "sys/fs/cgroup"
    assert quota_use(root) == QuotaUse(group, 1.5, 48_215_907 / 1e6, 4021, 317)


@pytest.mark.parametrize(
    ("pod", "container", "cores", "smallest"),
    [
        ("200000 100000", "50000 100000", 0.5, "pod/container"),
        ("100000 100000", "max 100000", 1.0, "pod"),
        ("100000 100000", "400000 100000", 1.0, "pod"),
    ],
)
def test_the_smallest_quota_of_all_parent_groups_applies(
    tmp_path: Path, pod: str, container: str, cores: float, smallest: str
) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/cpu.stat": STAT_V2,
            "sys/fs/cgroup/pod/cpu.max": f"{pod}\n",
            "sys/fs/cgroup/pod/cpu.stat": STAT_V2,
            "sys/fs/cgroup/pod/container/cpu.max": f"{container}\n",
            "sys/fs/cgroup/pod/container/cpu.stat": STAT_V2,
        },
    )
    use = quota_use(root)
    assert use is not None
    assert (use.cores, use.group) == (cores, root / "sys/fs/cgroup" / smallest)


def test_an_unlimited_v2_group_has_no_quota(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/session.scope\n",
            "sys/fs/cgroup/cpu.stat": "usage_usec 48215907\nuser_usec 1\nsystem_usec 1\n",
            "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/cpu.stat": STAT_V2,
            "sys/fs/cgroup/user.slice/session.scope/cgroup.procs": "1\n",
        },
    )
    assert quota_use(root) is None


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_v1_reads_quota_and_usage_from_two_controllers(
    tmp_path: Path, joined: bool, inside: bool
) -> None:
    cpu, cpuacct = ("cpu,cpuacct", "cpu,cpuacct") if joined else ("cpu", "cpuacct")
    # In a container the mount shows only its group, and the path is the host's.
    group = "" if inside else "/docker/3f1c"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": PATHS_V1,
            f"sys/fs/cgroup/{cpu}{group}/cpu.cfs_quota_us": "50000\n",
            f"sys/fs/cgroup/{cpu}{group}/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/{cpu}{group}/cpu.stat": STAT_V1,
            f"sys/fs/cgroup/{cpuacct}{group}/cpuacct.usage": "48215907113\n",
        },
    )
    found = root / f"sys/fs/cgroup/{cpu}{group}"
    assert quota_use(root) == QuotaUse(found, 0.5, 48_215_907_113 / 1e9, 4021, 317)


def test_an_unlimited_v1_group_has_no_quota(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu:/\n3:cpuacct:/\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
            "sys/fs/cgroup/cpuacct/cpuacct.usage": "48215907113\n",
        },
    )
    assert quota_use(root) is None


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota_use(tmp_path) is None


def test_the_files_of_this_machine_can_be_read() -> None:
    use = quota_use(Path("/"))
    assert use is None or (use.cores > 0 and use.used_seconds > 0)
