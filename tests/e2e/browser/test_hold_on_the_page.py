"""A hold in a real browser: kept on reload and return, released on leaving, and its end."""

import re
import time
from datetime import datetime, timedelta

import pytest
from playwright.sync_api import BrowserContext, Page, Route, Worker, expect

from tests.support.browser import Visit
from tests.support.service import Served, eventually, item
from tests.support.storefront import (
    ITEMS,
    TIMES,
    Visiting,
    buyer_of,
    hold,
    orders_of,
    pay,
    result,
    statuses_of,
)

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


@pytest.mark.slow
def test_returning_from_the_payment_page_keeps_the_hold(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    page.go_back()
    expect(page.locator("#hold")).to_be_visible()
    expect(page.locator("#pay")).to_be_enabled()
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]
    pay(page)
    result(page, "confirmed")


def open_hold(served: Served, visit: Visiting) -> tuple[str, Visit, Page]:
    """A buyer who holds a mug: the sale, the visitor and the page."""
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    return sale_id, visitor, page


def counting_worker(visitor: Visit) -> Worker:
    """The worker that outlives its page; it counts the messages to it."""
    worker = worker_of(visitor.context)
    worker.evaluate("() => { self.told = 0; self.addEventListener('message', () => self.told++); }")
    return worker


def worker_of(context: BrowserContext) -> Worker:
    """The worker that outlives its page; it counts its decisions."""

    def workers() -> list[Worker]:
        # Events of the browser arrive only while Playwright itself waits.
        context.pages[0].wait_for_timeout(50)
        return context.service_workers

    worker = eventually(workers, bool)[0]
    worker.evaluate("""() => {
        const look = self.clients.matchAll.bind(self.clients);
        self.looked = 0;
        self.clients.matchAll = async (options) => {
            const windows = await look(options);
            self.looked += 1;
            return windows;
        };
    }""")
    return worker


def decided(page: Page, worker: Worker, count: int) -> None:
    def looks() -> int:
        page.wait_for_timeout(100)
        return worker.evaluate("self.looked")

    eventually(looks, lambda looked: looked >= count)


@pytest.mark.slow
def test_reloading_and_navigating_keep_the_hold(served: Served, visit: Visiting) -> None:
    sale_id, visitor, page = open_hold(served, visit)
    worker = worker_of(visitor.context)
    page.reload()
    expect(page.locator("#hold-lines")).to_contain_text(f"Mug {TIMES} 1")
    page.locator(".brand a").click()
    expect(page.locator("#sales")).not_to_be_empty()
    page.go_back()
    expect(page.locator("#hold")).to_be_visible()
    # Three times the page went away, and each time the shop was there again.
    decided(page, worker, 3)
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]
    assert visitor.asked("/v1/reservations/") == []


@pytest.mark.slow
def test_leaving_the_shop_releases_the_hold(served: Served, visit: Visiting) -> None:
    sale_id, visitor, page = open_hold(served, visit)
    buyer = buyer_of(page)
    worker_of(visitor.context)
    elsewhere = visitor.context.new_page()
    page.close(run_before_unload=True)

    def stands() -> list[str]:
        elsewhere.wait_for_timeout(100)
        return statuses_of(served, sale_id, buyer)

    eventually(stands, lambda statuses: statuses == ["RELEASED"])
    assert served.stock(sale_id, "mug") == (50, 0, 0)


def test_leaving_for_the_payment_page_keeps_the_hold(served: Served, visit: Visiting) -> None:
    sale_id, visitor, page = open_hold(served, visit)
    worker = counting_worker(visitor)
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    page.go_back()
    page.reload()
    expect(page.locator("#hold")).to_be_visible()
    assert worker.evaluate("self.told") == 0
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


