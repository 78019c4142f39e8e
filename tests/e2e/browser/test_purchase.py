"""Purchases in a real browser: paying, declines, the keyboard and older browsers."""

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.support.service import Served, item
from tests.support.storefront import (
    ITEMS,
    TIMES,
    Visiting,
    buyer_of,
    choose,
    hold,
    orders_of,
    pay,
    result,
    statuses_of,
)

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


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

    # The token is out of the address, and a reload still shows the order.
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


def test_a_purchase_works_with_the_keyboard_alone(served: Served, visit: Visiting) -> None:
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
def test_an_item_named_like_an_object_member_can_be_bought(
    served: Served, visit: Visiting, sku: str
) -> None:
    sale_id = served.sale(items=[item(sku, total=5), item("mug", total=5)])
    page = visit().open(f"/sales/{sale_id}")
    choose(page, sku, 2)
    page.reload()
    page.locator("#buy").click()
    expect(page.locator("#hold-lines li")).to_have_count(1)
    assert served.stock(sale_id, sku) == (3, 2, 0)
