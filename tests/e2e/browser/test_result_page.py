"""The result page in a real browser: its messages, and its poll of an undecided payment."""

from typing import Any

import pytest
from playwright.sync_api import Route

from tests.support.service import eventually
from tests.support.storefront import Visiting, result

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


#: Once the buyer has been at the PG, no page claims that no money moved.
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
    # An address that anyone may have written is not evidence of money that was taken.
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


def test_the_result_page_waits_for_an_undecided_payment(visit: Visiting) -> None:
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


def test_a_restored_result_page_ends_its_earlier_poll(visit: Visiting) -> None:
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
