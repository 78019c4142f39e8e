"""Tampering: no edited amount, token, order or buyer changes anything, in any combination.

One shop with orders in each state; every request in here differs from an honest one in at least one
place. Afterwards Redis as a whole, and the PG's ledger, are unchanged.
"""

import re
import string
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.service import Served, content_of, eventually, running_service

pytestmark = pytest.mark.system

EXAMPLES = 60
STATES = ("HELD", "CONFIRMED", "RELEASED", "DECLINED")
AMOUNT = 1000
PAYMENTS = "/v1/payments/toss"
#: Rate counters, heartbeats of the processes, and their comparison with SQL: they change over time.
CHANGES = re.compile(r":rate:|^rsv:(proc:|vouched$|workers$|level$)")
BASE64URL = string.ascii_letters + string.digits + "-_"

Headers = dict[str, str]


class Shop:
    """The shop's orders and tokens, and the state that no other buyer may see."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.sale_id = served.sale()
        self.buyer_id, self.victim = served.named_buyer()
        _, self.stranger = served.named_buyer()
        self.orders = {state: served.hold(self.sale_id, self.victim) for state in STATES}
        self.theirs = served.hold(self.sale_id, self.stranger)
        self.payment_keys = {
            state: served.pay(
                order, **({"decline": "REJECT_CARD_COMPANY"} if state == "DECLINED" else {})
            )
            for state, order in self.orders.items()
        }
        assert self.honest("CONFIRMED").status_code == 200
        assert self.honest("DECLINED").status_code == 402
        assert served.release(self.orders["RELEASED"]).status_code == 200
        assert served.audit(self.sale_id)["ok"]
        self.clean = eventually(self._twice, lambda seen: seen[0] == seen[1])[0]

    def honest(self, state: str) -> httpx.Response:
        return self.served.open_success_url(self.orders[state], self.payment_keys[state])

    def everything(self) -> dict[str, Any]:
        """All of Redis but for the keys in `CHANGES`, and all charges of the PG."""
        with self.served.redis() as client:
            keys = sorted(key for key in client.scan_iter(count=1000) if not CHANGES.search(key))
            found = {key: content_of(client, key) for key in keys}
        sandbox = self.theirs["payment"]["checkoutUrl"].removesuffix("/checkout")
        return {**found, "ledger": self.served.http.get(f"{sandbox}/_ledger").json()}

    def secrets(self) -> set[str]:
        """Tokens and keys that were in use here."""
        orders = [*self.orders.values(), self.theirs]
        urls = [order["payment"][name] for order in orders for name in ("successUrl", "failUrl")]
        return {
            *(order["token"] for order in orders),
            *(httpx.URL(url).params["token"] for url in urls),
            *(who["Authorization"].removeprefix("Bearer ") for who in (self.victim, self.stranger)),
            *self.payment_keys.values(),
            self.served.settings.admin_api_key,
        }

    def _twice(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.everything(), self.everything()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Its own service: its Redis has no other writer."""
    folder = tmp_path_factory.mktemp("tampering")
    with running_service(folder, RESERVATION_WORKERS="1") as served:
        yield Shop(served)


def bent(token: str, place: int, letter: str, cut: int) -> str:
    """A token with another letter in one place, or without its end."""
    place %= len(token)
    changed = token[:place] + letter + token[place + 1 :]
    return changed[: len(changed) - cut] if changed == token or cut else changed


places = st.integers(0, 400)
letters = st.sampled_from(BASE64URL)
states = st.sampled_from(STATES)


@st.composite
def tokens(draw: st.DrawFn, shop: Shop, mine: str) -> str:
    """Any token but the right one: another order's, another purpose's, a bent or a made-up one."""
    others = sorted(shop.secrets() - {mine} - set(shop.payment_keys.values()))
    kinds = (
        st.sampled_from(others)
        | st.builds(bent, st.just(mine), places, letters, st.integers(1, 9) | st.just(0))
        | st.text(BASE64URL + ".", max_size=80)
    )
    return draw(kinds.filter(lambda token: token != mine))


def amounts() -> st.SearchStrategy[str]:
    """Anything that is not the amount."""
    texts = st.text("0123456789+-.eE_ ,\N{FULLWIDTH DIGIT ONE}", max_size=9) | st.integers().map(
        str
    )
    return texts.filter(lambda text: not re.fullmatch(f"0*{AMOUNT}", text.strip()))


