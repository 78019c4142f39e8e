"""Start in production: `reservation serve` refuses a Redis that it must not sell from."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from reservation.adapters.redis.embedded.files import find_binary
from tests.support.service import eventually, free_port

pytestmark = pytest.mark.e2e

#: A start on a busy machine.
PATIENCE_SECONDS = 40.0

KEY = "k" * 32
PRODUCTION = {
    "RESERVATION_ENV": "production",
    "RESERVATION_AUTH": "guest",
    "RESERVATION_ADMIN_API_KEY": KEY,
    "RESERVATION_SIGNING_KEYS": KEY,
    "RESERVATION_ORDER_ID_KEY": KEY,
    "RESERVATION_JWT_SECRET": KEY,
    "RESERVATION_TOSS_API_URL": "https://api.tosspayments.com",
    "RESERVATION_TOSS_SECRET_KEY": "live_gsk_test",
    "RESERVATION_TOSS_CLIENT_KEY": "live_gck_test",
    "RESERVATION_PUBLIC_URL": "https://shop.example",
}


@contextmanager
def forgetful(home: Path) -> Iterator[Path]:
    """A server that keeps nothing and throws stock out; its socket."""
    # A socket's path is short: the test's own folder may be too deep for it.
    with tempfile.TemporaryDirectory(prefix="rsv-") as folder:
        path = Path(folder) / "valkey.sock"
        options = ["--port", "0", "--save", "", "--maxmemory-policy", "allkeys-lru"]
        process = subprocess.Popen(
            [find_binary(), *options, "--unixsocket", str(path)],
            cwd=home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(path.exists, bool, within=PATIENCE_SECONDS)
            yield path
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(home: Path, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """`reservation serve`, ended whatever happens."""
    with (home / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "serve", *arguments],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")},
                "RESERVATION_DATA_DIR": str(home / "var"),
                "RESERVATION_PORT": str(free_port()),
                "RESERVATION_WORKERS": "1",
                **environ,
            },
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def log_lines(home: Path) -> list[str]:
    """Its output for operators."""
    lines = (home / "stderr.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("reservation: ")]


@pytest.mark.parametrize("role", [(), ("--role", "api"), ("--role", "worker")])
def test_each_stopping_condition_prints_one_line_and_exits_with_78(
    tmp_path: Path, role: tuple[str, ...]
) -> None:
    with forgetful(tmp_path) as path:
        given = {**PRODUCTION, "RESERVATION_REDIS_URL": f"unix://{path}"}
        with serving(tmp_path, *role, **given) as process:
            assert process.wait(PATIENCE_SECONDS) == 78
    lost, thrown_out = log_lines(tmp_path)
    means = "the append-only file is off: a restart loses all data"
    assert lost == f"reservation: redis-append-only-file: {means}"
    assert thrown_out.startswith("reservation: redis-eviction-policy: maxmemory-policy is not")


@pytest.mark.slow
def test_in_development_the_same_conditions_only_close_prepare(tmp_path: Path) -> None:
    with forgetful(tmp_path) as path:
        port = str(free_port())
        url = f"unix://{path}"
        with serving(tmp_path, RESERVATION_PORT=port, RESERVATION_REDIS_URL=url) as process:
            names = eventually(lambda: ready(port), bool, within=PATIENCE_SECONDS)["missing"]
            assert {"redis-append-only-file", "redis-eviction-policy"} <= set(names)
            assert process.poll() is None


@pytest.mark.slow
def test_the_embedded_server_is_fit_for_production(tmp_path: Path) -> None:
    port = str(free_port())
    with serving(tmp_path, RESERVATION_PORT=port, **PRODUCTION) as process:
        eventually(
            lambda: ready(port), lambda found: found.get("missing") == [], within=PATIENCE_SECONDS
        )
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert log_lines(tmp_path) == []


SECRETS = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")


def as_files(home: Path) -> dict[str, str]:
    """Staging with each secret in a file."""
    given = {**PRODUCTION, "RESERVATION_ENV": "staging"}
    given["RESERVATION_TOSS_SECRET_KEY"] = "test_gsk_abc"
    given["RESERVATION_TOSS_CLIENT_KEY"] = "test_gck_abc"
    for name in SECRETS:
        path = home / name
        path.write_text(given.pop(f"RESERVATION_{name}") + "\n")
        given[f"RESERVATION_{name}_FILE"] = str(path)
    return given


def test_a_missing_file_of_a_secret_ends_the_start_with_one_line(tmp_path: Path) -> None:
    given = as_files(tmp_path)
    (tmp_path / "ORDER_ID_KEY").unlink()
    with serving(tmp_path, **given) as process:
        assert process.wait(PATIENCE_SECONDS) == 78
    (line,) = (tmp_path / "stderr.txt").read_text().splitlines()
    assert "the file of RESERVATION_ORDER_ID_KEY_FILE cannot be read" in line


def test_staging_serves_with_its_secrets_in_files(tmp_path: Path) -> None:
    given = as_files(tmp_path)
    port = str(free_port())
    with serving(tmp_path, RESERVATION_PORT=port, **given) as process:
        eventually(
            lambda: ready(port), lambda found: found.get("missing") == [], within=PATIENCE_SECONDS
        )
        url = f"http://127.0.0.1:{port}/metrics"
        answer = httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        assert answer.status_code == 200
        assert httpx.get(url, timeout=30).status_code == 401
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert KEY not in (tmp_path / "stderr.txt").read_text()


def ready(port: str) -> dict[str, Any]:
    """The body of /health/ready; empty while the port is closed."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).json()
    return {}


def test_unwaivable_conditions_are_refused_in_development_too(tmp_path: Path) -> None:
    with serving(tmp_path, RESERVATION_REDIS_TRUST="redis-clock") as process:
        assert process.wait(PATIENCE_SECONDS) == 78
    (line,) = log_lines(tmp_path)
    assert line.startswith("reservation: RESERVATION_REDIS_TRUST has redis-clock; allowed: redis-")


@pytest.mark.slow
def test_start_up_waits_for_redis_and_then_checks_it(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rsv-") as folder,
        # A path to the socket, once it exists.
        serving(
            tmp_path, RESERVATION_REDIS_URL=f"unix://{folder}/valkey.sock", **PRODUCTION
        ) as process,
    ):
        eventually(
            (tmp_path / "stderr.txt").read_text,
            lambda text: text.count("waiting_for_redis") >= 2,
            within=PATIENCE_SECONDS,
        )
        assert process.poll() is None
        with forgetful(tmp_path) as path:
            Path(folder, "valkey.sock").symlink_to(path)
            assert process.wait(PATIENCE_SECONDS) == 78
    assert len(log_lines(tmp_path)) == 2
