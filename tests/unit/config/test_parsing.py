"""Parsing of the environment: Kubernetes' service variables and the cgroup's CPU quota."""

from pathlib import Path

import pytest

from reservation.config import parsing as environment
from reservation.config.settings import ClientSettings, Settings, SettingsError

#: The variables of every pod in a namespace with the Services `reservation`,
#: `reservation-redis` and `reservation-metrics`.
SERVICE_LINKS = {
    "RESERVATION_SERVICE_HOST": "10.96.7.20",
    "RESERVATION_SERVICE_PORT": "8000",
    "RESERVATION_SERVICE_PORT_HTTP": "8000",
    "RESERVATION_PORT": "tcp://10.96.7.20:8000",
    "RESERVATION_PORT_8000_TCP": "tcp://10.96.7.20:8000",
    "RESERVATION_PORT_8000_TCP_PROTO": "tcp",
    "RESERVATION_PORT_8000_TCP_PORT": "8000",
    "RESERVATION_PORT_8000_TCP_ADDR": "10.96.7.20",
    "RESERVATION_REDIS_SERVICE_HOST": "10.96.7.21",
    "RESERVATION_REDIS_SERVICE_PORT": "6379",
    "RESERVATION_REDIS_PORT": "tcp://10.96.7.21:6379",
    "RESERVATION_REDIS_PORT_6379_TCP": "tcp://10.96.7.21:6379",
    "RESERVATION_REDIS_PORT_53_UDP_PROTO": "udp",
    "RESERVATION_METRICS_SERVICE_HOST": "10.96.7.22",
    "RESERVATION_METRICS_PORT": "tcp://10.96.7.22:9100",
}


def test_kubernetes_service_variables_are_not_settings(tmp_path: Path) -> None:
    environ = {**SERVICE_LINKS, "RESERVATION_DATA_DIR": str(tmp_path)}
    settings = Settings.load(environ, None)
    assert (settings.port, settings.metrics_port) == (8000, 0)
    assert ClientSettings.load(environ, None).public_url == "http://127.0.0.1:8000"


def test_a_service_variable_does_not_override_the_port_in_dotenv(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"RESERVATION_PORT=9000\nRESERVATION_DATA_DIR={tmp_path}\n")
    assert Settings.load(SERVICE_LINKS, dotenv).port == 9000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESERVATION_PORT", "tcp:8000"),
        ("RESERVATION_PORT", "http://10.96.7.20:8000"),
        ("RESERVATION_PROT", "tcp://10.96.7.20:8000"),
        ("RESERVATION_SERVICEHOST", "10.96.7.20"),
        ("RESERVATION_HOSTS", "10.96.7.20"),
    ],
)
def test_a_setting_resembling_a_service_variable_is_refused(
    tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.load({name: value, "RESERVATION_DATA_DIR": str(tmp_path)}, None)


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        # cgroup v2 inside a container: its own group is the root.
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "150000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        # The quota of a parent group counts too.
        (
            {
                "proc/self/cgroup": "0::/shop.slice/reservation.service\n",
                f"{V2}/shop.slice/cpu.max": "300000 100000\n",
                f"{V2}/shop.slice/reservation.service/cpu.max": "max 100000\n",
            },
            3,
        ),
        # cgroup v1: inside a container the group's path is the host's and not mounted.
        (
            {
                "proc/self/cgroup": "4:memory:/x\n2:cpu,cpuacct:/kubepods/pod7\n",
                f"{V1}/cpu.cfs_quota_us": "400000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/\n",
                f"{V1}/cpu.cfs_quota_us": "-1\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_cpu_quota_is_read_from_the_control_group(
    tmp_path: Path, files: dict[str, str], cpus: int | None
) -> None:
    assert environment.quota_of_cpus(_files(tmp_path, files)) == cpus


def test_a_pod_of_two_cpus_starts_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _files(tmp_path, {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000\n"})
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(environment, "ROOT", root)
    assert Settings.load({"RESERVATION_DATA_DIR": str(tmp_path)}, None).workers == 2
