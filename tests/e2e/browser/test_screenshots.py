"""Screenshots of docs/screens.md: each page as a shopper or an operator sees it.

`make screens` writes them into docs/images; a plain run only checks that each can be taken.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.browser import Visit
from tests.support.service import Served, eventually, item

pytestmark = [pytest.mark.browser, pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
SHOWN = set(re.findall(r"\(images/([a-z-]+)\.png\)", (ROOT / "docs/screens.md").read_text()))
#: Budget of one picture: a page of the docs with all of them stays readable on a slow line.
PICTURE_BYTES_MAX = 120_000
DESKTOP = {"width": 900, "height": 700}
ITEMS = [
    item("hoodie", name="Hoodie", price=39_000, total=300, limitPerBuyer=2),
    item("mug", name="Mug", price=12_000, total=40, limitPerBuyer=4),
    item("print", name="Signed print", price=150_000, total=5, limitPerBuyer=1),
]
KOREAN = [
    item("hoodie", name="후드티", price=39_000, total=300, limitPerBuyer=2),
    item("mug", name="머그컵", price=12_000, total=40, limitPerBuyer=4),
]

Visiting = Callable[..., Visit]
Shoot = Callable[[Page | Locator, str], None]

taken: set[str] = set()


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    folder = Path(os.environ.get("SCREENS") or tmp_path).absolute()

    def take(what: Page | Locator, name: str) -> None:
        path = folder / f"{name}.png"
        if isinstance(what, Page):
            what.screenshot(path=path, full_page=True, animations="disabled")
        else:
            what.screenshot(path=path, animations="disabled")
        # Fonts of another machine make other pictures; only the committed ones count.
        assert path.stat().st_size < PICTURE_BYTES_MAX or folder == tmp_path, name
        taken.add(name)

    return take


def hold(page: Page, sku: str = "mug", count: int = 1) -> None:
    for _ in range(count):
        page.locator(f"[data-sku={sku}] .more").click()
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()


def pay(page: Page, button: str = "card") -> None:
    page.locator("#pay").click()
    page.locator(f"button[value={button}]").click()


def result(page: Page, kind: str) -> None:
    expect(page.locator(f"#result[data-kind={kind}]")).to_be_visible()


def buy_in_bulk(served: Served, sale_id: str, count: int) -> None:
    for number in range(count):
        sku, price = (("hoodie", 39_000), ("mug", 12_000))[number % 2]
        order = served.hold(sale_id, served.buyer(), items=[(sku, 1)], amount=price)
        if number % 4:
            served.open_success_url(order, served.pay(order))


def test_a_purchase(served: Served, visit: Visiting, shoot: Shoot) -> None:
    sale_id = served.sale(name="Autumn sale", items=ITEMS)
    buy_in_bulk(served, sale_id, 12)
    page = visit().page
    # The run's other sales are not for the picture.
    page.route("**/v1/sales", lambda route: route.fulfill(json=only(served, sale_id)))
    page.goto(served.url)
    expect(page.locator("#sales")).to_contain_text("Autumn sale")
    shoot(page, "sales")
    page.get_by_role("link", name="Autumn sale").click()
    page.locator("[data-sku=mug] .more").click()
    expect(page.locator("#total")).to_have_text("₩12,000")
    shoot(page, "sale")
    hold(page)
    shoot(page, "hold")
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    shoot(page, "checkout")
    page.locator("button[value=card]").click()
    result(page, "confirmed")
    shoot(page, "result-confirmed")


def only(served: Served, sale_id: str) -> dict[str, object]:
    """A list of this sale alone. The real list may show it on a later page."""
    sale = served.http.get(f"/v1/sales/{sale_id}").raise_for_status().json()
    return {"sales": [sale], "nextCursor": None}


def test_a_card_that_is_declined(served: Served, visit: Visiting, shoot: Shoot) -> None:
    page = visit().open(f"/sales/{served.sale(name='Autumn sale', items=ITEMS)}")
    hold(page)
    pay(page, "insufficient")
    result(page, "declined")
    shoot(page, "result-declined")


def test_a_payment_that_is_not_decided_yet(served: Served, visit: Visiting, shoot: Shoot) -> None:
    sale_id = served.sale(name="Autumn sale", items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    any_order = served.hold(sale_id, served.buyer(), items=[("mug", 1)], amount=12_000)
    order = order_of(served, sale_id, page)
    served.sandbox(
        any_order,
        "/_faults",
        {"fault": "hang", "orderId": order, "operations": ["confirm", "look_up"], "seconds": 25},
    )
    page.set_default_timeout(30_000)
    pay(page)
    page.wait_for_url("**/result?**")
    result(page, "settling")
    shoot(page, "result-settling")
    served.clear_faults(any_order)


def order_of(served: Served, sale_id: str, page: Page) -> str:
    token = page.evaluate("JSON.parse(localStorage.getItem('reservation.buyer'))")
    mine = served.http.get(
        f"/v1/sales/{sale_id}/reservations", headers={"Authorization": f"Bearer {token}"}
    )
    return mine.json()["reservations"][0]["orderId"]


LAST_ONE = [item("print", name="Signed print", price=150_000, total=1)]


def at_checkout(visit: Visiting, sale_id: str) -> Page:
    page = visit().open(f"/sales/{sale_id}")
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    page.locator("#pay").click()
    expect(page.locator("button[value=card]")).to_be_visible()
    return page


def sold_to_another_buyer(served: Served, sale_id: str) -> None:
    other = served.buyer()

    def taken() -> bool:
        answer = served.prepare(sale_id, other, items=[("print", 1)], amount=150_000)
        if answer.status_code == 201:
            served.open_success_url(answer.json(), served.pay(answer.json()))
        return answer.status_code == 201

    eventually(taken, bool)


def test_a_hold_that_ran_out_on_the_payment_page(
    served: Served, visit: Visiting, shoot: Shoot
) -> None:
    sale_id = served.sale(name="Autumn sale", holdSeconds=5, items=LAST_ONE)
    page = at_checkout(visit, sale_id)
    sold_to_another_buyer(served, sale_id)
    page.locator("button[value=card]").click()
    result(page, "expired")
    shoot(page, "result-expired")
    page = visit().open(f"/sales/{sale_id}")
    expect(page.locator("#status")).to_have_text("Sold out")
    shoot(page, "sale-sold-out")


def test_the_last_unit_goes_to_the_first_payer(
    served: Served, visit: Visiting, shoot: Shoot
) -> None:
    sale_id = served.sale(name="Autumn sale", holdPolicy="success", items=LAST_ONE)
    page = at_checkout(visit, sale_id)
    sold_to_another_buyer(served, sale_id)
    page.locator("button[value=card]").click()
    result(page, "sold_out")
    shoot(page, "result-sold-out")


@pytest.mark.parametrize(
    ("locale", "items", "name"),
    [("en-US", ITEMS, "result-deposit"), ("ko-KR", KOREAN, "result-deposit-korean")],
)
def test_a_virtual_account(
    served: Served,
    visit: Visiting,
    shoot: Shoot,
    locale: str,
    items: list[dict[str, object]],
    name: str,
) -> None:
    sale_id = served.sale(name="Autumn sale", items=items, virtualAccounts=True)
    page = visit(locale=locale).open(f"/sales/{sale_id}")
    hold(page)
    pay(page, "virtual_account")
    result(page, "awaiting_deposit")
    shoot(page, name)


def test_a_deposit_that_goes_back(served: Served, visit: Visiting, shoot: Shoot) -> None:
    sale_id = served.sale(name="Autumn sale", items=ITEMS, virtualAccounts=True)
    order = served.hold(sale_id, served.buyer(), items=[("mug", 1)], amount=12_000)
    payment_key = served.pay(order, method="virtual_account")
    served.open_success_url(order, payment_key)
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    assert served.audit(sale_id)["ok"]
    page = visit(viewport=DESKTOP).open(f"/ops?sale={sale_id}")
    page.locator("#key").fill(served.settings.admin_api_key)
    page.locator("#name").fill("kim")
    page.locator("#sign-in button").click()
    page.locator("#orders button").first.click()
    page.locator("#refund").click()
    shoot(page.locator("#ask"), "ops-refund")


def test_a_phone_in_korea(served: Served, visit: Visiting, shoot: Shoot) -> None:
    sale_id = served.sale(name="가을 세일", items=KOREAN)
    page = visit(locale="ko-KR").open(f"/sales/{sale_id}")
    hold(page)
    shoot(page, "hold-korean")
    pay(page)
    result(page, "confirmed")
    shoot(page, "result-korean")


def test_the_console(served: Served, visit: Visiting, shoot: Shoot) -> None:
    sale_id = served.sale(name="Autumn sale", items=ITEMS)
    page = visit(viewport=DESKTOP).open(f"/ops?sale={sale_id}")
    shoot(page, "ops-sign-in")
    page.locator("#key").fill(served.settings.admin_api_key)
    page.locator("#name").fill("kim")
    page.locator("#sign-in button").click()
    expect(page.locator("#console")).to_be_visible()
    for _ in range(4):
        buy_in_bulk(served, sale_id, 4)
        page.wait_for_timeout(900)
    # The buyers of one state: as many as a picture has room for.
    page.locator("#state").select_option("HELD")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#orders tr").nth(3)).to_be_visible()
    orders = page.locator("section[aria-labelledby=orders-title]")
    shoot(orders, "ops-orders")
    page.locator("#state").select_option("CONFIRMED")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#orders")).to_contain_text("CONFIRMED")
    page.locator("#orders button").first.click()
    expect(page.locator("#order-title")).to_be_visible()
    shoot(page.locator("#order"), "ops-order")
    page.get_by_role("button", name="Audit").click()
    expect(page.locator("#report-title")).to_be_visible()
    for below in (orders, page.locator("#order")):
        below.evaluate("section => (section.hidden = true)")
    shoot(page, "ops")
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#editor")).to_be_visible()
    page.set_viewport_size({"width": 900, "height": 1300})
    shoot(page.locator("#editor"), "ops-editor")


def test_the_page_shows_the_pictures_that_are_taken() -> None:
    """Runs last."""
    assert taken == SHOWN
