"""Idempotent buying in a real browser: a wish is granted once, whatever answers are lost."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import APIResponse, Route, expect

from tests.support.browser import Visit
from tests.support.service import Served, eventually
from tests.support.storefront import ITEMS, NOT_NOW, buyer_of, choose, hold, statuses_of

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

Visiting = Callable[..., Visit]


def test_an_answer_that_is_lost_is_asked_for_with_the_same_key(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []

    def lose(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.continue_()
        route.fetch()
        return route.abort()

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), prepares(lose))
    hold(page)
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert served.stock(sale_id, "mug") == (49, 1, 0)


@pytest.mark.slow
def test_a_service_that_puts_off_is_asked_again_with_the_same_key(
    served: Served, visit: Visiting
) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []

    def put_off(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        return route.fulfill(**NOT_NOW) if len(keys) == 1 else route.continue_()

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), prepares(put_off))
    hold(page)
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.slow
def test_not_now_does_not_hide_that_an_answer_was_lost(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []

    def lose(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.fulfill(**NOT_NOW)
        route.fetch()
        return route.abort()

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), prepares(lose))
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


def prepares(handle: Callable[[Route], None]) -> Callable[[Route], None]:
    """Only the POSTs of an address; its GET lists."""
    return lambda route: handle(route) if route.request.method == "POST" else route.continue_()


def test_each_wish_has_a_key_of_its_own(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []

    def note(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        route.continue_()

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), prepares(note))
    hold(page)
    page.locator("#give-back").click()
    expect(page.locator("#basket")).to_be_visible()
    page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert len(set(keys)) == 2
    assert statuses_of(served, sale_id, buyer_of(page)) == ["HELD", "RELEASED"]


def test_a_list_from_before_the_hold_does_not_take_it_away(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
    late: list[tuple[Route, APIResponse]] = []

    def keep_the_first(route: Route) -> None:
        if route.request.method == "GET" and not late:
            late.append((route, route.fetch()))
        else:
            route.continue_()

    page.route(re.compile(rf"/v1/sales/{sale_id}/reservations$"), keep_the_first)
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
def test_no_refusal_makes_a_wish_forgotten_whose_answer_was_lost(
    served: Served, visit: Visiting
) -> None:
    """It came before the key lookup: the next press may still find the first one's hold."""
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    keys: list[str] = []
    recovering: dict[str, Any] = NOT_NOW | {"json": {"code": "sale_recovering", "status": 503}}

    def lose(route: Route) -> None:
        if route.request.method == "GET":
            return route.fulfill(**recovering)
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.fulfill(**recovering)
        route.fetch()
        return route.abort()

    address = re.compile(rf"/v1/sales/{sale_id}/reservations$")
    page.route(address, lose)
    choose(page, "mug")
    page.locator("#buy").click()
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#buy")).to_be_enabled()
    assert len(keys) == 2
    page.unroute(address, lose)
    with page.expect_request(
        lambda request: request.method == "POST" and bool(address.search(request.url))
    ) as pressed:
        page.locator("#buy").click()
    expect(page.locator("#hold")).to_be_visible()
    assert {*keys, pressed.value.headers["idempotency-key"]} == {keys[0]}
    assert served.stock(sale_id, "mug") == (49, 1, 0)


def test_a_key_whose_hold_has_ended_is_not_used_again(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=ITEMS)
    page = visit().open(f"/sales/{sale_id}")
    hold(page)
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
