"""Storefront in a real browser: buying, coming back, leaving, and the messages to the buyer."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Page, Response, Route, Worker, expect

from api.http.problem_details import STATUSES
from api.http.routes.pages import SDK_HEADERS, STATIC
from tests.support.browser import Visit, serious
from tests.support.service import Served, eventually, item
from tests.support.storefront import ITEMS, NOT_NOW, buyer_of, choose, hold, orders_of, statuses_of

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

#: Budget of a page's bytes, all its files together.
PAGE_BYTES_MAX = 150_000

TIMES = "\N{MULTIPLICATION SIGN}"

#: Codes for operators, or for programs at the wrong address.
NOT_FOR_BUYERS = {
    "invalid_sale",
    "total_too_low",
    "insufficient_available",
    "not_refundable",
    "refund_account_required",
    "refund_pending",
    "precondition_required",
    "precondition_failed",
}

Visiting = Callable[..., Visit]


def pay(page: Page, button: str = "card") -> None:
    page.locator("#pay").click()
    page.locator(f"button[value={button}]").click()


def result(page: Page, kind: str) -> str:
    """The result page's text, once it shows this result."""
    expect(page.locator(f"#result[data-kind={kind}]")).to_be_visible()
    return page.locator("#result").inner_text()


def test_a_purchase_contacts_only_the_shop_and_the_pg(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(name="Autumn sale", items=ITEMS)
    visitor = visit()
    page = visitor.open("/")
    page.get_by_role("link", name="Autumn sale").click()
    choose(page, "mug", 2)
    choose(page, "cap")
    expect(page.locator("#total")).to_have_text("₩44,000")
    page.locator("#buy").click()
    expect(page.locator("#hold-lines")).to_contain_text(f"Mug {TIMES} 2")
    expect(page.locator("#hold-left strong")).to_have_text(re.compile(r"^[45]:\d\d$"))
    [order] = orders_of(served, sale_id, buyer_of(page))
    pay(page)
    assert "₩44,000 was charged, once." in result(page, "confirmed")
    assert served.stock(sale_id, "mug") == (48, 0, 2)
    assert served.stock(sale_id, "cap") == (4, 0, 1)

    # The token is out of the address, and a reload shows the order all the same.
    assert "#" not in page.url
    page.reload()
    assert "Paid" in result(page, "confirmed")
    page.get_by_role("link", name="Back to the sale").click()
    expect(page.locator("#order-list")).to_contain_text("Paid")
    expect(page.locator("#total")).to_have_text("₩0")
    assert served.audit(sale_id)["ok"]
    sandbox = urlsplit(order["payment"]["checkoutUrl"]).netloc
    assert visitor.hosts() == {urlsplit(served.url).netloc, sandbox}


def test_a_declined_buyer_can_pay_with_another_card(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page, "cap", 2)
    pay(page, "insufficient")
    assert "Money that was taken after all is sent back" in result(page, "declined")
    assert served.stock(sale_id, "cap") == (5, 0, 0)
    page.get_by_role("link", name="Try again").click()
    # The choice is kept.
    expect(page.locator("#total")).to_have_text("₩40,000")
    page.locator("#buy").click()
    pay(page)
    assert "₩40,000 was charged, once." in result(page, "confirmed")
    assert statuses_of(served, sale_id, buyer_of(page)) == ["CONFIRMED", "RELEASED"]
    assert served.stock(sale_id, "cap") == (3, 0, 2)


def test_cancelling_on_the_payment_page_charges_nothing(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    pay(page, "cancel")
    assert "Money that was taken after all is sent back" in result(page, "declined")
    assert served.stock(sale_id, "mug") == (50, 0, 0)


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
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
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
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
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
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    worker = worker_of(visitor.context)
    worker.evaluate("() => { self.told = 0; self.addEventListener('message', () => self.told++); }")
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    page.go_back()
    page.reload()
    expect(page.locator("#hold")).to_be_visible()
    assert worker.evaluate("self.told") == 0
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


def test_a_page_that_the_browser_kept_reads_its_hold_again(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    worker = worker_of(visitor.context)
    worker.evaluate("() => { self.told = 0; self.addEventListener('message', () => self.told++); }")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    buyer = buyer_of(page)
    [order] = orders_of(served, sale_id, buyer)
    served.http.post(f"/v1/reservations/{order['orderId']}/release", headers=buyer)
    expect(page.locator("#hold")).to_be_visible()
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    expect(page.locator("#hold")).to_be_hidden()
    expect(page.locator("#notice")).to_contain_text("This hold has ended")
    assert worker.evaluate("self.told") == 0


def test_give_back_gives_back(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page, "cap")
    assert served.stock(sale_id, "cap") == (4, 1, 0)
    page.locator("#give-back").click()
    expect(page.locator("#notice")).to_have_text("Given back.")
    expect(page.locator("#basket")).to_be_visible()
    assert served.stock(sale_id, "cap") == (5, 0, 0)


def test_a_release_whose_answer_was_lost_is_repeated(served: Served, visit: Visiting) -> None:
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


def test_a_stale_token_is_renewed(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    visitor.open("/")
    visitor.page.evaluate("localStorage.setItem('reservation.buyer', '\"not-a-token\"')")
    page = visitor.open(f"/sales/{sale_id}")
    hold(page)
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


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


def test_a_sale_that_asks_for_admission_is_entered_by_its_page(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS, requireAdmission=True)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD"]


@pytest.mark.slow
def test_a_first_reading_that_is_put_off_is_tried_again(served: Served, visit: Visiting) -> None:
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
def test_a_hold_that_is_over_by_the_pages_clock_alone_is_asked_for_calmly(
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
def test_a_page_whose_machine_slept_asks_the_service_again(served: Served, visit: Visiting) -> None:
    """The page's own clock stops meanwhile, and no event reports it."""
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    buyer = buyer_of(page)
    [order] = orders_of(served, sale_id, buyer)
    served.http.post(f"/v1/reservations/{order['orderId']}/release", headers=buyer)
    assert statuses_of(served, sale_id, buyer) == ["RELEASED"]
    expect(page.locator("#hold")).to_be_visible()
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 3_600_000; }")
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#hold")).to_be_hidden()


@pytest.mark.slow
def test_the_page_opens_by_the_servers_clock(served: Served, visit: Visiting) -> None:
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


def test_a_sale_is_bought_by_keyboard_alone(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    expect(page.locator("#basket")).to_be_visible()

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            label = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
            if page.evaluate(label) == name:
                return
        pytest.fail(f"{name} is not reached by Tab")

    tab_to("One more of Cap")
    page.keyboard.press("Enter")
    tab_to("Buy")
    page.keyboard.press("Enter")
    expect(page.locator("#hold-title")).to_be_focused()
    tab_to("Pay ₩20,000")
    tab_to("Give back")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_be_focused()


#: No page knows that no money moved once the buyer has been at the PG.
SENT_BACK = "Money that was taken after all is sent back"
ORDER = {
    "orderId": "s-0123456789",
    "saleId": "s",
    "status": "CONFIRMED",
    "items": [{"sku": "mug", "quantity": 1, "price": 12_000}],
    "amount": 12_000,
    "currency": "KRW",
    "orderName": "Mug",
    "createdAt": "2026-01-01T00:00:00.000Z",
    "updatedAt": "2026-01-01T00:00:00.000Z",
    "expiresAt": "2026-01-01T00:05:00.000Z",
}


#: The order's state (None: unreadable here), the address's outcome, the page and its message.
RESULTS = [
    ("CONFIRMED", "confirmed", "confirmed", "₩12,000 was charged, once"),
    ("CONFIRMED", "invalid", "confirmed", "₩12,000 was charged, once"),
    ("AWAITING_DEPOSIT", "awaiting_deposit", "awaiting_deposit", "No money was taken yet"),
    ("RELEASED", "declined", "declined", SENT_BACK),
    ("RELEASED", "sold_out", "sold_out", SENT_BACK),
    ("EXPIRED", "expired", "expired", SENT_BACK),
    ("EXPIRED", "sold_out", "sold_out", SENT_BACK),
    ("HELD", "declined", "held", SENT_BACK),
    # A sale whose stock is taken at the payment alone: nothing was held meanwhile.
    ("PREPARED", "sold_out", "sold_out", SENT_BACK),
    ("PREPARED", "declined", "prepared", "Nothing is held for you"),
    ("REFUNDED", "declined", "refunded", "was charged and then sent back"),
    (None, "declined", "declined", SENT_BACK),
    (None, "sold_out", "sold_out", SENT_BACK),
    (None, "invalid", "invalid", "took no money"),
    # An address that anyone may have written is no evidence of money that was taken.
    (None, "confirmed", "unreadable", "took no money"),
]


@pytest.mark.slow
def test_each_result_states_whether_the_buyer_was_charged(visit: Visiting) -> None:
    visitor = visit()
    answer: dict[str, Any] = {}
    visitor.page.route("**/v1/reservations/**", lambda route: route.fulfill(**answer))
    for number, (status, outcome, kind, words) in enumerate(RESULTS):
        answer.update(status=404, json={"code": "reservation_not_found"})
        if status:
            answer.update(status=200, json=ORDER | {"status": status})
        # A new fragment alone would be no new page.
        page = visitor.open(f"/result?orderId=s-{number:06}&outcome={outcome}#token=t")
        assert words in result(page, kind), (status, outcome)
        assert page.locator("#again, #back").locator("visible=true").count() == 1


def test_a_payment_being_settled_is_waited_for(visit: Visiting) -> None:
    visitor = visit()
    shown: list[str] = []

    def answer(route: Route) -> None:
        shown.append(route.request.url)
        status = "CONFIRMED" if len(shown) == 3 else "CONFIRMING"
        route.fulfill(json=ORDER | {"status": status})

    visitor.page.route("**/v1/reservations/**", answer)
    page = visitor.open(f"/result?orderId={ORDER['orderId']}&outcome=settling#token=t")
    result(page, "confirmed")
    assert [url.partition("?")[2] for url in shown] == ["", "wait=25", "wait=25"]


def test_a_result_page_that_is_shown_again_ends_its_earlier_poll(visit: Visiting) -> None:
    visitor = visit()
    ended: list[str] = []
    calls: list[str] = []

    def answer(route: Route) -> None:
        calls.append(route.request.url)
        # The first long poll has no answer yet.
        if len(calls) != 2:
            route.fulfill(json=ORDER | {"status": "CONFIRMING" if len(calls) == 1 else "CONFIRMED"})

    visitor.page.on("requestfailed", lambda request: ended.append(request.url))
    visitor.page.route("**/v1/reservations/**", answer)
    page = visitor.open(f"/result?orderId={ORDER['orderId']}&outcome=settling#token=t")
    eventually(lambda: page.wait_for_timeout(50) or len(calls), lambda count: count == 2)
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    result(page, "confirmed")
    assert ended == calls[1:2]


def test_the_pgs_own_script_opens_the_payment_where_the_shop_has_keys(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.page
    with_sdk(
        page,
        sale_id,
        "test_ck_1",
        """window.TossPayments = (clientKey) => ({
            payment: (buyer) => ({
                requestPayment: async (wish) => { window.asked = {clientKey, ...buyer, ...wish}; },
            }),
        });""",
    )
    visitor.open(f"/sales/{sale_id}")
    hold(page)
    assert SDK not in visitor.requests
    page.locator("#pay").click()
    page.wait_for_function("window.asked")
    asked = page.evaluate("window.asked")
    assert asked["clientKey"] == "test_ck_1"
    assert asked["amount"] == {"currency": "KRW", "value": 12_000}
    assert asked["successUrl"].startswith(f"{served.url}/v1/payments/toss/success?token=")
    assert asked["failUrl"].startswith(f"{served.url}/v1/payments/toss/fail?token=")


#: The PG's script for a key of the single API: it keeps its payment request.
KEEPS_THE_WISH = """window.TossPayments = (clientKey) => ({
    payment: (buyer) => ({
        requestPayment: async (wish) => { window.asked = {clientKey, ...buyer, ...wish}; },
    }),
});"""


def test_a_standard_api_key_creates_virtual_accounts_if_accepted(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS, virtualAccounts=True)
    visitor = visit()
    page = visitor.page
    with_sdk(page, sale_id, "test_ck_1", KEEPS_THE_WISH)
    visitor.open(f"/sales/{sale_id}")
    hold(page)
    expect(page.get_by_label("Card")).to_be_checked()
    page.get_by_label("Bank transfer").check()
    page.locator("#pay").click()
    page.wait_for_function("window.asked")
    asked = page.evaluate("window.asked")
    assert (asked["method"], asked["virtualAccount"]) == ("VIRTUAL_ACCOUNT", {"validHours": 24})
    assert asked["amount"] == {"currency": "KRW", "value": 12_000}
    # A reload shows the hold before it shows the sale.
    visitor.open(f"/sales/{sale_id}")
    expect(page.get_by_label("Bank transfer")).to_be_visible()


@pytest.mark.parametrize(
    ("key", "accounts"), [("test_ck_1", False), ("test_gck_1", True)], ids=["card sale", "widgets"]
)
def test_the_page_does_not_ask_how_to_pay_where_nothing_is_to_choose(
    served: Served, visit: Visiting, key: str, accounts: bool
) -> None:
    sale_id = served.sale(items=ITEMS, virtualAccounts=accounts)
    visitor = visit()
    with_sdk(visitor.page, sale_id, key, KEEPS_THE_WISH)
    visitor.open(f"/sales/{sale_id}")
    hold(visitor.page)
    expect(visitor.page.locator("#pay")).to_be_visible()
    expect(visitor.page.locator("#pay-how")).to_be_hidden()


@pytest.mark.slow
def test_the_pgs_widgets_are_drawn_anew_for_the_next_order(served: Served, visit: Visiting) -> None:
    """The PG refuses to draw over its own earlier widgets."""
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.page
    with_sdk(
        page,
        sale_id,
        "test_gck_1",
        """const drawn = new Set();
        const draw = async ({ selector }) => {
            if (drawn.has(selector)) throw new Error("already drawn");
            drawn.add(selector);
            return { destroy: async () => { drawn.delete(selector); } };
        };
        window.asked = [];
        window.TossPayments = () => ({
            widgets: () => ({
                setAmount: async () => {},
                renderPaymentMethods: draw,
                renderAgreement: draw,
                requestPayment: async ({ orderId }) => { window.asked.push(orderId); },
            }),
        });""",
    )
    visitor.open(f"/sales/{sale_id}")
    for number in (1, 2):
        hold(page, count=1 if number == 1 else 0)
        page.locator("#pay").click()
        expect(page.locator("#pay")).to_be_enabled()
        page.locator("#pay").click()
        page.wait_for_function(f"window.asked.length === {number}")
        expect(page.locator("#notice")).to_be_hidden()
        page.locator("#give-back").click()
        expect(page.locator("#basket")).to_be_visible()
    orders = orders_of(served, sale_id, buyer_of(page))
    assert page.evaluate("window.asked") == [order["orderId"] for order in reversed(orders)]


SDK = "https://js.tosspayments.com/v2/standard"


def with_sdk(page: Page, sale_id: str, client_key: str, script: str) -> None:
    """The shop has keys of the PG's, whose own script opens the payment."""

    def with_keys(route: Route) -> None:
        response = route.fetch()
        document = response.json()
        for order in document.get("reservations", [document]):
            if "payment" in order:
                order["payment"] |= {"checkoutUrl": None, "clientKey": client_key}
        route.fulfill(response=response, json=document)

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), with_keys)
    page.route(
        f"**/sales/{sale_id}",
        lambda route: (
            route.fulfill(response=route.fetch(), headers=html(SDK_HEADERS))
            if route.request.resource_type == "document"
            else route.continue_()
        ),
    )
    page.route(SDK, lambda route: route.fulfill(content_type="text/javascript", body=script))


def html(headers: dict[str, str]) -> dict[str, str]:
    return {**headers, "Content-Type": "text/html; charset=utf-8"}


@pytest.mark.slow
def test_the_documentation_works_offline_and_names_every_code(
    served: Served, visit: Visiting
) -> None:
    visitor = visit(viewport={"width": 1280, "height": 900})
    page = visitor.open("/docs#code-sold_out")
    expect(page.locator(".opblock").first).to_be_visible()
    expect(page.locator("#code-sold_out")).to_be_in_viewport()
    anchors = set(page.evaluate("[...document.querySelectorAll('[id^=code-]')].map((e) => e.id)"))
    assert {f"code-{code}" for code in STATUSES} <= anchors
    assert visitor.hosts() == {urlsplit(served.url).netloc}


def test_both_languages_have_the_same_messages(visit: Visiting) -> None:
    page = visit().open("/")
    texts = page.evaluate("import('/static/common/i18n.js').then(({TEXTS}) => TEXTS)")
    english, korean = texts["en"], texts["ko"]
    assert english.keys() == korean.keys()
    values = re.compile(r"\{\w+\}")
    for name in english:
        assert set(values.findall(english[name])) == set(values.findall(korean[name])), name
    buyer_errors = {f"error.{code}" for code in STATUSES if code not in NOT_FOR_BUYERS}
    assert buyer_errors <= english.keys()
    for name in buyer_errors:
        assert re.search("charged|money", english[name].lower()), name
        assert "결제" in korean[name], name


@pytest.mark.slow
def test_the_pages_are_accessible(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    page = visitor.open("/")
    expect(page.locator("#sales")).not_to_be_empty()
    assert serious(page) == []
    visitor.open(f"/sales/{sale_id}")
    choose(page, "mug")
    assert serious(page) == []
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert serious(page) == []
    pay(page)
    result(page, "confirmed")
    assert serious(page) == []


def test_a_page_is_light_and_touch_targets_are_large(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    sizes: list[int] = []

    def weigh(response: Response) -> None:
        if "/events" not in response.url:
            sizes.append(len(response.body()))

    visitor.page.on("response", weigh)
    page = visitor.open(f"/sales/{sale_id}")
    expect(page.locator("#basket")).to_be_visible()
    assert 0 < sum(sizes) < PAGE_BYTES_MAX
    for control in page.locator("button:visible, a:visible").all():
        box = control.bounding_box()
        assert box is not None
        assert box["height"] >= 44, control.inner_text()


def test_pages_carry_no_script_or_style_of_their_own() -> None:
    for page in STATIC.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), page.name
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text), page.name


WITHOUT_TIMEOUT = "delete AbortSignal.timeout; delete crypto.randomUUID;"


def test_a_browser_without_abort_timeouts_buys_and_shows_the_result(
    served: Served, visit: Visiting
) -> None:
    """Safari 15 and Chrome before 103."""
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    visitor.context.add_init_script(WITHOUT_TIMEOUT)
    page = visitor.open(f"/sales/{sale_id}")
    assert page.evaluate("AbortSignal.timeout") is None
    hold(page)
    pay(page)
    assert "was charged, once." in result(page, "confirmed")


@pytest.mark.parametrize("sku", ["constructor", "toString", "__proto__", "hasOwnProperty"])
def test_an_item_named_like_a_member_of_every_object_is_bought(
    served: Served, visit: Visiting, sku: str
) -> None:
    sale_id = served.sale(items=[item(sku, total=5), item("mug", total=5)])
    page = visit().open(f"/sales/{sale_id}")
    choose(page, sku, 2)
    page.reload()
    page.locator("#buy").click()
    expect(page.locator("#hold-lines li")).to_have_count(1)
    assert served.stock(sale_id, sku) == (3, 2, 0)


@pytest.mark.parametrize("path", ["/", "/sales/{}", "/result?orderId=x&outcome=confirmed"])
@pytest.mark.parametrize("script", ["common/i18n.js", "reservation.js"])
def test_a_script_that_fails_to_load_is_reported_on_the_page(
    served: Served, visit: Visiting, path: str, script: str
) -> None:
    sale_id = served.sale(items=ITEMS)
    visitor = visit()
    visitor.context.route(f"**/static/{script}", lambda route: route.abort())
    page = visitor.open(path.format(sale_id))
    expect(page.get_by_role("alert")).to_contain_text("did not load completely")
