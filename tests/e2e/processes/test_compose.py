"""Processes of compose.yaml on this machine, with its commands and its environment."""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from reservation.adapters.redis.embedded.files import find_binary
from reservation.config.settings import Settings
from tests.support.databases import running_postgres
from tests.support.programs import find
from tests.support.service import START_SECONDS, STOP_SECONDS, Served, free_port

ROOT = Path(__file__).resolve().parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
PROXIES = "RESERVATION_TRUSTED_PROXIES"
#: The variables of `.env`; the secrets are empty.
EXAMPLE: dict[str, str] = dict(
    re.findall(
        r"^([A-Z_]+)=(.*)$", (ROOT / "deploy" / "compose.env.example").read_text(), re.MULTILINE
    )
)


def resolved(text: str, given: dict[str, str]) -> str:
    """`${NAME:?}`, `${NAME:-default}` and `${NAME-default}`, as compose reads them."""

    def value(found: re.Match[str]) -> str:
        name, how, default = found.groups()
        if how == ":?" and not given.get(name):
            raise AssertionError(f"compose asks for {name}")
        return given.get(name) or default

    return re.sub(r"\$\{([A-Z_]+)(:\?|:-|-)([^}]*)\}", value, text)


def test_the_going_live_guide_sets_each_compose_variable() -> None:
    """The page's `.env`, through compose's environment: production takes it, nothing is lost."""
    page = (ROOT / "docs" / "how-to" / "going-live.md").read_text()
    lines = re.findall(r"^([A-Z_]+)=(\S+)$", page, re.MULTILINE)
    given = {name: value.replace("$(secret)", secrets.token_urlsafe(32)) for name, value in lines}
    for name in ("api", "worker"):
        environment = SERVICES[name]["environment"]
        passed = {setting: resolved(str(text), given) for setting, text in environment.items()}
        settings = Settings.load(passed, None)
        assert settings.production
        assert settings.toss_checkout_url == ""
        expected = given | {PROXIES: f"10.213.77.0/24,{given[PROXIES]}"}
        del expected["POSTGRES_PASSWORD"]
        assert {setting: passed[setting] for setting in expected} == expected


def test_the_proxy_of_compose_is_trusted_by_default() -> None:
    given = {name: secrets.token_urlsafe(32) for name, value in EXAMPLE.items() if not value}
    environment = SERVICES["api"]["environment"]
    passed = {setting: resolved(str(text), given) for setting, text in environment.items()}
    (network,) = COMPOSE["networks"]["edge"]["ipam"]["config"]
    trusted = Settings.load(passed, None).trusted_proxies
    assert trusted == (resolved(network["subnet"], given),)


@contextmanager
def process(command: list[str], folder: Path, environ: dict[str, str]) -> Iterator[None]:
    """One service, ended by its own process id."""
    folder.mkdir()
    bare = {name: value for name, value in os.environ.items() if "RESERVATION" not in name}
    with (folder / "log").open("wb") as log:
        started = subprocess.Popen(
            command, cwd=folder, env=bare | environ, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        started.terminate()
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def own(name: str, folder: Path, given: dict[str, str], places: dict[str, str]) -> dict[str, str]:
    """The environment of one of our services, with this machine's addresses."""
    found = {"RESERVATION_DATA_DIR": str(folder)}
    for setting, text in SERVICES[name]["environment"].items():
        value = resolved(str(text), given)
        for there, here in places.items():
            value = value.replace(there, here)
        if value:
            found[setting] = value
    return found


def nginx_of_compose(folder: Path, front: int, ports: list[int]) -> list[str]:
    """Nginx by `deploy/nginx.conf`, without Docker's DNS, and in this folder."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    servers = "".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)
    temporary = " ".join(
        f"{name}_temp_path {folder}/nginx-{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    for there, here in (
        ("resolver 127.0.0.11 valid=2s;", temporary),
        ("server api:8000 resolve max_fails=0;", servers),
        ("listen 8000;", f"listen 127.0.0.1:{front};"),
        ("worker_rlimit_nofile 40000;", f"daemon off; pid {folder}/nginx.pid;"),
        ("worker_connections 16384;", "worker_connections 512;"),
    ):
        assert text.count(there) == 1, there
        text = text.replace(there, here)
    path = folder / "nginx.conf"
    path.write_text(text)
    return [str(find("nginx")), "-e", f"{folder}/nginx.err", "-c", str(path)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    given = EXAMPLE | {
        name: secrets.token_urlsafe(32) for name, value in EXAMPLE.items() if not value
    }
    redis, front, pg, metrics, *ports = (free_port() for _ in range(6))
    reservation = [sys.executable, "-m", "api.cli"]
    with running_postgres() as postgres, ExitStack() as running:
        database = (
            f"postgresql://reservation:{given['POSTGRES_PASSWORD']}@postgres:5432/reservation"
        )
        places = {
            database: postgres.make_database(),
            "valkey:6379": f"127.0.0.1:{redis}",
            "sandbox:8090": f"127.0.0.1:{pg}",
            "127.0.0.1:8090": f"127.0.0.1:{pg}",
            "127.0.0.1:8000": f"127.0.0.1:{front}",
            "9100": str(metrics),
            # The proxy of this test.
            "10.213.77.0/24": "127.0.0.1",
        }
        server = [str(find_binary()), str(ROOT / "deploy" / "valkey.conf")]
        server += ["--port", str(redis), "--bind", "127.0.0.1"]
        running.enter_context(process(server, tmp_path / "valkey", {}))
        command = [str(pg) if word == "8090" else word for word in SERVICES["sandbox"]["command"]]
        running.enter_context(process([*reservation, *command], tmp_path / "pg", {}))
        environ = own("api", tmp_path / "api1", given, places)
        machines = (("api", "api1", ports[0]), ("api", "api2", ports[1]), ("worker", "worker", 0))
        for name, machine, port in machines:
            folder = tmp_path / machine
            variables = own(name, folder, given, places) | {"RESERVATION_PORT": str(port)}
            command = SERVICES[name]["command"]
            running.enter_context(process([*reservation, *command], folder, variables))
        proxy = nginx_of_compose(tmp_path, front, ports)
        running.enter_context(process(proxy, tmp_path / "proxy", {}))
        served = Served(Settings.load(environ, None), None, tmp_path / "api1" / "log")  # type: ignore[arg-type]
        wait_until_ready(served)
        yield served
        served.http.close()


def wait_until_ready(served: Served) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        with suppress(httpx.HTTPError):
            if served.http.get("/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(served.log.read_text()[-4000:])


@pytest.mark.slow
def test_the_compose_services_sell_a_unit_together(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = served.open_success_url(order, served.pay(order))
    assert answer.json()["status"] == "CONFIRMED", answer.text
    assert served.audit(sale_id)["ok"]
    assert served.stock(sale_id) == (99, 0, 1)