@st.composite
def returns(draw: st.DrawFn, shop: Shop) -> tuple[str, str, dict[str, str], Headers]:
    """A return from the PG that is honest but for one thing or more."""
    state = draw(states)
    order = shop.orders[state]
    url = httpx.URL(order["payment"]["successUrl"])
    query = {
        "orderId": order["orderId"],
        "paymentKey": shop.payment_keys[state],
        "amount": str(AMOUNT),
        "token": url.params["token"],
    }
    what = draw(st.sets(st.sampled_from(["orderId", "amount", "token"]), min_size=1))
    others = sorted({other["orderId"] for other in shop.orders.values()} - {order["orderId"]})
    if "orderId" in what:
        query["orderId"] = draw(st.sampled_from(others) | st.text(BASE64URL, max_size=40))
    if "amount" in what:
        query["amount"] = draw(amounts())
    if "token" in what:
        query["token"] = draw(tokens(shop, query["token"]))
    return "GET", f"{PAYMENTS}/success", query, {}


@st.composite
def failures(draw: st.DrawFn, shop: Shop) -> tuple[str, str, dict[str, str], Headers]:
    """A way back without a payment, with a token that does not fit."""
    order = shop.orders[draw(states)]
    mine = httpx.URL(order["payment"]["failUrl"]).params["token"]
    # A fail URL releases what its token names; so only tokens that name nothing are drawn.
    token = draw(
        st.builds(bent, st.just(mine), places, letters, st.integers(1, 9))
        | st.text(BASE64URL + ".", max_size=80)
    )
    query = {"token": token, "orderId": order["orderId"], "code": draw(st.text(max_size=20))}
    return "GET", f"{PAYMENTS}/fail", query, {}


@st.composite
def hands(draw: st.DrawFn, shop: Shop) -> tuple[str, str, dict[str, str], Headers]:
    """A read or a release of another buyer's reservation."""
    order = shop.orders[draw(states)]
    path = f"/v1/reservations/{order['orderId']}"
    method, path = draw(st.sampled_from([("GET", path), ("POST", f"{path}/release")]))
    headers = draw(
        st.just(shop.stranger)
        | st.builds(lambda token: {"X-Reservation-Token": token}, tokens(shop, order["token"]))
    )
    return method, path, {}, headers


@st.composite
def tampered(draw: st.DrawFn, shop: Shop) -> tuple[str, str, dict[str, str], Headers]:
    return draw(returns(shop) | failures(shop) | hands(shop))


@given(data=st.data())
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_tampered_request_is_refused_and_changes_nothing(shop: Shop, data: st.DataObject) -> None:
    method, path, query, headers = data.draw(tampered(shop))
    answer = shop.served.http.request(method, path, params=query, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert shop.everything() == shop.clean


@given(amount=st.integers(0, 10**12).filter(lambda amount: amount != AMOUNT))
@settings(
    max_examples=EXAMPLES // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_basket_with_an_edited_price_is_not_held(shop: Shop, amount: int) -> None:
    answer = shop.served.prepare(shop.sale_id, shop.stranger, amount=amount)
    assert 400 <= answer.status_code < 500
    assert shop.everything() == shop.clean


def test_the_unmodified_request_is_accepted(shop: Shop) -> None:
    """Control: the same request, unedited, sells. Last, since it changes the order."""
    assert shop.honest("HELD").json()["status"] == "CONFIRMED"
    assert shop.everything() != shop.clean


@pytest.mark.slow
def test_logs_and_metrics_contain_no_token_or_payment_key(shop: Shop) -> None:
    """After all of the above, and a payment whose answers went wrong in each way."""
    served = shop.served
    faults = ("commit_then_drop", "garbage", "other_order", "redirect", "error_after_commit")
    sale_id = served.sale()
    seen = shop.secrets()
    for fault in faults:
        order = served.hold(sale_id, served.buyer())
        payment_key = served.pay(order)
        served.order_fault(order, fault, operations=["confirm", "look_up"])
        url = served.success_url(order, payment_key)
        served.http.get(url, headers={"Accept": "text/html"})
        seen |= {payment_key, order["token"], httpx.URL(url).params["token"]}
    exposed = served.log.read_text(errors="replace") + served.http.get("/metrics").text
    assert "payment_finished" in exposed or "toss_answered" in exposed
    for secret in seen:
        assert secret not in exposed
        # Of a payment key only the last four may be there; of a token nothing long enough to use.
        assert secret[:-4] not in exposed
