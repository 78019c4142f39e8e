"""The page of a sale in a real browser: live stock, prices, admission and opening."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Route, expect

from tests.support.service import Served, item
from tests.support.storefront import (
    ITEMS,
    NOT_NOW,
    Visiting,
    buyer_of,
    choose,
    hold,
    statuses_of,
)

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


def test_the_stock_is_live_while_the_page_is_visible(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    words = page.locator("[data-sku=cap] .words")
    expect(words).to_have_text("5 of 5 left")
    taken = [("cap", 2)]
    served.hold(sale_id, served.buyer(), items=taken, amount=40_000)
    expect(words).to_have_text("3 of 5 left")

    page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', {configurable: true, get: () => true});
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    second = served.hold(sale_id, served.buyer(), items=taken, amount=40_000)
    served.hold(sale_id, served.buyer(), items=[("mug", 1)], amount=12_000)
    last = served.hold(sale_id, served.buyer(), items=[("cap", 1)], amount=20_000)
    expect(words).to_have_text("3 of 5 left")
    page.evaluate("delete document.hidden")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(words).to_have_text("All held right now; some may come back")
    served.release(last)
    expect(words).to_have_text("1 of 5 left")
    served.release(second)
    expect(words).to_have_text("3 of 5 left")


def test_an_expired_token_is_renewed(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    visitor.open("/")
    visitor.page.evaluate("localStorage.setItem('reservation.buyer', '\"not-a-token\"')")
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


def test_a_sold_out_item_cannot_be_selected_until_restocked(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=[item("cap", price=20_000, total=1)], holdSeconds=20)
    page = visit().open(f"/sales/{sale_id}")
    expect(page.locator("#hint")).to_have_text(
        "Buy keeps your pieces for 20 seconds while you pay."
    )
    order = served.hold(sale_id, served.buyer(), items=[("cap", 1)], amount=20_000)
    expect(page.locator(".words")).to_have_text("All held right now; some may come back")
    expect(page.locator("#buy")).to_be_enabled()
    served.open_success_url(order, served.pay(order))
    expect(page.locator("#hint")).to_have_text("Sold out")
    expect(page.locator("#buy")).to_be_disabled()
    served.http.post(
        f"/v1/admin/sales/{sale_id}/stock",
        json={"sku": "cap", "delta": 1, "reason": "one more was found"},
        headers={**served.admin, "Idempotency-Key": "more"},
    ).raise_for_status()
    expect(page.locator("#buy")).to_be_enabled()


def test_a_new_price_is_shown_before_it_is_charged(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    choose(page, "mug")
    dearer = [ITEMS[0] | {"price": 13_000}, ITEMS[1]]
    path = f"/v1/admin/sales/{sale_id}"
    tag = served.http.get(path, headers=served.admin).headers["etag"]
    changed = served.document(sale_id) | {"items": dearer}
    served.http.put(
        path, json=changed, headers={**served.admin, "If-Match": tag}
    ).raise_for_status()
    page.locator("#buy").click()
    expect(page.locator("#notice")).to_contain_text("The price has changed. Nothing was charged.")
    expect(page.locator("#total")).to_have_text("₩13,000")
    page.locator("#buy").click()
    expect(page.locator("#pay")).to_have_text("Pay ₩13,000")


def test_the_page_of_a_sale_with_admission_can_prepare(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS, requireAdmission=True)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


@pytest.mark.slow
def test_a_shed_first_request_is_retried(served: Served, visit: Visiting) -> None:
    """At a sale's opening every buyer loads the page, and some requests are deferred."""
    sale_id = served.sale(items=ITEMS)
    visitor, asked = visit(), list[str]()

    def put_off(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(**NOT_NOW) if len(asked) == 1 else route.continue_()

    visitor.page.route(re.compile(rf"/v1/sales/{sale_id}$"), put_off)
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    expect(page.locator("#notice")).to_be_hidden()
    assert len(asked) >= 2


@pytest.mark.slow
def test_the_page_opens_by_the_server_clock(served: Served, visit: Visiting) -> None:
    visitor = visit()
    sale_id = served.sale(items=ITEMS, opensAt=soon(2))
    # The visitor's own clock is a day behind.
    visitor.page.add_init_script("Date.now = ((real) => () => real() - 86_400_000)(Date.now)")
    page = visitor.open(f"/sales/{sale_id}")
    expect(page.locator("#status")).to_have_text("Opens soon")
    choose(page, "mug")
    expect(page.locator("#buy")).to_be_disabled()
    expect(page.locator("#status")).to_have_text("Open")
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
