"""Idempotent buying in a real browser: a wish is granted once, whatever answers are lost."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import APIResponse, Page, Route, expect

from tests.support.service import Served, eventually
from tests.support.storefront import ITEMS, NOT_NOW, Visiting, buyer_of, choose, hold, statuses_of

pytestmark = [pytest.mark.browser, pytest.mark.e2e]


def intercept(page: Page, sale_id: str, answer: Callable[[Route, int], None]) -> list[str]:
    """Answer each prepare of the page by its number, from 1; return the idempotency keys."""
    keys: list[str] = []

    def handle(route: Route) -> None:
        if route.request.method != "POST":
            return route.continue_()
        keys.append(route.request.headers["idempotency-key"])
        return answer(route, len(keys))

    page.route(reservations_of(sale_id), handle)
    return keys


def reservations_of(sale_id: str) -> re.Pattern[str]:
    """The address of a sale's prepares and lists."""
    return re.compile(rf"/v1/sales/{sale_id}/reservations$")


def lose(route: Route) -> None:
    """Let the service answer, and lose its response."""
    route.fetch()
    route.abort()


def test_a_lost_response_is_retried_with_the_same_key(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys = intercept(
        page, sale_id, lambda route, number: lose(route) if number == 1 else route.continue_()
    )
    hold(page)
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert served.stock(sale_id, "mug") == (49, 1, 0)


@pytest.mark.slow
def test_a_shed_prepare_is_retried_with_the_same_key(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys = intercept(
        page,
        sale_id,
        lambda route, number: route.fulfill(**NOT_NOW) if number == 1 else route.continue_(),
    )
    hold(page)
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.slow
def test_load_shedding_does_not_discard_the_key_of_a_lost_response(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys = intercept(
        page,
        sale_id,
        lambda route, number: lose(route) if number == 1 else route.fulfill(**NOT_NOW),
    )
    page.clock.install()
    choose(page, "mug")
    page.locator("#buy").click()
    eventually(lambda: page.clock.run_for(500) or page.locator("#buy").is_enabled(), bool)
    assert len(keys) > 1
    page.unroute_all()
    # The wish that may have been granted is kept: the next press finds its hold.
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert len(set(keys)) == 1
    assert served.stock(sale_id, "mug") == (49, 1, 0)


def test_each_wish_has_its_own_key(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys = intercept(page, sale_id, lambda route, _: route.continue_())
    hold(page)
    page.locator("#give-back").click()
    expect(page.locator("#basket")).to_be_visible()
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert len(set(keys)) == 2
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD", "RELEASED"]


def test_an_outdated_list_does_not_remove_the_hold(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    late: list[tuple[Route, APIResponse]] = []

    def keep_the_first(route: Route) -> None:
        if route.request.method == "GET" and not late:
            late.append((route, route.fetch()))
        else:
            route.continue_()

    page.route(reservations_of(sale_id), keep_the_first)
    page.locator("#give-back").click()
    while not late:
        page.wait_for_timeout(50)
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    route, answer = late[0]
    with page.expect_response(
        lambda response: response.request.method == "GET" and response.request != route.request
    ):
        route.fulfill(response=answer)
    page.evaluate("new Promise((drawn) => setTimeout(drawn))")
    expect(page.locator("#hold")).to_be_visible()
    expect(page.locator("#notice")).to_be_hidden()


@pytest.mark.slow
def test_a_refusal_keeps_the_key_of_a_lost_response(served: Served, visit: Visiting) -> None:
    """It came before the key lookup: the next press may still find the first one's hold."""
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []
    recovering: dict[str, Any] = NOT_NOW | {"json": {"code": "sale_recovering", "status": 503}}

    def lose_the_first(route: Route) -> None:
        if route.request.method == "GET":
            return route.fulfill(**recovering)
        keys.append(route.request.headers["idempotency-key"])
        return lose(route) if len(keys) == 1 else route.fulfill(**recovering)

    address = reservations_of(sale_id)
    page.route(address, lose_the_first)
    choose(page, "mug")
    page.locator("#buy").click()
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#buy")).to_be_enabled()
    assert len(keys) == 2

    def refuse_reads(route: Route) -> None:
        # A read that is answered shows the hold of the first press, without another one.
        if route.request.method == "GET":
            return route.fulfill(**recovering)
        return route.continue_()

    page.route(address, refuse_reads)
    with page.expect_request(
        lambda request: request.method == "POST" and bool(address.search(request.url))
    ) as pressed:
        page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert {*keys, pressed.value.headers["idempotency-key"]} == {keys[0]}
    assert served.stock(sale_id, "mug") == (49, 1, 0)


def test_the_key_of_an_ended_hold_is_not_reused(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    # The page lists its reservations after a release: before the hold that is not its own.
    with page.expect_response(lambda answer: answer.url.endswith(f"/{sale_id}/reservations")):
        page.locator("#give-back").click()
    expect(page.locator("#basket")).to_be_visible()
    # As if the first answer had been lost and the tab closed: the wish is stored, its hold is not.
    kept = {"key": "an-old-wish", "items": [{"sku": "mug", "quantity": 1}], "amount": 12_000}
    buyer = buyer_of(page)
    order = served.hold(sale_id, buyer, key="an-old-wish", items=[("mug", 1)], amount=12_000)
    served.release(order)
    page.evaluate(
        "([name, wish]) => sessionStorage.setItem(name, JSON.stringify(wish))",
        [f"reservation.wish.{sale_id}", kept],
    )
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert statuses_of(served, sale_id, buyer) == ["HELD", "RELEASED", "RELEASED"]
