"""Release artefacts: the wheel, the image, the compose file."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reservation.config.settings import Settings
from tests.support.programs import find

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=150,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def packed_below(wheel: zipfile.ZipFile, folder: str) -> set[str]:
    return {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}


def test_the_wheel_has_each_script_where_it_is_loaded_from(wheel: zipfile.ZipFile) -> None:
    scripts = files_below(ROOT / "scripts" / "lua")
    assert any(name.startswith("lib/") for name in scripts)
    assert packed_below(wheel, "reservation/adapters/redis/lua/") == scripts


@pytest.mark.parametrize("package", ["api", "reservation"])
def test_the_wheel_contains_each_file_of_the_packages(wheel: zipfile.ZipFile, package: str) -> None:
    """Pages, migrations and py.typed: files that .gitignore matches would be missing."""
    packed = packed_below(wheel, f"{package}/")
    assert "py.typed" in packed
    assert files_below(ROOT / package) <= packed


def test_the_wheel_contains_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"api", "reservation"}


def test_the_wheel_contains_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (licence,) = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert b"Apache License" in wheel.read(licence)
    (entries,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert b"reservation = api.cli:main" in wheel.read(entries)


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_each_compose_service_has_a_health_check() -> None:
    services = compose()["services"]
    by_profile: dict[str, set[str]] = {}
    for name, service in services.items():
        (profile,) = service.get("profiles", [""])
        by_profile.setdefault(profile, set()).add(name)
    assert by_profile == {
        "": {"valkey", "postgres", "api", "worker", "proxy"},
        "sandbox": {"sandbox"},
        "sentinel": {"replica-1", "replica-2", "sentinel-1", "sentinel-2", "sentinel-3"},
        "cluster": {*(f"cluster-{number}" for number in range(1, 7)), "cluster-form"},
        "watch": {"prometheus", "alertmanager", "grafana"},
    }
    for name in ("valkey", "postgres", "sandbox", "proxy"):
        assert services[name]["healthcheck"]["test"]
    for name in ("api", "worker"):
        waits = services[name]["depends_on"]
        assert {store: how["condition"] for store, how in waits.items()} == {
            "valkey": "service_healthy",
            "postgres": "service_healthy",
        }


def test_compose_listens_on_loopback_only() -> None:
    for service in compose()["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_api_machines_and_workers_can_be_scaled() -> None:
    """Containers of one service cannot share a port of the host or a data directory."""
    services = compose()["services"]
    for name in ("api", "worker"):
        assert not {"ports", "volumes", "container_name"} & set(services[name])
        assert any(mount.startswith("/data:") for mount in services[name]["tmpfs"])
    front = (ROOT / "deploy" / "nginx.conf").read_text()
    assert "server api:8000 resolve" in front
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    jobs = {job["job_name"]: job for job in scraped}
    for name in ("api", "worker"):
        (found,) = jobs[f"reservation-{name}"]["dns_sd_configs"]
        assert found["names"] == [name]


def test_a_service_without_containers_is_a_target_that_is_down() -> None:
    """A name without an address gives no target; ServiceDown needs one."""
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    fixed = {job["job_name"]: job for job in scraped if "static_configs" in job}
    assert set(fixed) == {"reservation-any-api", "reservation-any-worker"}
    for job in fixed.values():
        # Its samples would be counted twice.
        assert job["metric_relabel_configs"][0]["action"] == "drop"


def test_each_file_that_compose_mounts_exists() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source


def test_alerts_reach_a_receiver_by_their_severity() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    (manager,) = prometheus["alerting"]["alertmanagers"]
    assert manager["static_configs"][0]["targets"] == ["alertmanager:9093"]
    sent = yaml.safe_load((ROOT / "deploy" / "alertmanager.yml").read_text())
    receivers = {receiver["name"] for receiver in sent["receivers"]}
    assert receivers == {"page", "ticket"}
    (page,) = sent["route"]["routes"]
    assert page["matchers"] == ['severity="page"']
    assert {page["receiver"], sent["route"]["receiver"]} == receivers


@pytest.mark.system
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "prometheus.yml").read_text()
    secret = tmp_path / "key"
    secret.write_text("key")
    for there, here in (
        ("/etc/prometheus/alerts.yml", str(ROOT / "deploy" / "alerts.yml")),
        ("/run/secrets/reservation_admin_api_key", str(secret)),
    ):
        assert there in text
        text = text.replace(there, here)
    config = tmp_path / "prometheus.yml"
    config.write_text(text)
    subprocess.run(
        [find("promtool"), "check", "config", str(config)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_compose_contains_no_secret() -> None:
    for service in compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|SECRET|PASSWORD", name):
                assert re.fullmatch(r"\$\{[A-Z_]+:[?-]\}", value), name


def test_the_example_file_lists_each_compose_variable() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+):\?\}", (ROOT / "compose.yaml").read_text()))
    example = (ROOT / "deploy" / "compose.env.example").read_text()
    assert set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE)) == asked


def test_each_setting_can_be_set_through_compose() -> None:
    """Except those that a container fixes: its data directory, address and ports."""
    own = {"data_dir", "host", "port", "metrics_port"}
    wanted = {f"RESERVATION_{name.upper()}" for name in set(Settings.__struct_fields__) - own}
    for name in ("api", "worker"):
        assert wanted <= set(compose()["services"][name]["environment"])


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_runs_unprivileged_and_stops_on_sigterm() -> None:
    last = dict(instructions())
    assert last["USER"] == "10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["ENTRYPOINT"] == '["reservation"]'
    assert last["CMD"].startswith("[")
    # A restart on readiness would end payments in progress because a sale is closed.
    assert "/health/live" in last["HEALTHCHECK"]


def test_the_image_installs_the_locked_hashes() -> None:
    installs = [what for word, what in instructions() if word == "RUN" and "pip install" in what]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert '-r "requirements/${REQUIREMENTS}.txt"' in installs[0]
    assert ("ARG", "REQUIREMENTS=run") in instructions()
    assert "--no-deps" in installs[1]
    assert [word for word, _ in instructions()].count("FROM") == 2


def test_files_copied_into_the_image_are_not_ignored() -> None:
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copies = [what for word, what in instructions() if word == "COPY" and "--from" not in what]
    sources = {source for what in copies for source in what.split()[:-1]}
    assert sources == kept
    assert all((ROOT / source).exists() for source in kept)
