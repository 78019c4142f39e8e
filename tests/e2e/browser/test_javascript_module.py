"""JavaScript client, in a real browser on the real service."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Page, Route

from api.http.routes.pages import STATIC
from tests.support.browser import Visit
from tests.support.service import Served, eventually, item
from tests.support.storefront import NOT_NOW

pytestmark = [pytest.mark.browser, pytest.mark.e2e]

Visiting = Callable[..., Visit]

#: docs/reference/client.md states the size.
BYTES_MAX = 8_500
CONNECT = """async (wish) => {
    window.shop ??= (await import('/static/reservation.js')).connect(wish ?? {});
    window.buyer ??= await shop.guest();
}"""


@pytest.fixture
def shop(served: Served, visit: Visiting) -> Page:
    page = visit().open("/")
    page.evaluate(CONNECT)
    return page


def until(page: Page, is_so: str) -> None:
    # Playwright's own wait evaluates text in the page, which its policy forbids.
    eventually(lambda: page.evaluate(is_so), bool)


def prepare(page: Page, sale_id: str, **more: object) -> dict[str, Any]:
    wish = {"items": [{"sku": "a", "quantity": 1}], "amount": 1000, **more}
    return page.evaluate("([sale, wish]) => shop.prepare(sale, wish)", [sale_id, wish])


def test_the_module_is_small() -> None:
    assert len((STATIC / "reservation.js").read_bytes()) < BYTES_MAX


def test_the_browser_module_holds_reads_and_releases(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")])
    held = prepare(shop, sale_id, orderName="One thing", key="wish-1")
    assert (held["status"], held["orderName"]) == ("HELD", "One thing")
    assert prepare(shop, sale_id, orderName="One thing", key="wish-1")["orderId"] == held["orderId"]
    seen = shop.evaluate("held => shop.reservation(held.orderId, {token: held.token})", held)
    assert seen["status"] == "HELD"
    own = shop.evaluate("held => shop.reservation(held.orderId, {wait: 1})", held)
    assert own["payment"]["successUrl"] == held["payment"]["successUrl"]
    assert shop.evaluate("held => shop.release(held)", held)["status"] == "RELEASED"


def test_the_browsers_unload_beacon_releases_the_hold(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")])
    held = prepare(shop, sale_id)
    assert shop.evaluate("held => shop.leave(held)", held)
    shop.goto("about:blank")
    eventually(lambda: served.stock(sale_id), lambda stock: stock == (100, 0, 0))


def test_a_refusal_has_its_code_and_facts(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a", total=0)])
    refusal = shop.evaluate(
        """sale => shop.prepare(sale, {items: [{sku: "a", quantity: 1}], amount: 1000})
            .catch(({code, status, facts, message}) => ({code, status, facts, message}))""",
        sale_id,
    )
    assert (refusal["code"], refusal["status"]) == ("sold_out", 409)
    assert refusal["facts"]["available"] == {"a": 0}
    assert refusal["message"] == refusal["facts"]["detail"]


@pytest.mark.slow
def test_a_prepare_with_a_lost_response_is_retried_and_held_once(
    served: Served, shop: Page
) -> None:
    sale_id = served.sale(items=[item("a")])
    lost: list[int] = []

    def lose(route: Route) -> None:
        if len(lost) >= 2:
            route.continue_()
            return
        lost.append(route.fetch().status)
        route.abort("connectionreset")

    shop.route(f"**/v1/sales/{sale_id}/reservations", lose)
    assert prepare(shop, sale_id)["status"] == "HELD"
    assert lost == [201, 201]
    assert served.stock(sale_id) == (99, 1, 0)


def test_a_lost_prepare_is_not_reported_as_unavailable(served: Served, shop: Page) -> None:
    """`unavailable` would state that nothing was taken, but the first attempt has taken a unit."""
    sale_id = served.sale(items=[item("a")])
    keys: list[str] = []

    def lose_then_refuse(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.fulfill(**NOT_NOW)
        route.fetch()
        return route.abort("connectionreset")

    shop.route(f"**/v1/sales/{sale_id}/reservations", lose_then_refuse)
    refusal = shop.evaluate(
        """sale => shop.prepare(sale, {items: [{sku: "a", quantity: 1}], amount: 1000, attempts: 2})
            .catch(({code, unclear}) => ({code, unclear}))""",
        sale_id,
    )
    assert refusal == {"code": "network", "unclear": True}
    shop.unroute_all()
    assert prepare(shop, sale_id, key=keys[0])["status"] == "HELD"
    assert served.stock(sale_id) == (99, 1, 0)


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_temporary_refusal_is_retried_up_to_the_attempts(
    served: Served, shop: Page, attempts: int
) -> None:
    sale_id = served.sale(items=[item("a")])
    calls: list[str] = []

    def refuse(route: Route) -> None:
        calls.append(route.request.url)
        route.fulfill(**NOT_NOW)

    shop.route(f"**/v1/sales/{sale_id}/reservations", refuse)
    outcome = shop.evaluate(
        """([sale, attempts]) => {
            const retries = [];
            const onRetry = ({code}) => retries.push(code);
            const items = [{sku: "a", quantity: 1}];
            return shop.prepare(sale, {items, amount: 1000, attempts, onRetry})
                .catch(({code, unclear}) => ({code, unclear, retries}));
        }""",
        [sale_id, attempts],
    )
    retries = ["unavailable"] * (attempts - 1)
    assert outcome == {"code": "unavailable", "unclear": False, "retries": retries}
    assert len(calls) == attempts


def test_a_long_poll_is_aborted(served: Served, shop: Page) -> None:
    held = prepare(shop, served.sale(items=[item("a")]))
    outcome = shop.evaluate(
        """held => {
            const controller = new AbortController();
            const answer = shop.reservation(held.orderId, {wait: 25, signal: controller.signal});
            controller.abort();
            return answer.then(({status}) => status, ({name}) => name);
        }""",
        held,
    )
    assert outcome == "AbortError"


def test_sales_and_the_buyers_reservations_are_listed(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")])
    orders = [prepare(shop, sale_id)["orderId"] for _ in range(2)]
    listed = shop.evaluate("sale => shop.reservations(sale)", sale_id)
    assert [order["orderId"] for order in listed] == orders[::-1]
    found = shop.evaluate(
        """async (sale) => {
            for await (const { saleId } of shop.sales()) if (saleId === sale) return saleId;
        }""",
        sale_id,
    )
    assert found == sale_id


def test_stock_events_arrive_until_the_feed_is_stopped(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")])
    shop.evaluate(
        """sale => {
            window.seen = [];
            window.stop = shop.stock(sale, (stock) => seen.push(stock));
        }""",
        sale_id,
    )
    until(shop, "seen.length === 1")
    prepare(shop, sale_id)
    until(shop, "seen.length === 2")
    assert shop.evaluate("seen")[1] == {"sku": "a", "available": 99, "held": 1, "sold": 0}
    shop.evaluate("stop()")
    prepare(shop, sale_id)
    eventually(lambda: served.stock(sale_id), lambda stock: stock == (98, 2, 0))
    assert shop.evaluate("seen.length") == 2


@pytest.mark.slow
def test_a_refused_stock_stream_is_retried(served: Served, shop: Page) -> None:
    """A proxy without a service behind it refuses, and the browser would never ask again."""
    sale_id = served.sale(items=[item("a")])
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=502) if len(asked) == 1 else route.continue_()

    shop.route(f"**/v1/sales/{sale_id}/events", refuse)
    shop.evaluate(
        "sale => { window.seen = []; shop.stock(sale, (stock) => seen.push(stock)); }", sale_id
    )
    until(shop, "seen.length === 1")
    assert len(asked) == 2


def test_the_stock_stream_continues_after_the_page_is_restored(served: Served, shop: Page) -> None:
    """An open stream would keep the page out of the back/forward cache."""
    sale_id = served.sale(items=[item("a")])
    requests: list[str] = []
    shop.on("request", lambda request: requests.append(request.url))
    shop.evaluate(
        "sale => { window.seen = []; shop.stock(sale, (stock) => seen.push(stock)); }", sale_id
    )
    until(shop, "seen.length === 1")
    shop.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', {persisted: true}))")
    shop.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")
    until(shop, "seen.length === 2")
    assert len([url for url in requests if url.endswith("/events")]) == 2


def test_idempotency_keys_work_on_plain_http(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")])
    shop.evaluate("() => { crypto.randomUUID = undefined; }")
    orders = {prepare(shop, sale_id)["orderId"] for _ in range(2)}
    assert len(orders) == 2


def test_the_countdown_follows_the_server_clock_down_to_zero(served: Served, shop: Page) -> None:
    sale_id = served.sale(items=[item("a")], holdSeconds=60)
    shop.evaluate("() => { const now = Date.now; Date.now = () => now() + 3_600_000; }")
    shop.evaluate("sale => shop.sale(sale)", sale_id)
    held = prepare(shop, sale_id)
    shop.evaluate(
        """held => {
            window.ticks = [];
            shop.countdown(held, (left) => ticks.push(left))();
            const soon = new Date(Date.parse(held.expiresAt) - 59_000).toISOString();
            window.later = [];
            shop.countdown({ expiresAt: soon }, (left) => later.push(left));
        }""",
        held,
    )
    # The sale's answer took some moments, and an error would be an hour.
    assert 0 < shop.evaluate("ticks")[0] <= 65_000
    until(shop, "later.at(-1) === 0")
    # The first was stopped after its first tick.
    assert len(shop.evaluate("ticks")) == 1


def test_the_bearer_can_come_from_a_function(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=[item("a")])
    bearer = served.buyer()["Authorization"].removeprefix("Bearer ")
    page = visit().open("/")
    order = page.evaluate(
        f"""async (sale) => {{
            const {{ connect }} = await import('/static/reservation.js');
            const shop = connect({{ token: async () => {msgspec.json.encode(bearer).decode()} }});
            return shop.prepare(sale, {{ items: [{{ sku: "a", quantity: 1 }}], amount: 1000 }});
        }}""",
        sale_id,
    )
    answer = served.http.get(
        f"/v1/reservations/{order['orderId']}", headers={"Authorization": f"Bearer {bearer}"}
    )
    assert answer.json()["status"] == "HELD"


def test_a_refused_bearer_is_renewed_once(served: Served, visit: Visiting) -> None:
    sale_id = served.sale(items=[item("a")])
    bearer = served.buyer()["Authorization"].removeprefix("Bearer ")
    page = visit().open("/")
    calls = page.evaluate(
        """async ([sale, good]) => {
            const { connect } = await import('/static/reservation.js');
            const body = { items: [{ sku: "a", quantity: 1 }], amount: 1000 };
            const calls = [];
            const from = (fresh) => connect({ token: async (refused) => {
                calls.push(refused ?? null);
                return refused ? fresh : "expired";
            } });
            const held = await from(good).prepare(sale, body);
            // The same token again is not a renewal.
            const refusal = await from("expired").prepare(sale, body).catch(({ code }) => code);
            return [held.status, refusal, ...calls];
        }""",
        [sale_id, bearer],
    )
    assert calls == ["HELD", "unauthenticated", None, "expired", None, "expired"]
