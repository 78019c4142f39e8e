"""Calls of an operator: sales, stock, switches, orders and refunds."""

import secrets
from typing import Any

import httpx

from tests.support.service import Served, eventually

SALES = "/v1/admin/sales"


def fresh() -> str:
    return f"a-{secrets.token_hex(4)}"


def put(
    served: Served, sale_id: str, document: dict[str, Any], etag: str | None = None
) -> httpx.Response:
    headers = {**served.admin, **({"If-Match": etag} if etag is not None else {})}
    return served.http.put(f"{SALES}/{sale_id}", json=document, headers=headers)


def shown(served: Served, sale_id: str) -> httpx.Response:
    return served.http.get(f"{SALES}/{sale_id}", headers=served.admin).raise_for_status()


def change(served: Served, sale_id: str, **changes: Any) -> httpx.Response:
    """An update of a sale that was just read."""
    document = {**served.document(sale_id), **changes}
    return put(served, sale_id, document, shown(served, sale_id).headers["etag"])


def restock(
    served: Served, sale_id: str, delta: int, *, key: str | None = None, **more: Any
) -> httpx.Response:
    return served.http.post(
        f"{SALES}/{sale_id}/stock",
        json={"sku": "a", "delta": delta, "reason": "counted again", **more},
        headers={**served.admin, "Idempotency-Key": key or secrets.token_hex(8)},
    )


def switch(served: Served, sale_id: str, action: str, **body: Any) -> httpx.Response:
    return served.http.post(
        f"{SALES}/{sale_id}/{action}", json=body or {"reason": "a test"}, headers=served.admin
    )


def refund(
    served: Served, order: dict[str, Any], *, key: str | None = None, **more: Any
) -> httpx.Response:
    return served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "a test", "restock": True, **more},
        headers={**served.admin, "Idempotency-Key": key or secrets.token_hex(8)},
    )


def bought(served: Served, sale_id: str, **payment: Any) -> dict[str, Any]:
    order = served.hold(sale_id, served.buyer())
    answer = served.open_success_url(order, served.pay(order, **payment))
    assert answer.status_code == 200, answer.text
    return order


def listed(served: Served, **query: Any) -> dict[str, Any]:
    answer = served.http.get("/v1/admin/orders", params=query, headers=served.admin)
    return answer.raise_for_status().json()


def in_sql(served: Served, order: dict[str, Any], status: str) -> dict[str, Any]:
    """The order with its history, once SQL has it in this state."""

    def read_order() -> dict[str, Any]:
        path = f"/v1/admin/orders/{order['orderId']}"
        return served.http.get(path, headers=served.admin).json()

    return eventually(read_order, lambda found: found.get("status") == status)
