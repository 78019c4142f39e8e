"""Over HTTP, an order with a tombstone answers as it did before."""

import asyncio
import secrets
from typing import Any

import msgspec
import pytest

from reservation import bootstrap
from reservation.adapters.redis.embedded.files import socket_path_of
from reservation.bootstrap import opened
from tests.http.admin_calls import in_sql, refund, switch
from tests.support.service import Served, eventually, refused


@pytest.fixture(autouse=True)
def due_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended orders are due an hour before their deadline, in this process."""
    monkeypatch.setattr(bootstrap, "keep_ms_of", lambda _: -3_600_000)


def replace(served: Served, sale_id: str, order: dict[str, Any]) -> None:
    """Replace the sale's ended orders, beside the service, once SQL has them."""

    async def add() -> None:
        socket = socket_path_of(served.settings.data_dir.absolute())
        settings = msgspec.structs.replace(served.settings, redis_url=f"unix://{socket}")
        async with opened(settings) as service:
            seq, _ = await service.sql.events.cursor(sale_id)
            await service.tombstones.run_once([sale_id], lambda _: seq)

    key = f"rsv:{{{sale_id}}}:order:{order['orderId']}"

    def is_replaced() -> bool:
        asyncio.run(add())
        return not served.redis().exists(key)

    assert eventually(is_replaced, bool)


def has_tombstone(served: Served, sale_id: str, order: dict[str, Any]) -> bool:
    field = order["orderId"][-24:]
    client = served.redis()
    keys = list(client.scan_iter(f"rsv:{{{sale_id}}}:ended:*", count=10_000))
    return any(client.hexists(key, field) for key in keys)


def left(served: Served, sale_id: str, buyer: dict[str, str], key: str = "") -> dict[str, Any]:
    """An order that its buyer released; the response to its prepare."""
    order = served.hold(sale_id, buyer, key=key or secrets.token_hex(8))
    assert served.release(order).status_code == 200
    return order


def without_token(answer: dict[str, Any]) -> dict[str, Any]:
    """Without the parts that each response signs again."""
    return {name: value for name, value in answer.items() if name not in ("token", "payment")}


def test_reads_of_a_tombstone_are_as_before(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = left(served, sale_id, buyer)
    listed = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer)
    before = served.get_reservation(order), served.get_reservation(order, buyer), listed.json()
    replace(served, sale_id, order)
    listed = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer)
    after = served.get_reservation(order), served.get_reservation(order, buyer), listed.json()
    assert after == before
    assert served.audit(sale_id)["ok"]
    assert has_tombstone(served, sale_id, order)


def test_a_replayed_prepare_of_a_tombstone_is_as_before(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = left(served, sale_id, buyer, "key-1")
    before = served.prepare(sale_id, buyer, key="key-1")
    replace(served, sale_id, order)
    after = served.prepare(sale_id, buyer, key="key-1")
    assert after.status_code == before.status_code
    assert without_token(after.json()) == without_token(before.json())
    assert after.headers.get("idempotent-replayed") == before.headers.get("idempotent-replayed")
    other = served.prepare(sale_id, buyer, key="key-1", items=[("a", 2)], amount=2000)
    refused(other, 422, "idempotency_key_reused")
    assert served.stock(sale_id) == (100, 0, 0)
    assert has_tombstone(served, sale_id, order)
    served.hold(sale_id, buyer, key="key-2")


def test_a_late_return_to_a_tombstone_holds_the_basket_again(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    payment_key = served.pay(order)
    served.release(order)
    replace(served, sale_id, order)
    for _ in range(2):
        assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    assert served.stock(sale_id) == (99, 0, 1)
    assert not has_tombstone(served, sale_id, order)
    assert refund(served, order).status_code == 200
    assert served.ledger(order)["cancelled"] == order["amount"]
    assert eventually(lambda: served.audit(sale_id)["ok"], bool)


def test_a_late_return_after_the_sale_is_not_charged(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    payment_key = served.pay(order)
    served.release(order)
    switch(served, sale_id, "close").raise_for_status()
    replace(served, sale_id, order)
    for _ in range(2):
        refused(served.open_success_url(order, payment_key), 409, "reservation_expired")
    assert served.ledger(order)["charged"] == 0
    assert served.get_reservation(order)["status"] == "RELEASED"


def test_a_return_to_the_fail_page_of_a_tombstone_is_as_before(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = left(served, sale_id, buyer)

    def answers() -> tuple[Any, ...]:
        query = "&code=PAY_PROCESS_CANCELED&message=m"
        failed = served.http.get(order["payment"]["failUrl"] + query)
        return failed.status_code, failed.json(), in_sql(served, order, "RELEASED")

    before = answers()
    assert before[0] == 200
    replace(served, sale_id, order)
    assert answers() == before
    assert has_tombstone(served, sale_id, order)


def test_releases_and_refunds_of_a_tombstone_are_as_before(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = left(served, sale_id, buyer)
    released, refunded = served.release(order), refund(served, order)
    replace(served, sale_id, order)
    again = served.release(order)
    assert (again.status_code, again.json()) == (released.status_code, released.json())
    unchanged = refund(served, order)
    assert unchanged.status_code == refunded.status_code
    assert unchanged.json()["code"] == refunded.json()["code"]
    assert has_tombstone(served, sale_id, order)
