"""Supervisor: restarts dead processes at the same place, and leaves no process behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from api.server import supervisor as serve
from api.server.child_process import alone_in
from reservation.config.settings import Settings, SettingsError
from tests.support.programs import missing
from tests.support.valkey import running

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[3]

#: Time-out for events that take about a second on an idle machine.
PATIENCE_SECONDS = 120.0

#: The promise: SIGTERM ends everything within this.
STOP_SECONDS_MAX = 10.0

ROLES = ("api", "worker", "sandbox", "valkey")

DRIVER = """
import fcntl, os, signal, sys, termios
if os.environ.pop("TEST_TERMINAL", None):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# As in a terminal: whoever runs the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from api.server import sockets, supervisor as serve
from reservation.config.settings import Settings

worker, bind_seconds, stop_share = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
sockets._BIND_SECONDS_MAX = bind_seconds
serve._KILL_AFTER_SECONDS = {k: v * stop_share for k, v in serve._KILL_AFTER_SECONDS.items()}
names = {"api": "api", "sandbox": "sandbox", "worker": worker}
entries = {role: f"tests.support.stand_ins:{name}" for role, name in names.items()}
try:
    settings, role = Settings.load(os.environ), os.environ.pop("TEST_ROLE", None)
    sys.exit(serve.serve(settings, environ=os.environ, role=role, entries=entries))