def test_a_restored_page_reads_its_hold_again(served: Served, visit: Visiting) -> None:
    sale_id, visitor, page = open_hold(served, visit)
    worker = counting_worker(visitor)
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    buyer = buyer_of(page)
    [order] = orders_of(served, sale_id, buyer)
    served.http.post(f"/v1/reservations/{order['orderId']}/release", headers=buyer)
    expect(page.locator("#hold")).to_be_visible()
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    expect(page.locator("#hold")).to_be_hidden()
    expect(page.locator("#notice")).to_contain_text("This hold has ended")
    assert worker.evaluate("self.told") == 0


def test_the_release_button_releases_the_hold(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page, "cap")
    assert served.stock(sale_id, "cap") == (4, 1, 0)
    page.locator("#give-back").click()
    expect(page.locator("#notice")).to_have_text("Given back.")
    expect(page.locator("#basket")).to_be_visible()
    assert served.stock(sale_id, "cap") == (5, 0, 0)


def test_a_release_with_a_lost_response_is_retried(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page, "cap")
    calls: list[str] = []

    def lose_the_first(route: Route) -> None:
        calls.append(route.request.url)
        if len(calls) > 1:
            return route.continue_()
        route.fetch()
        return route.abort()

    page.route("**/release", lose_the_first)
    page.locator("#give-back").click()
    expect(page.locator("#notice")).to_have_text("Given back.")
    assert len(calls) == 2
    assert served.stock(sale_id, "cap") == (5, 0, 0)


@pytest.mark.slow
def test_an_expiring_hold_is_announced(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS, holdSeconds=2)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    expect(page.locator("#notice")).to_contain_text("The time to pay ran out")
    expect(page.locator("#hold")).to_be_hidden()


def test_an_expired_hold_is_explained_in_korean(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=[item("cap", name="모자", price=20_000, total=1)])
    page = visit(locale="ko-KR").open(f"/sales/{sale_id}")
    expect(page.locator("html")).to_have_attribute("lang", "ko")
    expect(page.locator("#buy")).to_have_text("구매하기")
    expect(page.locator("#total")).to_have_text("₩20,000")
    served.hold(sale_id, served.buyer(), items=[("cap", 1)], amount=20_000)
    page.locator("#buy").click()
    notice = page.locator("#notice")
    expect(notice).to_contain_text("남은 수량이 부족합니다. 결제되지 않았습니다.")
    # Held, not sold: the page also shows when it may come back.
    expect(notice).to_contain_text("다시 나올 수 있습니다")


@pytest.mark.slow
def test_a_hold_expired_only_by_the_page_clock_is_polled_slowly(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS, holdSeconds=60)
    visitor = visit()

    def ahead(route: Route) -> None:
        response = route.fetch()
        sale = response.json()
        late = datetime.fromisoformat(sale["serverTime"]) + timedelta(seconds=90)
        sale["serverTime"] = late.isoformat().replace("+00:00", "Z")
        route.fulfill(response=response, json=sale)

    visitor.page.route(re.compile(rf"/v1/sales/{sale_id}$"), ahead)
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    expect(page.locator("#hold-left strong")).to_have_text("0:00")
    lists = [url for url in visitor.requests if url.endswith("/reservations")]
    began = time.monotonic()
    page.wait_for_timeout(3_000)
    more = [url for url in visitor.requests if url.endswith("/reservations")][len(lists) :]
    assert 1 <= len(more) <= time.monotonic() - began + 2
    expect(page.locator("#hold")).to_be_visible()


@pytest.mark.slow
def test_a_page_requests_its_hold_after_the_machine_slept(served: Served, visit: Visiting) -> None:
    """The page's own clock stops meanwhile, and no event reports it."""
    sale_id, _, page = open_hold(served, visit)
    buyer = buyer_of(page)
    [order] = orders_of(served, sale_id, buyer)
    served.http.post(f"/v1/reservations/{order['orderId']}/release", headers=buyer)
    assert statuses_of(served, sale_id, buyer) == ["RELEASED"]
    expect(page.locator("#hold")).to_be_visible()
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 3_600_000; }")
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#hold")).to_be_hidden()
