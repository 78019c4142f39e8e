"""Quality of the pages: accessibility, weight, languages, and scripts of their own."""

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Response, expect

from api.http.problem_details import STATUSES
from api.http.routes.pages import STATIC
from tests.support.browser import serious
from tests.support.service import Served
from tests.support.storefront import (
    ITEMS,
    Visiting,
    choose,
    pay,
    result,
)

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


#: Budget of a page's bytes, all its files together.
PAGE_BYTES_MAX = 150_000


#: Codes for operators, or for programs at the wrong address.
NOT_FOR_BUYERS = {
    "invalid_sale",
    "total_too_low",
    "sale_not_settled",
    "upgrade_in_progress",
    "insufficient_available",
    "not_refundable",
    "refund_account_required",
    "refund_pending",
    "precondition_required",
    "precondition_failed",
    "key_not_found",
    "too_many_keys",
    "invalid_webhook_endpoint",
    "webhook_endpoint_not_found",
    "webhook_endpoint_disabled",
    "webhook_delivery_not_found",
}


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


def test_pages_contain_no_inline_script_or_style() -> None:
    for page in STATIC.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), page.name
        assert not re.search(r"""(src|href)=["'](https?:)?//""", text), page.name


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
