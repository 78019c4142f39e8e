"""The pods of the Helm chart: their commands and variables as processes, and their probes."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import helm_python as helm
import httpx
import pytest
import yaml

from tests.support.databases import running_postgres
from tests.support.programs import end
from tests.support.service import START_SECONDS, STOP_SECONDS, eventually, free_port
from tests.support.valkey import running

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(480)]

CHART = Path(__file__).resolve().parents[3] / "deploy" / "helm" / "reservation"
SECRETS = "/run/secrets/reservation"


def containers(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The container of each pod, by its name."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="shop")
    found: dict[str, dict[str, Any]] = {}
    for path, text in files.items():
        for manifest in yaml.safe_load_all(text) if path.endswith(".yaml") else ():
            if manifest and manifest["kind"] in {"Deployment", "Job"}:
                (container,) = manifest["spec"]["template"]["spec"]["containers"]
                found[container["name"]] = container
    return found


def environment(container: dict[str, Any], folder: Path, secrets_folder: Path) -> dict[str, str]:
    """The container's variables with the image's, on this machine."""
    given = {pair["name"]: pair["value"] for pair in container["env"]}
    here = {name: value.replace(SECRETS, str(secrets_folder)) for name, value in given.items()}
    bare = {name: value for name, value in os.environ.items() if "RESERVATION" not in name}
    return {
        **bare,
        "RESERVATION_HOST": "127.0.0.1",
        "RESERVATION_DATA_DIR": str(folder),
        **here,
    }


def command(container: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "api.cli", *container["args"]]


@contextmanager
def pod(container: dict[str, Any], folder: Path, secrets_folder: Path) -> Iterator[None]:
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command(container),
            env=environment(container, folder / "data", secrets_folder),
            stdout=log,
            stderr=log,
        )
    try:
        yield
    except BaseException:
        sys.stderr.write((folder / "log").read_text())
        raise
    finally:
        end(process, within=STOP_SECONDS)


def is_probed(http: httpx.Client, container: dict[str, Any], probe: str) -> bool:
    """Whether the probe succeeds."""
    request = container[probe]["httpGet"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    url = f"http://127.0.0.1:{ports[request['port']]}{request['path']}"
    with suppress(httpx.HTTPError):
        return http.get(url).is_success
    return False


def test_the_pods_migrate_start_and_answer_their_probes(tmp_path: Path) -> None:
    values = helm.values_from_yaml((CHART / "ci" / "development.yaml").read_text())
    values["migration"] = {"enabled": True}
    values["ports"] = {name: free_port() for name in ("http", "internal", "metrics")}
    folder = tmp_path / "secrets"
    folder.mkdir()
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client(timeout=30, trust_env=False))
        postgres = stack.enter_context(running_postgres())
        valkey = stack.enter_context(running(tmp_path / "valkey"))
        values["settings"]["RESERVATION_REDIS_URL"] = valkey.url
        for source in values["secrets"]:
            for name in source["items"]:
                (folder / name).write_text(f"{secrets.token_urlsafe(32)}\n")
        (folder / "RESERVATION_DATABASE_URL").write_text(f"{postgres.make_database()}\n")
        found = containers(values)
        migrated = subprocess.run(
            command(found["migration"]),
            env=environment(found["migration"], tmp_path / "migration", folder),
            check=False,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert migrated.returncode == 0, migrated.stderr
        assert "The schema is at" in migrated.stdout
        for name in ("api", "worker"):
            stack.enter_context(pod(found[name], tmp_path / name, folder))
            for probe in ("startupProbe", "livenessProbe"):
                eventually(
                    lambda name=name, probe=probe: is_probed(http, found[name], probe),
                    bool,
                    within=START_SECONDS,
                )
        assert is_probed(http, found["api"], "readinessProbe")
        internal = f"http://127.0.0.1:{values['ports']['internal']}"
        public = f"http://127.0.0.1:{values['ports']['http']}"
        assert http.get(f"{internal}/metrics").status_code == 200
        assert http.get(f"{public}/metrics").status_code == 404
