"""The PG's script in a real browser: payment windows and widgets."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

from api.http.routes.pages import SDK_HEADERS
from tests.support.service import Served
from tests.support.storefront import (
    ITEMS,
    Visiting,
    buyer_of,
    hold,
    orders_of,
)

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


def test_the_pgs_script_opens_the_payment_with_shop_keys(served: Served, visit: Visiting) -> None:
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
def test_a_single_payment_method_needs_no_choice(
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
def test_the_pgs_widgets_are_rendered_again_for_the_next_order(
    served: Served, visit: Visiting
) -> None:
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
