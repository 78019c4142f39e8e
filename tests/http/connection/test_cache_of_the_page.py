"""The cache of docs/how-to/cdn.md: nginx answers the reads of the crowd, and nothing else."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.http.connection.proxies import WITH_A_CACHE, proxied
from tests.support.service import Served


@pytest.fixture(scope="module")
def front(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        proxied(WITH_A_CACHE, served.url, tmp_path_factory.mktemp("cache")) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        yield client


def ids(answers: list[httpx.Response]) -> set[str]:
    """The request ids: equal if an answer came from the cache."""
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-request-id"] for answer in answers}


@pytest.mark.parametrize("path", ["/v1/sales/{sale}", "/v1/sales"])
def test_a_crowd_costs_the_service_one_read_a_second(
    served: Served, front: httpx.Client, path: str
) -> None:
    path = path.format(sale=served.sale())
    found: list[httpx.Response] = []
    began = time.monotonic()

    def read() -> None:
        with httpx.Client(base_url=front.base_url, trust_env=False, timeout=30) as client:
            found.extend(client.get(path) for _ in range(10))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert len(ids(found)) <= time.monotonic() - began + 2


def test_an_answer_is_renewed_after_a_second(served: Served, front: httpx.Client) -> None:
    path = f"/v1/sales/{served.sale()}"
    first = front.get(path)
    until = time.monotonic() + 60
    while ids([first, front.get(path)]) == ids([first]):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_an_admission_is_neither_stored_nor_answered_from_the_cache(
    served: Served, front: httpx.Client
) -> None:
    path = f"/v1/sales/{served.sale()}"
    mine = [front.get(path, headers=served.buyer()) for _ in range(2)]
    assert all(answer.json()["admission"] for answer in mine)
    assert len(ids(mine)) == 2
    assert front.get(path).json().get("admission") is None
    again = front.get(path, headers=served.buyer())
    assert again.json()["admission"]


def test_browsers_do_not_keep_a_cached_answer(served: Served, front: httpx.Client) -> None:
    answers = [front.get(f"/v1/sales/{served.sale()}") for _ in range(2)]
    assert {answer.headers["cache-control"] for answer in answers} == {"no-store"}


def test_refusals_and_orders_are_never_cached(served: Served, front: httpx.Client) -> None:
    missing = [front.get("/v1/sales/nothing-here") for _ in range(2)]
    assert {answer.status_code for answer in missing} == {404}
    assert len({answer.headers["x-request-id"] for answer in missing}) == 2
    path = f"/v1/sales/{served.sale()}/reservations"
    buyer = served.buyer()
    assert len(ids([front.get(path, headers=buyer) for _ in range(2)])) == 2


def test_the_stream_of_a_sale_passes_at_once(served: Served, front: httpx.Client) -> None:
    with front.stream("GET", f"/v1/sales/{served.sale()}/events") as stream:
        first = next(stream.iter_lines())
    assert first


def test_static_files_come_from_the_cache(front: httpx.Client) -> None:
    path = "/static/reservation.js"
    first = front.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = front.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
