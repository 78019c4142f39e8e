"""Rolling restarts of two instances behind nginx, while clients prepare."""

import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from reservation.config.settings import Settings
from tests.http.connection.proxies import nginx_of_the_page
from tests.support.databases import running_postgres
from tests.support.service import START_SECONDS, STOP_SECONDS, Served, eventually, free_port, item
from tests.support.valkey import running

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

CLIENTS = 12
RESTARTS = 3
DRAIN_SECONDS = 1
SECRET = "s" * 32


@contextmanager
def nginx(folder: Path, backends: list[int]) -> Iterator[str]:
    """Nginx in front of these ports, by the lines of the page of going live; its address."""
    port = free_port()
    addresses = [f"127.0.0.1:{backend}" for backend in backends]
    process = subprocess.Popen(nginx_of_the_page(folder, addresses, port))
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{address}/health/live", trust_env=False).is_success
        return False

    try:
        eventually(answers, bool)
        yield address
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)


class Instance:
    """One of two: `reservation serve --role api` on shared stores."""

    def __init__(self, folder: Path, given: dict[str, str]) -> None:
        self.port = free_port()
        self._folder = folder
        self._environ = {
            **given,
            "RESERVATION_DATA_DIR": str(folder),
            "RESERVATION_PORT": str(self.port),
            "RESERVATION_WORKERS": "1",
            "RESERVATION_DRAIN_SECONDS": str(DRAIN_SECONDS),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "serve", "--role", "api"],
                env={"PATH": "/usr/bin:/bin", **self._environ},
                stdout=log,
                stderr=log,
            )
        eventually(self._is_ready, bool, within=START_SECONDS)

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            url = f"http://127.0.0.1:{self.port}/health/ready"
            return httpx.get(url, trust_env=False).is_success
        return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(STOP_SECONDS) == 0
            self._process = None


class Crowd:
    """Clients that prepare through nginx, one after the other, each on a kept connection."""

    def __init__(self, address: str, served: Served, sale_id: str) -> None:
        self._address = address
        self._served = served
        self._path = f"/v1/sales/{sale_id}/reservations"
        self._stop = threading.Event()
        self.statuses: list[int | str] = []
        self.orders: set[str] = set()

    def _prepare(self) -> None:
        with httpx.Client(base_url=self._address, trust_env=False, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(
                        self._path,
                        json={"items": [{"sku": "a", "quantity": 1}], "amount": 1000},
                        headers={
                            **self._served.buyer(),
                            "Idempotency-Key": secrets.token_hex(8),
                        },
                    )
                except httpx.HTTPError as error:
                    self.statuses.append(type(error).__name__)
                else:
                    self.statuses.append(answer.status_code)
                    if answer.status_code == 201:
                        self.orders.add(answer.json()["orderId"])

    @contextmanager
    def buying(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._prepare) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()


def test_rolling_restarts_behind_nginx_lose_no_request(tmp_path: Path) -> None:
    with ExitStack() as stack:
        valkey = stack.enter_context(running(tmp_path / "valkey"))
        postgres = stack.enter_context(running_postgres())
        given = {
            "RESERVATION_REDIS_URL": valkey.url,
            "RESERVATION_DATABASE_URL": postgres.make_database(),
            "RESERVATION_TOSS_API_URL": "http://127.0.0.1:9",
            "RESERVATION_ADMIN_API_KEY": SECRET,
            "RESERVATION_SIGNING_KEYS": SECRET,
            "RESERVATION_ORDER_ID_KEY": SECRET,
            "RESERVATION_JWT_SECRET": SECRET,
        }
        instances = [Instance(tmp_path / f"api{number}", given) for number in range(2)]
        for instance in instances:
            stack.callback(instance.stop)
            instance.start()
        address = stack.enter_context(nginx(tmp_path, [each.port for each in instances]))
        settings = Settings.load({**given, "RESERVATION_DATA_DIR": str(tmp_path)}, None)
        # The proxy closes the operators' paths.
        direct = f"http://127.0.0.1:{instances[1].port}"
        served = Served(settings, None, tmp_path / "api1" / "log", direct)  # type: ignore[arg-type]
        stack.callback(served.http.close)
        sale_id = served.sale(items=[item("a", total=1_000_000)])
        crowd = Crowd(address, served, sale_id)
        with crowd.buying():
            for number in range(RESTARTS):
                seen = len(crowd.statuses)
                eventually(lambda: len(crowd.statuses), lambda now, seen=seen: now > seen + 100)
                instance = instances[number % 2]
                instance.stop()
                instance.start()
        assert set(crowd.statuses) == {201}
        assert len(crowd.orders) == len(crowd.statuses)
        assert served.stock(sale_id)[1] == len(crowd.orders)
