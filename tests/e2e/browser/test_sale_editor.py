"""The console's editor of sales, in a real browser: create, change, copy, archive."""

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.browser.test_console import answer, sign_in
from tests.support.browser import PHONE, Visit, serious
from tests.support.service import Served, item

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

ITEMS = [item("mug", name="Mug", price=12_000, total=50), item("cap", name="Cap", total=5)]

Visiting = Callable[..., Visit]


@pytest.fixture
def sale_id(served: Served) -> str:
    return served.sale(name="Winter sale", items=ITEMS)


@pytest.fixture
def console(served: Served, visit: Visiting, sale_id: str) -> Page:
    """The console of one sale, in a browser with Korean time."""
    visitor = visit(viewport={"width": 1280, "height": 900}, timezone_id="Asia/Seoul")
    return sign_in(served, visitor.open(f"/ops?sale={sale_id}"))


def fill(page: Page, **fields: str) -> None:
    expect(page.locator("#editor")).to_be_visible()
    for name, value in fields.items():
        page.locator(f"#editor [name={name}]").first.fill(value)


def save(page: Page) -> None:
    page.locator("#editor-save").click()


def definition(served: Served, sale_id: str) -> dict[str, Any]:
    found = served.http.get(f"/v1/admin/sales/{sale_id}", headers=served.admin)
    return found.raise_for_status().json()


def restock(served: Served, sale_id: str) -> None:
    served.http.post(
        f"/v1/admin/sales/{sale_id}/stock",
        json={"sku": "mug", "delta": 5, "reason": "found a box"},
        headers=served.admin | {"Idempotency-Key": secrets.token_hex(8)},
    ).raise_for_status()


def test_a_sale_is_created_and_shown(served: Served, console: Page) -> None:
    sale_id = f"new-{secrets.token_hex(4)}"
    console.get_by_role("button", name="New sale").click()
    fill(console, saleId=sale_id, name="여름 세일", holdSeconds="120", sku="fan", itemName="부채")
    fill(console, opensAt="2026-01-02T03:04:05", closesAt="2199-01-01T00:00:00")
    fill(console, price="9900", total="30", limit="2")
    console.get_by_role("button", name="Add an item").click()
    second = console.locator("#editor-items li").nth(1)
    for name, value in (("sku", "hat"), ("itemName", "Hat"), ("price", "5000"), ("total", "7")):
        second.locator(f"[name={name}]").fill(value)
    console.locator("#editor [name=holdPolicy]").select_option("success")
    save(console)
    expect(console.locator("#done")).to_have_text("여름 세일 is created.")
    expect(console.locator("#title")).to_have_text("여름 세일")
    made = definition(served, sale_id)
    assert (made["opensAt"], made["closesAt"]) == (
        "2026-01-01T18:04:05.000Z",
        "2198-12-31T15:00:00.000Z",
    )
    assert (made["currency"], made["holdSeconds"], made["holdPolicy"]) == ("KRW", 120, "success")
    items = [(one["sku"], one["name"], one["price"], one["total"]) for one in made["items"]]
    assert items == [("fan", "부채", 9_900, 30), ("hat", "Hat", 5_000, 7)]
    assert [one["limitPerBuyer"] for one in made["items"]] == [2, 1]


def test_an_edit_changes_only_what_was_edited(served: Served, console: Page, sale_id: str) -> None:
    before = definition(served, sale_id)
    console.get_by_role("button", name="Edit").click()
    fill(console, name="Spring sale", total="60")
    expect(console.locator("#editor [name=saleId]")).to_be_disabled()
    save(console)
    expect(console.locator("#title")).to_have_text("Spring sale")
    expect(console.locator("[data-sku=mug]")).to_contain_text("60 available, 0 held, 0 sold of 60")
    after = definition(served, sale_id)
    changed = {name for name in before if before[name] != after[name]} - {"serverTime"}
    assert changed == {"name", "items"}
    assert [one["total"] for one in after["items"]] == [60, 5]


def test_a_refused_change_keeps_the_form_and_its_input(
    served: Served, console: Page, sale_id: str
) -> None:
    served.hold(sale_id, served.buyer(), items=[("mug", 2)], amount=24_000)
    console.get_by_role("button", name="Edit").click()
    fill(console, total="1")
    save(console)
    expect(console.locator("#editor-error")).to_contain_text("total_too_low")
    expect(console.locator("#editor [name=total]").first).to_have_value("1")
    fill(console, total="2")
    save(console)
    expect(console.locator("#editor")).to_be_hidden()
    assert served.stock(sale_id, "mug") == (0, 2, 0)


