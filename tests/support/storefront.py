"""Storefront helpers: a sale's items, choosing, holding, paying, the buyer's identity."""

from typing import Any

from playwright.sync_api import Page, expect

from tests.support.browser import Visitors
from tests.support.service import Served, item

__all__ = [
    "ITEMS",
    "NOT_NOW",
    "TIMES",
    "Visiting",
    "buyer_of",
    "choose",
    "hold",
    "orders_of",
    "pay",
    "result",
    "statuses_of",
]

Visiting = Visitors

TIMES = "\N{MULTIPLICATION SIGN}"

ITEMS = [
    item("mug", name="Mug", price=12_000, total=50, limitPerBuyer=4),
    item("cap", name="Cap", price=20_000, total=5, limitPerBuyer=2),
]

#: The answer to a prepare that load shedding deferred.
NOT_NOW: dict[str, Any] = {
    "status": 503,
    "headers": {"Retry-After": "1"},
    "content_type": "application/problem+json",
    "json": {"code": "unavailable", "status": 503, "retryAfter": 1},
}


def choose(page: Page, sku: str, count: int = 1) -> None:
    for _ in range(count):
        page.locator(f"[data-sku={sku}] .more").click()


def hold(page: Page, sku: str = "mug", count: int = 1) -> None:
    choose(page, sku, count)
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()


def pay(page: Page, button: str = "card") -> None:
    page.locator("#pay").click()
    page.locator(f"button[value={button}]").click()


def result(page: Page, kind: str) -> str:
    """The result page's text, once it shows this result."""
    expect(page.locator(f"#result[data-kind={kind}]")).to_be_visible()
    return page.locator("#result").inner_text()


def buyer_of(page: Page) -> dict[str, str]:
    token = page.evaluate("JSON.parse(localStorage.getItem('reservation.buyer'))")
    return {"Authorization": f"Bearer {token}"}


def orders_of(served: Served, sale_id: str, buyer: dict[str, str]) -> list[dict[str, Any]]:
    answer = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer)
    return answer.raise_for_status().json()["reservations"]


def statuses_of(served: Served, sale_id: str, buyer: dict[str, str]) -> list[str]:
    return [order["status"] for order in orders_of(served, sale_id, buyer)]
