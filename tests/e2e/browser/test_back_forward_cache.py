"""Back/forward cache: the back button without a load, another app, a second tab."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.browser import ARGUMENTS, PATIENCE_MS, Visit, chromium
from tests.support.service import Served, item

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

Visiting = Callable[..., Visit]

#: Records for each showing of the page whether it came from the cache.
NOTES = """
window.shown = [];
addEventListener("pageshow", (event) => shown.push(event.persisted));
"""
HIDDEN = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => true})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser as users have it: Playwright turns off the back/forward cache."""
    program = chromium()
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=program,
            args=ARGUMENTS,
            ignore_default_args=["--disable-back-forward-cache"],
        )
        try:
            yield opened
        finally:
            opened.close()


def on_sale(page: Page, sale_id: str) -> Page:
    page.add_init_script(NOTES)
    page.goto(f"/sales/{sale_id}")
    return page


def hold(page: Page) -> None:
    # The only item of a sale is chosen already.
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()


def order_of(served: Served, sale_id: str, page: Page) -> tuple[dict[str, Any], dict[str, str]]:
    """The newest order of the page's buyer, and the buyer's header."""
    token = page.evaluate("JSON.parse(localStorage.getItem('reservation.buyer'))")
    buyer = {"Authorization": f"Bearer {token}"}
    mine = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer).json()
    return mine["reservations"][0], buyer


def release(served: Served, sale_id: str, page: Page) -> None:
    """Give the hold back without the page, as another device of the buyer's would."""
    order, buyer = order_of(served, sale_id, page)
    url = f"/v1/reservations/{order['orderId']}/release"
    served.http.post(url, headers=buyer).raise_for_status()


def back(page: Page) -> None:
    # A cached page is not loaded, so there is no load to wait for.
    page.go_back(wait_until="commit")
    page.wait_for_function("() => window.shown?.at(-1) === true")


@pytest.fixture
def sale_id(served: Served) -> str:
    return served.sale(items=[item("mug", name="Mug", price=12_000, total=50)])


@pytest.mark.slow
def test_restoring_the_page_from_cache_keeps_the_hold(
    served: Served, visit: Visiting, sale_id: str
) -> None:
    page = on_sale(visit(base_url=served.url).page, sale_id)
    hold(page)
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    back(page)
    assert page.evaluate("shown") == [False, True]
    expect(page.locator("#pay")).to_be_enabled()
    assert order_of(served, sale_id, page)[0]["status"] == "HELD"
    page.locator("#pay").click()
    page.locator("button[value=card]").click()
    expect(page.locator("#result[data-kind=confirmed]")).to_be_visible()


def test_a_cached_page_hides_an_ended_hold(served: Served, visit: Visiting, sale_id: str) -> None:
    visitor = visit(base_url=served.url)
    page = on_sale(visitor.page, sale_id)
    hold(page)
    page.locator(".brand a").click()
    expect(page.locator("#sales")).not_to_be_empty()
    release(served, sale_id, page)
    back(page)
    expect(page.locator("#hold")).to_be_hidden()
    expect(page.locator("#notice")).to_contain_text("This hold has ended")
    # Leaving by a link of the shop sent nothing: the other device ended the hold.
    assert visitor.asked("/v1/reservations/") == []


def test_going_back_from_the_result_offers_no_second_payment(
    served: Served, visit: Visiting, sale_id: str
) -> None:
    page = on_sale(visit(base_url=served.url).page, sale_id)
    hold(page)
    page.locator("#pay").click()
    page.locator("button[value=card]").click()
    expect(page.locator("#result[data-kind=confirmed]")).to_be_visible()
    page.reload()
    expect(page.locator("#result[data-kind=confirmed]")).to_be_visible()
    page.evaluate("history.go(-2)")
    page.wait_for_url(f"**/sales/{sale_id}", wait_until="commit")
    expect(page.locator("#order-list")).to_contain_text("Paid")
    expect(page.locator("#pay")).to_be_hidden()
    assert served.stock(sale_id, "mug") == (49, 0, 1)


def test_switching_apps_keeps_the_hold_and_refreshes_the_page(
    served: Served, visit: Visiting, sale_id: str
) -> None:
    visitor = visit(base_url=served.url)
    page = on_sale(visitor.page, sale_id)
    hold(page)
    # A browser without a window never hides a page, so the events are made here.
    page.evaluate(HIDDEN)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.evaluate("document.dispatchEvent(new Event('freeze'))")
    # On another device the buyer gives the units back; the app stayed away for a minute.
    release(served, sale_id, page)
    page.evaluate(
        "performance.now = ((real) => () => real() + 60_000)(performance.now.bind(performance))"
    )
    assert visitor.asked("/v1/reservations/") == []
    expect(page.locator("#hold")).to_be_visible()
    page.evaluate("document.dispatchEvent(new Event('resume'))")
    page.evaluate("delete document.hidden")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#hold")).to_be_hidden()
    expect(page.locator("#notice")).to_contain_text("This hold has ended")
    assert visitor.asked("/v1/reservations/") == []


@pytest.mark.slow
def test_only_one_of_two_tabs_gets_the_last_unit(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=[item("cap", name="Cap", price=20_000, total=1)])
    context = visit(base_url=served.url).context
    tabs = [on_sale(context.new_page(), sale_id) for _ in range(2)]
    for tab in tabs:
        expect(tab.locator("#total")).to_have_text("₩20,000")
    for tab in tabs:
        # Pressed in both before either has an answer.
        tab.evaluate("document.getElementById('buy').click()")
    winner, loser = sorted(tabs, key=stock_message)
    expect(winner.locator("#hold")).to_be_visible()
    assert served.stock(sale_id, "cap") == (0, 1, 0)

    winner.locator("#pay").click()
    winner.locator("button[value=card]").click()
    expect(winner.locator("#result[data-kind=confirmed]")).to_be_visible()
    expect(loser.locator("[data-sku=cap] .words")).to_have_text("Sold out")
    assert served.stock(sale_id, "cap") == (0, 0, 1)


def stock_message(tab: Page) -> str:
    """The tab's message about its wish: empty if it holds the unit."""
    expect(tab.locator("#hold, #notice").locator("visible=true").first).to_be_visible()
    return tab.locator("#notice").inner_text() if tab.locator("#notice").is_visible() else ""