def test_a_change_by_somebody_else_meanwhile_is_not_overwritten(
    served: Served, console: Page, sale_id: str
) -> None:
    console.get_by_role("button", name="Edit").click()
    fill(console, total="10")
    restock(served, sale_id)
    save(console)
    expect(console.locator("#editor-error")).to_contain_text("changed meanwhile")
    assert served.stock(sale_id, "mug") == (55, 0, 0)


def test_an_existing_id_is_not_taken_over(served: Served, console: Page, sale_id: str) -> None:
    console.get_by_role("button", name="Copy").click()
    fill(console, saleId=sale_id, name="A copy")
    fill(console, opensAt="2026-01-02T03:04:05", closesAt="2199-01-01T00:00:00")
    restock(served, sale_id)
    save(console)
    expect(console.locator("#editor-error")).to_contain_text("id exists")
    assert definition(served, sale_id)["name"] == "Winter sale"


def test_a_copy_has_the_items_and_settings_of_the_sale(
    served: Served, console: Page, sale_id: str
) -> None:
    copy_id = f"copy-{secrets.token_hex(4)}"
    console.get_by_role("button", name="Copy").click()
    fill(console, saleId=copy_id, name="Second winter sale")
    fill(console, opensAt="2026-01-02T03:04:05", closesAt="2199-01-01T00:00:00")
    save(console)
    expect(console.locator("#title")).to_have_text("Second winter sale")
    first, second = definition(served, sale_id), definition(served, copy_id)
    assert first["items"] == second["items"]


def test_a_draft_is_published_with_its_texts_and_picture(
    served: Served, console: Page, visit: Visiting
) -> None:
    sale_id = f"draft-{secrets.token_hex(4)}"
    console.get_by_role("button", name="New sale").click()
    fill(console, saleId=sale_id, name="Draft sale", sku="fan", itemName="Fan")
    fill(console, opensAt="2026-01-02T03:04:05", closesAt="2199-01-01T00:00:00")
    fill(console, price="9900", total="30", limit="2", description="Two days only")
    fill(console, itemDescription="Of paper", imageUrl="/static/common/icon.svg")
    console.locator("#editor [name=visibility]").select_option("draft")
    save(console)
    expect(console.locator("#status")).to_have_text("draft, open")
    assert served.http.get(f"/v1/sales/{sale_id}").status_code == 404
    console.get_by_role("button", name="Edit").click()
    console.locator("#editor [name=visibility]").select_option("public")
    save(console)
    expect(console.locator("#status")).to_have_text("open")
    page = visit().open(f"/sales/{sale_id}")
    expect(page.locator("#description")).to_have_text("Two days only")
    expect(page.locator("[data-sku=fan]")).to_contain_text("Of paper")
    picture = page.locator("[data-sku=fan] .picture")
    expect(picture).to_be_visible()
    # Rejects if the picture cannot be loaded.
    picture.evaluate("image => image.decode()")
    assert picture.evaluate("image => image.naturalWidth") > 0


def test_prices_of_a_currency_with_cents_are_typed_with_a_point(
    console: Page,
) -> None:
    console.get_by_role("button", name="New sale").click()
    fill(console, currency="USD", price="12.34")
    console.locator("#editor [name=name]").first.focus()
    price = console.locator("#editor [name=price]")
    assert price.evaluate("field => field.validity.valid")
    price.fill("12.345")
    assert price.evaluate("field => field.validity.stepMismatch")


def test_a_closed_sale_is_archived_and_leaves_the_list(
    served: Served, console: Page, sale_id: str
) -> None:
    expect(console.get_by_role("button", name="Archive")).to_be_disabled()
    console.get_by_role("button", name="Close for good").click()
    answer(console, "it is over")
    console.get_by_role("button", name="Archive").click()
    answer(console, "nothing is open")
    expect(console.locator("#done")).to_have_text("Winter sale is archived.")
    expect(console.locator(f"#sale option[value={sale_id}]")).to_have_count(0)


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "wide"])
def test_the_editor_is_accessible(
    served: Served, visit: Visiting, sale_id: str, viewport: dict[str, int]
) -> None:
    page = sign_in(served, visit(viewport=viewport).open(f"/ops?sale={sale_id}"))
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#editor")).to_be_visible()
    assert serious(page) == []
    dialog = page.locator("#editor")
    assert dialog.evaluate("one => one.scrollWidth - one.clientWidth") <= 0
