"""A service in production: closed metrics, a drain, and headers for browsers over TLS."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.service import Served, free_port, refused, running_service

pytestmark = pytest.mark.system

KEY = "k" * 32


PRODUCTION = {
    "RESERVATION_ENV": "production",
    "RESERVATION_WORKERS": "1",
    "RESERVATION_AUTH": "guest",
    "RESERVATION_ADMIN_API_KEY": KEY,
    "RESERVATION_SIGNING_KEYS": KEY,
    "RESERVATION_ORDER_ID_KEY": KEY,
    "RESERVATION_JWT_SECRET": KEY,
    "RESERVATION_TOSS_API_URL": "https://api.tosspayments.com",
    "RESERVATION_TOSS_SECRET_KEY": "live_gsk_test",
    "RESERVATION_TOSS_CLIENT_KEY": "live_gck_test",
    "RESERVATION_PUBLIC_URL": "https://shop.example",
    "RESERVATION_DRAIN_SECONDS": "0",
}


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(tmp_path_factory.mktemp("production"), settings=PRODUCTION) as service:
        yield service


def test_metrics_of_an_internal_port_need_no_key(tmp_path: Path) -> None:
    settings = {**PRODUCTION, "RESERVATION_INTERNAL_PORT": str(free_port())}
    with running_service(tmp_path / "var", settings=settings) as service:
        answer = service.http.get(f"{service.settings.internal_url}/metrics")
        assert answer.status_code == 200
        assert "reservation_http_request_seconds" in answer.text
        assert service.http.get("/metrics", headers=service.admin).status_code == 404


def test_metrics_require_the_admin_key_in_production(production: Served) -> None:
    refused(production.http.get("/metrics"), 401, "unauthenticated")
    refused(
        production.http.get("/metrics", headers={"Authorization": "Bearer x"}),
        401,
        "unauthenticated",
    )
    refused(production.http.get("/metrics", headers=production.buyer()), 403, "forbidden")
    # As Prometheus scrapes, without X-Operator.
    answer = production.http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert "reservation_http_request_seconds" in answer.text


def test_concurrent_scrapes_share_one_exposition_per_second(served: Served) -> None:
    """Each answer is counted, so that a text made anew differs from all before it."""
    texts: set[str] = set()
    until = time.monotonic() + 2

    def scrape() -> None:
        with httpx.Client(base_url=served.url, trust_env=False) as client:
            while time.monotonic() < until:
                texts.add(client.get("/metrics").raise_for_status().text)

    began = time.monotonic()
    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One at the beginning, and one for each second that began meanwhile.
    assert 1 <= len(texts) <= time.monotonic() - began + 2
