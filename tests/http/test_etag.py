"""ETag of a sale: covers its totals, so a PUT undoes no change that its caller has not seen."""

import asyncio
import secrets
from typing import Any

import httpx

from tests.support.service import Served, item, refused


def put(served: Served, sale_id: str, etag: str, **changes: Any) -> httpx.Response:
    """PUT the document of the sale's creation, but for these members."""
    return served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json={**served.document(sale_id), **changes},
        headers={**served.admin, "If-Match": etag},
    )


def restock(served: Served, sale_id: str, delta: int) -> httpx.Response:
    answer = served.http.post(
        f"/v1/admin/sales/{sale_id}/stock",
        json={"sku": "a", "delta": delta, "reason": "counted again"},
        headers={**served.admin, "Idempotency-Key": secrets.token_hex(8)},
    )
    assert answer.status_code == 200, answer.text
    return answer


def total(served: Served, sale_id: str) -> int:
    return sum(served.stock(sale_id))


def test_a_put_does_not_undo_a_restock_after_its_read(served: Served) -> None:
    sale_id = served.sale()
    read = served.etag(sale_id)
    answer = restock(served, sale_id, 50)
    refused(put(served, sale_id, read, name="Renamed"), 412, "precondition_failed")
    assert total(served, sale_id) == 150
    assert answer.headers["etag"] == served.etag(sale_id) != read
    items = [item("a", total=150)]
    assert put(served, sale_id, answer.headers["etag"], items=items).status_code == 200
    assert total(served, sale_id) == 150


def test_a_put_does_not_undo_a_withdrawal_after_its_read(served: Served) -> None:
    sale_id = served.sale()
    read = served.etag(sale_id)
    restock(served, sale_id, -60)
    refused(put(served, sale_id, read, name="Renamed"), 412, "precondition_failed")
    assert served.stock(sale_id) == (40, 0, 0)


def test_a_put_does_not_resell_units_withdrawn_by_a_refund(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1)])
    order = served.hold(sale_id, served.buyer())
    served.open_success_url(order, served.pay(order))
    read = served.etag(sale_id)
    answer = served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "damaged", "restock": False},
        headers={**served.admin, "Idempotency-Key": secrets.token_hex(8)},
    )
    assert answer.status_code == 200, answer.text
    refused(put(served, sale_id, read), 412, "precondition_failed")
    assert served.stock(sale_id) == (0, 0, 0)
    refused(served.prepare(sale_id, served.buyer()), 409, "sold_out")
    assert served.audit(sale_id)["problems"] == []


def test_a_restocking_refund_keeps_the_etag(
    served: Served,
) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    served.open_success_url(order, served.pay(order))
    read = served.etag(sale_id)
    answer = served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "sent back", "restock": True},
        headers={**served.admin, "Idempotency-Key": secrets.token_hex(8)},
    )
    assert answer.status_code == 200, answer.text
    assert served.etag(sale_id) == read


def test_an_equal_put_after_a_restock_is_not_a_repeat(served: Served) -> None:
    """The same body under the ETag of before the restock asks for the old total again."""
    sale_id = served.sale()
    changed = put(served, sale_id, served.etag(sale_id), name="Renamed")
    restock(served, sale_id, 50)
    again = put(served, sale_id, changed.headers["etag"], name="Renamed")
    refused(again, 412, "precondition_failed")
    assert total(served, sale_id) == 150


def test_the_etag_changes_with_the_epoch(served: Served) -> None:
    sale_id = served.sale()
    version, _, epoch = served.etag(sale_id).strip('"').partition(".")
    other = f'"{version}.{epoch[::-1]}"'
    assert other != served.etag(sale_id)
    refused(put(served, sale_id, other), 412, "precondition_failed")


async def test_concurrent_puts_and_restocks_are_all_applied(served: Served) -> None:
    """Each PUT that is answered 200 saw every restock before it, and keeps the total it saw."""
    sale_id = served.sale()
    path = f"/v1/admin/sales/{sale_id}"
    added = renamed = 0

    async def restocks(http: httpx.AsyncClient) -> None:
        nonlocal added
        for number in range(40):
            answer = await http.post(
                f"{path}/stock",
                json={"sku": "a", "delta": 1, "reason": "found one"},
                headers={"Idempotency-Key": str(number)},
            )
            assert answer.status_code == 200, answer.text
            added += 1

    async def puts(http: httpx.AsyncClient, name: str) -> None:
        nonlocal renamed
        while added < 40:
            read = await http.get(path)
            [found] = read.json()["items"]
            document = {**served.document(sale_id), "name": f"{name}{renamed}"}
            document["items"] = [item("a", total=found["total"])]
            answer = await http.put(path, json=document, headers={"If-Match": read.headers["etag"]})
            assert answer.status_code in {200, 412}, answer.text
            renamed += answer.status_code == 200

    async with httpx.AsyncClient(
        base_url=served.url, headers=served.admin, timeout=30, trust_env=False
    ) as http:
        await asyncio.gather(restocks(http), puts(http, "x"), puts(http, "y"))
    assert total(served, sale_id) == 140
    assert served.audit(sale_id)["problems"] == []
