"""Deposits in a real browser: the buyer sees the account, an operator refunds it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.browser.test_console import sign_in
from tests.support.browser import Visit, serious
from tests.support.service import Served, eventually
from tests.support.storefront import ITEMS, buyer_of, hold, orders_of

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

Visiting = Callable[..., Visit]


def awaiting(served: Served, page: Page) -> dict[str, Any]:
    """A buyer's order for one mug, whose page shows that it waits for a deposit."""
    hold(page)
    page.locator("#pay").click()
    page.locator("button[value=virtual_account]").click()
    expect(page.locator("#result[data-kind=awaiting_deposit]")).to_be_visible()
    sale_id = page.locator("#back").get_attribute("href") or ""
    (order,) = orders_of(served, sale_id.rpartition("/")[2], buyer_of(page))
    return order


def pay_in(served: Served, page: Page, order: dict[str, Any]) -> None:
    """Pay into the order's account, at the sandbox."""
    sandbox = served.settings.toss_api_url or served.hold(
        order["saleId"], served.buyer(), items=[("mug", 1)], amount=12_000
    )["payment"]["checkoutUrl"].removesuffix("/checkout")
    found = served.http.get(f"{sandbox}/_ledger", params={"orderId": order["orderId"]}).json()
    (payment,) = found["payments"]
    body = {"paymentKey": payment["paymentKey"]}
    served.http.post(f"{sandbox}/_deposits", json=body).raise_for_status()


@pytest.mark.parametrize(
    ("locale", "bank", "words"),
    [
        ("en-US", "Woori Bank (우리은행)", "Transfer ₩12,000 to the account below"),
        ("ko-KR", "우리은행", "아래 계좌로 입금해 주세요"),
    ],
)
def test_the_result_page_shows_the_virtual_account(
    served: Served, visit: Visiting, locale: str, bank: str, words: str
) -> None:
    sale_id = served.sale(items=ITEMS, virtualAccounts=True)
    page = visit(locale=locale, permissions=["clipboard-read", "clipboard-write"]).open(
        f"/sales/{sale_id}"
    )
    order = awaiting(served, page)
    account = order["virtualAccount"]
    expect(page.locator("#money")).to_contain_text(words)
    expect(page.locator("#account-bank")).to_have_text(bank)
    expect(page.locator("#account-number")).to_have_text(account["accountNumber"])
    expect(page.locator("#account-holder")).to_have_text(account["holderName"])
    expect(page.locator("#account-due")).not_to_be_empty()
    assert serious(page) == []
    page.locator("#account-copy").click()
    expect(page.locator("#account-copy")).to_have_text(re.compile("Copied|복사했습니다"))
    assert page.evaluate("navigator.clipboard.readText()") == account["accountNumber"]
    # Loaded again, from the list of the sale's page, by the buyer's own token.
    page.locator("#back").click()
    page.locator("#order-list a").click()
    expect(page.locator("#account-number")).to_have_text(account["accountNumber"])


def test_a_returning_buyer_sees_the_received_deposit(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS, virtualAccounts=True)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    order = awaiting(served, page)
    pay_in(served, page, order)
    eventually(
        lambda: orders_of(served, sale_id, buyer_of(page))[0]["status"],
        lambda status: status == "CONFIRMED",
    )
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#result[data-kind=confirmed]")).to_be_visible()
    expect(page.locator("#account")).to_be_hidden()


def test_an_unreadable_account_is_requested_again(served: Served, visit: Visiting) -> None:
    """SQL is away: the order can be read, and the account cannot."""
    sale_id = served.sale(items=ITEMS, virtualAccounts=True)
    visitor = visit()
    page = visitor.open(f"/sales/{sale_id}")
    asked: list[str] = []

    def without(route: Route) -> None:
        asked.append(route.request.url)
        url = route.request.url.partition("?")[0]
        document = route.fetch(url=url).json()
        if len(asked) < 3:
            document.pop("virtualAccount", None)
        route.fulfill(json=document)

    page.route("**/v1/reservations/**", without)
    page.clock.install()
    hold(page)
    page.locator("#pay").click()
    page.locator("button[value=virtual_account]").click()
    expect(page.locator("#money")).to_contain_text("cannot be shown at the moment")
    expect(page.locator("#account")).to_be_hidden()
    page.clock.fast_forward(10_000)
    page.wait_for_timeout(200)
    page.clock.fast_forward(10_000)
    expect(page.locator("#account-number")).to_be_visible()
    assert len(asked) == 3


def test_a_deposit_is_refunded_in_the_console(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(name="Winter sale", items=ITEMS, virtualAccounts=True)
    buyer = served.buyer()
    order = served.hold(sale_id, buyer, items=[("mug", 1)], amount=12_000)
    payment_key = served.pay(order, method="virtual_account")
    account = served.open_success_url(order, payment_key).json()["virtualAccount"]
    assert served.audit(sale_id)["ok"]
    desk = visit(viewport={"width": 1280, "height": 900})
    console = sign_in(served, desk.open(f"/ops?sale={sale_id}"))
    console.get_by_role("button", name=f"…{order['orderId'][-8:]}").click()
    expect(console.locator("#order-account")).to_contain_text(account["accountNumber"])
    expect(console.locator("#refund")).to_be_hidden()

    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    assert served.audit(sale_id)["ok"]
    console.locator("#filter button").click()
    console.get_by_role("button", name=f"…{order['orderId'][-8:]}").click()
    served.order_fault(order, "refuse", operations=["cancel", "look_up"], times=1000)
    ask_for_refund(console, "110123456780")
    expect(console.locator("#order-now")).to_contain_text("refund_pending")
    expect(console.locator("#order-refund")).to_contain_text("account 110123456780")
    # A correction that may come too late is refused, and the current refund is shown.
    ask_for_refund(console, "110123456789")
    expect(console.locator("#notice")).to_contain_text("refund_pending")
    expect(console.locator("#order-refund")).to_contain_text("account 110123456780")
    assert serious(console) == []
    served.clear_faults(order)
    eventually(
        lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED", within=60
    )
    assert served.ledger(order)["cancelled"] == 12_000


def ask_for_refund(console: Page, number: str) -> None:
    """Fill in the question, which takes no half of an account."""
    console.locator("#refund").click()
    fields = {"bank": "신한은행", "holderName": "김토스", "reason": "sent back"}
    for name, value in fields.items():
        console.locator(f"#ask [name={name}]").fill(value)
    console.locator("#ask-yes").click()
    expect(console.locator("#ask")).to_be_visible()
    console.locator("#ask [name=accountNumber]").fill(number)
    console.locator("#ask-yes").click()
    expect(console.locator("#ask")).to_be_hidden()


def test_a_card_refund_needs_no_bank_account(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    order = served.hold(sale_id, served.buyer(), items=[("mug", 1)], amount=12_000)
    served.open_success_url(order, served.pay(order))
    assert served.audit(sale_id)["ok"]
    console = sign_in(
        served, visit(viewport={"width": 1280, "height": 900}).open(f"/ops?sale={sale_id}")
    )
    console.get_by_role("button", name=f"…{order['orderId'][-8:]}").click()
    console.locator("#refund").click()
    expect(console.locator("#ask")).to_be_visible()
    expect(console.locator("#ask-account")).to_be_hidden()
