"""Outages of the store over HTTP: full, unreachable, unresponsive, and keys that it lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reservation.adapters.redis.embedded.files import lock_holder, socket_path_of
from tests.http.refusal_scenes import posted
from tests.support.service import Served, eventually, item, refused, running_service

pytestmark = pytest.mark.system


def test_a_limit_refusal_lists_at_most_twenty_orders(fragile: Served) -> None:
    sale_id = fragile.sale(items=[item("a", limitPerBuyer=22)])
    buyer = fragile.buyer()
    made = {fragile.hold(sale_id, buyer)["orderId"] for _ in range(22)}
    problem = refused(fragile.prepare(sale_id, buyer), 409, "buyer_limit_exceeded")
    assert len(problem["orderIds"]) == 20
    assert set(problem["orderIds"]) <= made


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service whose store may freeze, be cut off, and lose keys."""
    with running_service(
        tmp_path_factory.mktemp("fragile"), RESERVATION_WORKERS="1", RESERVATION_PREPARE_RATE="0"
    ) as service:
        yield service


@contextmanager
def frozen(served: Served) -> Iterator[None]:
    """The embedded server accepts commands and never answers."""
    pid = lock_holder(served.settings.data_dir.absolute() / "valkey.lock")
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def cut_off(served: Served) -> Iterator[None]:
    """The embedded server is unreachable: connections are closed, new ones find no socket."""
    socket = socket_path_of(served.settings.data_dir.absolute())
    away = socket.with_suffix(".away")
    with served.redis() as client:
        client.ping()
        socket.rename(away)
        try:
            client.client_kill_filter(_type="normal", skipme=True)
            yield
        finally:
            away.rename(socket)


def wait_until_ready(served: Served) -> None:
    eventually(
        lambda: served.http.get("/health/ready"), lambda answer: answer.is_success, within=30
    )


def test_an_operator_can_pause_and_withdraw_while_redis_is_full(
    fragile: Served,
) -> None:
    sale_id = fragile.sale()
    with fragile.redis() as client:
        allowed = client.config_get("maxmemory")["maxmemory"] or "0"
        client.config_set("maxmemory", "1mb")
        try:
            for what, status in (("pause", "paused"), ("close", "closed")):
                path = f"/v1/admin/sales/{sale_id}/{what}"
                answer = posted(fragile, path, {"reason": "x"})
                assert (answer.status_code, answer.json()["status"]) == (200, status)
            body = {"sku": "a", "delta": -60, "reason": "broken"}
            path = f"/v1/admin/sales/{sale_id}/stock"
            answer = posted(fragile, path, body, **{"Idempotency-Key": "k"})
            assert answer.status_code == 200, answer.text
        finally:
            client.config_set("maxmemory", allowed)
    assert fragile.stock(sale_id) == (40, 0, 0)
    wait_until_ready(fragile)


def test_an_unreachable_store_certainly_holds_nothing(fragile: Served) -> None:
    sale_id, buyer = fragile.sale(), fragile.buyer()
    order = fragile.hold(sale_id, buyer)
    paid = fragile.hold(sale_id, fragile.buyer())
    payment_key = fragile.pay(paid)
    assert fragile.open_success_url(paid, payment_key).json()["status"] == "CONFIRMED"
    before = fragile.dump(sale_id)
    with cut_off(fragile):
        answer = fragile.prepare(sale_id, buyer, key="k")
        problem = refused(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == str(problem["retryAfter"])
        for other in (
            fragile.http.get(f"/v1/reservations/{order['orderId']}", headers=buyer),
            fragile.release(order),
            fragile.http.get("/v1/sales"),
            fragile.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer),
            fragile.open_success_url(order, "some-key"),
        ):
            refused(other, 503, "unavailable")
            assert other.headers["retry-after"]
        waiting = fragile.http.get(
            fragile.success_url(paid, payment_key), headers={"Accept": "text/html"}
        )
        assert waiting.status_code == 503
        assert 'http-equiv="refresh"' in waiting.text
        # The answer claims nothing unknown about the money: this buyer has paid.
        assert "charged yet" not in waiting.text
        refusal = refused(fragile.open_success_url(paid, payment_key), 503, "unavailable")
        assert "nothing was" not in refusal["detail"]
        health = fragile.http.get("/health/ready")
        assert health.status_code == 503
        assert "redis" in health.json()["missing"]
        assert fragile.http.get("/health/live").status_code == 200
    wait_until_ready(fragile)
    assert fragile.dump(sale_id) == before
    eventually(
        lambda: fragile.prepare(sale_id, buyer, key="k"), lambda answer: answer.status_code == 201
    )
    assert fragile.stock(sale_id) == (97, 2, 1)


@pytest.mark.slow
def test_an_unresponsive_store_leaves_the_outcome_unknown_until_retried(
    fragile: Served,
) -> None:
    sale_id, buyer = fragile.sale(), fragile.buyer()
    wait_until_ready(fragile)
    fragile.hold(sale_id, buyer)
    with frozen(fragile):
        answer = fragile.prepare(sale_id, buyer, key="k")
        problem = refused(answer, 503, "outcome_unknown")
        assert answer.headers["retry-after"] == str(problem["retryAfter"])
    wait_until_ready(fragile)
    first = eventually(
        lambda: fragile.prepare(sale_id, buyer, key="k"), lambda answer: answer.status_code == 201
    )
    again = fragile.prepare(sale_id, buyer, key="k")
    assert again.json()["orderId"] == first.json()["orderId"]
    assert fragile.stock(sale_id) == (98, 2, 0)
    assert fragile.audit(sale_id)["ok"]


def test_a_sale_lost_by_the_store_accepts_no_prepare(fragile: Served) -> None:
    wait_until_ready(fragile)
    lost, other, buyer = fragile.sale(), fragile.sale(), fragile.buyer()
    order = fragile.hold(lost, buyer)
    payment_key = fragile.pay(order)
    assert fragile.audit(lost)["ok"]
    with fragile.redis() as client:
        client.delete(*client.scan_iter(f"rsv:{{{lost}}}:*"))
    for answer in (
        fragile.prepare(lost, buyer),
        fragile.prepare(lost, fragile.buyer()),
        fragile.http.get(f"/v1/sales/{lost}"),
        fragile.http.put(
            f"/v1/admin/sales/{lost}", json=fragile.document(lost), headers=fragile.admin
        ),
        fragile.open_success_url(order, payment_key),
    ):
        refused(answer, 503, "sale_recovering")
        assert answer.headers["retry-after"]
    assert fragile.ledger(order)["charged"] == 0
    # SQL still has the order, and the other sale still sells.
    assert fragile.get_reservation(order, buyer)["orderId"] == order["orderId"]
    fragile.hold(other, buyer)
    with fragile.redis() as client:
        assert not list(client.scan_iter(f"rsv:{{{lost}}}:*"))
    report = fragile.http.get(f"/v1/admin/sales/{lost}/audit", headers=fragile.admin).json()
    assert report["ok"] is False
    assert report["problems"]
