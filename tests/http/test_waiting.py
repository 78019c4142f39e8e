"""Long polls and event streams over HTTP: limits for one buyer and one address."""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from api.http.routes.sales import STREAMS_PER_ADDRESS_MAX
from reservation.application.reservations.waits import WAITS_PER_BUYER_MAX
from tests.support.service import Served, eventually, refused, running_service

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service behind a proxy on the same machine."""
    with running_service(
        tmp_path_factory.mktemp("behind"),
        RESERVATION_WORKERS="1",
        RESERVATION_TRUSTED_PROXIES="127.0.0.1",
    ) as service:
        yield service


def stream(stack: ExitStack, served: Served, sale_id: str, address: str) -> httpx.Response:
    """One event stream that has begun; or its refusal, read."""
    headers = {"X-Forwarded-For": address} if address else {}
    answer = stack.enter_context(
        served.http.stream("GET", f"/v1/sales/{sale_id}/events", headers=headers)
    )
    if answer.is_success:
        events = answer.iter_raw()
        next(events)
        # An iterator that is let go closes its connection.
        stack.callback(events.close)  # type: ignore[attr-defined]
    else:
        answer.read()
    return answer


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        ("203.0.113.7", "203.0.113.7:50001", "203.0.113.8"),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1"),
    ],
)
def test_the_streams_of_one_address_are_limited(
    behind: Served, first: str, same: str, other: str
) -> None:
    sale_id = behind.sale()
    with ExitStack() as streams:
        with ExitStack() as one:
            stream(one, behind, sale_id, first)
            for _ in range(STREAMS_PER_ADDRESS_MAX - 1):
                assert stream(streams, behind, sale_id, same).is_success
            refusal = stream(streams, behind, sale_id, same)
            assert refused(refusal, 429, "rate_limited")["retryAfter"] >= 1
            assert refusal.headers["retry-after"]
            assert stream(streams, behind, sale_id, other).is_success
        # One has left: there is room again.
        eventually(
            lambda: stream(streams, behind, sale_id, same).status_code, lambda status: status == 200
        )


def test_a_head_request_uses_no_stream_slot(behind: Served) -> None:
    sale_id, headers = behind.sale(), {"X-Forwarded-For": "203.0.113.20"}
    for _ in range(STREAMS_PER_ADDRESS_MAX + 1):
        # The stream behind it ends a moment after its answer.
        eventually(
            lambda: behind.http.head(f"/v1/sales/{sale_id}/events", headers=headers).status_code,
            lambda status: status == 200,
        )


def test_streams_from_loopback_are_not_limited(behind: Served) -> None:
    """A proxy here that no setting names would be one address for all buyers."""
    sale_id = behind.sale()
    with ExitStack() as streams:
        for _ in range(STREAMS_PER_ADDRESS_MAX + 1):
            assert stream(streams, behind, sale_id, "").is_success


def test_the_waits_of_one_buyer_are_limited(behind: Served) -> None:
    buyer = behind.buyer()
    order = behind.hold(behind.sale(), buyer)

    def long_poll() -> dict[str, Any]:
        return httpx.get(
            f"{behind.url}/v1/reservations/{order['orderId']}",
            params={"wait": 25},
            headers=buyer,
            timeout=40,
            trust_env=False,
        ).json()

    with ThreadPoolExecutor(WAITS_PER_BUYER_MAX + 1) as pool:
        polls = [pool.submit(long_poll) for _ in range(WAITS_PER_BUYER_MAX + 1)]
        done, waiting = wait(polls, 20, FIRST_COMPLETED)
        assert [each.result()["status"] for each in done] == ["HELD"]
        behind.release(order).raise_for_status()
        assert {each.result(20)["status"] for each in waiting} == {"RELEASED"}