except serve.AlreadyRunning as error:
    sys.exit(f"reservation: {error}")
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition; a connection that is not there yet is none."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if value := condition():
                return value
        except (httpx.HTTPError, RedisConnectionError, psutil.NoSuchProcess):
            pass
        assert time.monotonic() < end, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Service:
    """A supervisor with its stand-ins, in its own directory."""

    def __init__(self, home: Path, *, worker: str, bind_seconds: float, stop_share: float) -> None:
        self.home = home
        self.port = 0
        self.stdout, self.stderr = home / "stdout.txt", home / "stderr.txt"
        self.given: dict[str, str] = {}
        self._arguments = [worker, str(bind_seconds), str(stop_share)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def start(self, *, terminal: int | None = None) -> None:
        environ = {
            # CI finds processes that a killed run left behind by the run's number.
            **{name: os.environ[name] for name in ("PATH", "CI_RUN_NUMBER") if name in os.environ},
            "PYTHONPATH": str(ROOT),
            "RESERVATION_DATA_DIR": str(self.home / "var"),
            "RESERVATION_PORT": str(self.port),
            "RESERVATION_WORKERS": "2",
            **self.given,
            **({} if terminal is None else {"TEST_TERMINAL": "1"}),
        }
        with self.stdout.open("w") as stdout, self.stderr.open("a") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, *self._arguments],
                cwd=self.home,
                env=environ,
                stdout=stdout,
                stderr=stderr,
                stdin=terminal,
                # In its own process group, or in its own session with this controlling terminal.
                process_group=0 if terminal is None else None,
                start_new_session=terminal is not None,
            )

    def until_ready(self) -> str:
        """Its output when all is up; it contains the port."""

        def notice() -> str | None:
            assert self.process.poll() is None, self.stderr.read_text()
            text = self.stdout.read_text()
            return text if "Ctrl-C" in text else None

        text = until(notice, "readiness")
        self.port = int(text.split("/docs")[0].rsplit(":", 1)[1])
        return text

    def ask(self, path: str = "/") -> dict[str, Any]:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5).json()

    def redis(self) -> Redis:
        path = unquote(urlsplit(self.ask()["redis_url"]).path)
        return Redis(unix_socket_path=path, decode_responses=True)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def role(self, role: str) -> list[psutil.Process]:
        name = "valkey-server" if role == "valkey" else f"api.server.entrypoints {role}"
        return [child for child in self.family() if name in " ".join(child.cmdline())]

    def ended(self) -> int:
        """The exit status, once it ends by itself."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            left = [" ".join(child.cmdline()) for child in self.family()]
            pytest.fail(f"it did not end; left: {left}; it said: {self.stderr.read_text()}")

    def end(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(PATIENCE_SECONDS)


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(
        worker: str = "worker", *, bind_seconds: float = 3.0, stop_share: float = 1.0
    ) -> Service:
        service = Service(tmp_path, worker=worker, bind_seconds=bind_seconds, stop_share=stop_share)
        made.append(service)
        service.start()
        return service

    yield make
    for service in made:
        service.end()
        # Shown if the test failed.
        sys.stdout.write(service.stderr.read_text())


@pytest.mark.slow
def test_a_killed_process_restarts_at_the_same_address(make_service: Any) -> None:
    service = make_service()
    notice = service.until_ready()
    first = service.ask()
    socket_path = str(service.home / "var" / "valkey.sock")
    assert f"redis-cli -s '{socket_path}'" in notice
    assert f"http://127.0.0.1:{service.port}/docs" in notice
    assert str(service.home / "var" / "secrets.json") in notice
    assert first["public_url"] == f"http://127.0.0.1:{service.port}"
    assert first["toss_checkout_url"] == f"{first['toss_api_url']}/checkout"
    redis = service.redis()
    redis.set("kept", "1")

    for api in service.role("api"):
        api.kill()
        api.wait(PATIENCE_SECONDS)
        # The socket is the supervisor's: a connection waits meanwhile, and none is refused.
        assert service.ask()["role"] == "api"
    until(lambda: len(service.role("api")) == 2, "two API processes")

    sandbox = httpx.get(first["toss_api_url"]).json()["pid"]
    os.kill(sandbox, signal.SIGKILL)
    until(
        lambda: httpx.get(first["toss_api_url"], timeout=5).json()["pid"] != sandbox,
        "another sandbox at the same address",
    )

    worker = int(until(lambda: redis.get("worker"), "the worker's sign"))
    os.kill(worker, signal.SIGKILL)
    until(lambda: int(redis.get("worker") or worker) != worker, "another worker's sign")

    (valkey,) = service.role("valkey")
    valkey.kill()
    until(lambda: redis.get("kept") == "1", "Valkey with its data, at the same socket")
    assert service.role("valkey") != [valkey]
    assert service.ask("/health/ready")["redis_url"] == first["redis_url"]


def test_the_sandbox_listens_on_loopback_only(tmp_path: Path) -> None:
    """It takes payments without money and has no password, even if the API is on a network."""
    service = Service(tmp_path, worker="worker", bind_seconds=3.0, stop_share=1.0)
    service.given = {"RESERVATION_HOST": "127.0.0.2"}
    service.start()
    try:
        found = re.search(
            r"the sandbox, http://127\.0\.0\.1:(\d+)$", service.until_ready(), re.MULTILINE
        )
        assert found is not None
        port = int(found[1])
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
    finally:
        service.end()


@pytest.mark.slow
def test_sigterm_ends_everything_in_order_within_ten_seconds(make_service: Any) -> None:
    service = make_service()
    service.until_ready()
    until(lambda: service.redis().get("worker"), "the worker's sign")
    until(lambda: httpx.get(service.ask()["toss_api_url"]), "the sandbox")
    family = service.family()
    assert len(family) == 5
    with httpx.stream("GET", f"http://127.0.0.1:{service.port}/stream") as stream:
        next(stream.iter_raw())
        notified_at = time.monotonic()
        service.process.terminate()
        assert service.ended() == 0
    assert time.monotonic() - notified_at < STOP_SECONDS_MAX
    assert not [process for process in family if alive(process)]
    ended = (service.home / "var" / "ended.txt").read_text().split()
    assert list(dict.fromkeys(ended)) == ["api", "worker", "sandbox"]
    assert "killed" not in service.stderr.read_text()


def test_sigkill_leaves_no_process_and_the_next_start_is_clean(make_service: Any) -> None:
    service = make_service()
    service.until_ready()
    service.redis().set("kept", "1")
    until(lambda: service.redis().get("worker"), "the worker's sign")
    (service.home / "var" / "metrics" / "counter_1.db").touch()
    family, killed = service.family(), service.process
    # No wait in between: the next one comes while the last one's children are still dying.
    killed.kill()
    service.start()
    killed.wait(PATIENCE_SECONDS)
    service.until_ready()
    assert not [process for process in family if alive(process)]
    assert service.redis().get("kept") == "1"
    assert not (service.home / "var" / "metrics" / "counter_1.db").exists()
    family = service.family()
    # The signal of Ctrl-C in a terminal.
    os.killpg(service.process.pid, signal.SIGINT)
    assert service.ended() == 0
    assert not [process for process in family if alive(process)]


@pytest.mark.slow
def test_sighup_replaces_the_api_and_the_worker_and_nothing_else(make_service: Any) -> None:
    service = make_service()
    service.until_ready()
    redis = service.redis()
    until(lambda: redis.get("worker"), "the worker's sign")
    before = {role: {each.pid for each in service.role(role)} for role in ROLES}

    os.kill(service.process.pid, signal.SIGHUP)
    until(lambda: "processes_replaced" in service.stderr.read_text(), "the replacement")

    after = {role: {each.pid for each in service.role(role)} for role in ROLES}
    assert {role: len(pids) for role, pids in after.items()} == {
        "api": 2,
        "worker": 1,
        "sandbox": 1,
        "valkey": 1,
    }
    assert not (before["api"] | before["worker"]) & (after["api"] | after["worker"])
    assert (after["sandbox"], after["valkey"]) == (before["sandbox"], before["valkey"])
    assert int(redis.get("worker")) in after["worker"]
    assert service.ask()["pid"] in after["api"]
    # Those that were replaced do not come back.
    assert "process_ended" not in service.stderr.read_text()


@pytest.mark.slow
def test_a_new_process_that_fails_leaves_the_old_one_at_work(make_service: Any) -> None:
    service = make_service("unrepeatable_worker")
    service.until_ready()
    worker = int(until(lambda: service.redis().get("worker"), "the worker's sign"))
    os.kill(service.process.pid, signal.SIGHUP)
    until(lambda: "replacement_failed" in service.stderr.read_text(), "the failure")
    assert "the new process ended before it was ready" in service.stderr.read_text()
    assert [each.pid for each in service.role("worker")] == [worker]
    assert len(service.role("api")) == 2
    assert service.process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("RESERVATION_AUTH=nonsense", "RESERVATION_AUTH must be"),
        (
            "RESERVATION_DATABASE_URL=postgresql://elsewhere/db",
            "RESERVATION_DATABASE_URL cannot change without a restart",
        ),
    ],
)
def test_settings_that_cannot_be_taken_over_replace_nothing(
    make_service: Any, line: str, reason: str
) -> None:
    service = make_service()
    service.until_ready()
    before = {each.pid for role in ("api", "worker") for each in service.role(role)}
    (service.home / ".env").write_text(f"{line}\n")
    os.kill(service.process.pid, signal.SIGHUP)
    until(lambda: "replacement_failed" in service.stderr.read_text(), "the refusal")
    assert reason in service.stderr.read_text()
    assert {each.pid for role in ("api", "worker") for each in service.role(role)} == before
    assert service.ask()["pid"] in before


@pytest.mark.slow
def test_the_end_of_its_terminal_ends_the_service(tmp_path: Path) -> None:
    service = Service(tmp_path, worker="worker", bind_seconds=3.0, stop_share=1.0)
    terminal, inner = os.openpty()
    service.start(terminal=inner)
    os.close(inner)
    try:
        service.until_ready()
        family = service.family()
        os.kill(service.process.pid, signal.SIGHUP)
        until(lambda: "processes_replaced" in service.stderr.read_text(), "the replacement")
        os.close(terminal)
        assert service.ended() == 0
        assert not [process for process in family if alive(process)]
    finally:
        service.end()


def test_a_second_service_on_the_same_data_is_refused(make_service: Any) -> None:
    service = make_service()
    service.until_ready()
    second = make_service()
    assert second.ended() == 1
    notice = service.stderr.read_text().splitlines()[-1]
    assert f"another `reservation serve` (process {service.process.pid})" in notice
    assert service.ask("/health/ready")["role"] == "api"


@pytest.mark.slow
def test_a_process_ignoring_sigterm_is_killed_in_time(make_service: Any) -> None:
    service = make_service("stubborn_worker", stop_share=0.2)
    service.until_ready()
    until(lambda: service.redis().get("worker"), "the worker's sign")
    family = service.family()
    service.process.terminate()
    assert service.ended() == 0
    assert not [process for process in family if alive(process)]
    assert "process_killed" in service.stderr.read_text()


@pytest.mark.slow
def test_a_bad_setting_found_by_a_process_stops_the_service(make_service: Any) -> None:
    service = make_service("misconfigured_worker")
    assert service.ended() == 78
    notice = service.stderr.read_text()
    assert "reservation: RESERVATION_DATABASE_URL must be something else\n" in notice
    assert "Traceback" not in notice


@pytest.mark.slow
def test_a_failed_process_logs_its_error_without_secrets_and_restarts(
    make_service: Any,
) -> None:
    service = make_service("broken_worker")
    service.until_ready()
    until(lambda: service.stderr.read_text().count("process_ended") >= 2, "two attempts")
    notice = service.stderr.read_text()
    assert "is away" in notice
    assert "hunter2" not in notice


@pytest.mark.slow
def test_a_failed_log_write_stops_no_request(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        missing("no /dev/full here")
    service = Service(tmp_path, worker="broken_worker", bind_seconds=3.0, stop_share=1.0)
    service.stderr = full
    service.start()
    try:
        service.until_ready()
        # The worker ends again and again, and each time two processes write messages.
        until(lambda: len(service.role("api")) == 2, "two API processes")
        api = service.role("api")[0]
        api.kill()
        api.wait(PATIENCE_SECONDS)
        until(lambda: len(service.role("api")) == 2, "two API processes again")
        assert service.ask("/health/ready")["role"] == "api"
        assert service.process.poll() is None
    finally:
        service.end()


def test_sigterm_during_the_start_leaves_no_process(make_service: Any) -> None:
    service = make_service()
    family = until(service.family, "the first process")
    service.process.terminate()
    assert service.ended() == 0
    assert not [process for process in family if alive(process)]


def test_a_port_in_use_is_reported_in_one_line(make_service: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = Service(tmp_path, worker="worker", bind_seconds=0.1, stop_share=1.0)
        service.port = taken.getsockname()[1]
        service.start()
        assert service.ended() == 1
        service.end()
    notice = service.stderr.read_text()
    assert notice == (
        f"reservation: cannot listen on 127.0.0.1 port {service.port}: Address already in use\n"
    )


def test_a_single_role_requires_given_services_and_secrets(tmp_path: Path) -> None:
    environ = {"RESERVATION_DATA_DIR": str(tmp_path)}
    for name, value in [
        ("RESERVATION_REDIS_URL", "redis://127.0.0.1:1"),
        ("RESERVATION_TOSS_API_URL", "http://127.0.0.1:1"),
        ("RESERVATION_ADMIN_API_KEY", "x"),
    ]:
        with pytest.raises(SettingsError, match=f"{name}.* must be given with --role"):
            serve.serve(Settings.load(environ, None), environ=environ, role="worker")
        environ[name] = value


@pytest.mark.slow
def test_roles_run_separately_with_given_services(tmp_path: Path) -> None:
    secrets = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")
    given = {f"RESERVATION_{name}": "x" for name in secrets}
    given["RESERVATION_TOSS_API_URL"] = "http://127.0.0.1:1"
    services: dict[str, Service] = {}
    with running(tmp_path / "external") as valkey:
        try:
            for role in ("api", "worker"):
                (tmp_path / role).mkdir()
                service = Service(
                    tmp_path / role, worker="worker", bind_seconds=3.0, stop_share=1.0
                )
                service.given = {
                    **given,
                    "TEST_ROLE": role,
                    "RESERVATION_REDIS_URL": valkey.url,
                    # The same directory for both: their locks and metrics are apart.
                    "RESERVATION_DATA_DIR": str(tmp_path / "var"),
                }
                services[role] = service
                service.start()
            notice = services["api"].until_ready()
            assert "redis-cli" not in notice
            assert "sandbox" not in notice
            assert len(services["api"].family()) == 2
            until(lambda: services["api"].redis().get("worker"), "the worker's sign")
            assert len(services["worker"].family()) == 1
            assert "The worker is running" in services["worker"].stdout.read_text()
            for service in services.values():
                service.process.terminate()
                assert service.ended() == 0
        finally:
            for service in services.values():
                service.end()


@pytest.mark.slow
def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    with alone_in(tmp_path, "lock"):
        with pytest.raises(serve.AlreadyRunning), alone_in(tmp_path, "lock"):
            pytest.fail("two held it")
        with alone_in(tmp_path, "lock-worker"):
            pass
    with alone_in(tmp_path, "lock"):
        pass
