"""Scenarios against scripted answers: the requests of each buyer, and reported violations."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from reservation.verification.scenario_steps import Answer, Pause, Request, Scenario
from reservation.verification.scenarios import LEFT, LIVES, ends_of, live
from reservation.verification.shopper import NO_SANDBOX, OVER, Basket, Crowd, Habits, Shopper

SALE = "sale-1"
PRICES = {"a": 1000, "b": 700}
BASKET = Basket(lines={"a": 1}, amount=1000)
HABITS = Habits(tries_max=3, pause_seconds=(0.5, 1.0), status_reads_max=2, status_wait_seconds=10)
#: Answers by the name of the request; the last one of a list is repeated.
Script = Mapping[str, Answer | Sequence[Answer]]


def order(order_id: str = "R1", amount: int = 1000, **changes: Any) -> dict[str, Any]:
    payment = {
        "checkoutUrl": "http://pg.test/checkout",
        "successUrl": f"http://shop.test/v1/payments/toss/success?t={order_id}",
        "failUrl": f"http://shop.test/v1/payments/toss/fail?t={order_id}",
    }
    return {"orderId": order_id, "amount": amount, "token": "tok", "payment": payment} | changes


def problem(code: str, status: int = 409, **members: Any) -> Answer:
    return Answer(status, {"code": code, **members})


def status(name: str, code: int = 200) -> Answer:
    return Answer(code, {"orderId": "R1", "status": name})


HELD = Answer(201, order())
KEYS = [Answer(201, {"paymentKey": f"pay-{number}"}) for number in (1, 2)]
#: A service and a PG without faults, by the names of the requests.
WELL: Script = {
    "look": Answer(200, {"holdSeconds": 30, "items": [{"sku": "a", "price": 1000}]}),
    "prepare": HELD,
    "pay at the PG": KEYS,
    "deposit at the PG": Answer(200, {}),
    "come back": status("CONFIRMED"),
    "release": status("RELEASED"),
    "fail": status("HELD"),
    "read": status("HELD"),
    "intrude: read": problem("reservation_not_found", 404),
    "intrude: release": problem("reservation_not_found", 404),
    "intrude: come back": problem("invalid_token", 403),
}


class Driver:
    """Performs a scenario with scripted answers, one step after the other."""

    def __init__(self, script: Script | None = None, *, habits: Habits = HABITS) -> None:
        self._script = {
            name: [answers] if isinstance(answers, Answer) else list(answers)
            for name, answers in {**WELL, **(script or {})}.items()
        }
        self.requests: list[Request] = []
        self.pauses: list[float] = []
        self.accused: list[str] = []
        self.said: list[str] = []
        self.crowd = Crowd(
            sale_id=SALE,
            habits=habits,
            accuse=self.accused.append,
            say=lambda _order, word: self.said.append(word),
            prices=dict(PRICES),
            hold_seconds=30.0,
        )
        self.shopper = Shopper(
            self.crowd, headers={"Authorization": "Bearer me"}, draw=random.Random(1)
        )

    def perform(self, scenario: Scenario[Any]) -> Any:
        result: Any = None
        while True:
            try:
                step = scenario.send(result)
            except StopIteration as end:
                return end.value
            if isinstance(step, Request):
                self.requests.append(step)
                answers = self._script[step.name]
                result = answers.pop(0) if len(answers) > 1 else answers[0]
            elif isinstance(step, Pause):
                self.pauses.append(step.seconds)
                result = None
            else:
                result = [self.perform(one) for one in step.scenarios]

    def live(self, life: str, held: dict[str, Any] | None = None) -> tuple[str, ...]:
        return self.perform(live(self.shopper, life, held or order()))

    @property
    def names(self) -> list[str]:
        return [request.name for request in self.requests]

    def urls(self, name: str) -> list[str]:
        return [request.url for request in self.requests if request.name == name]


@pytest.mark.parametrize(
    ("life", "names", "ends"),
    [
        ("pay", ["pay at the PG", "come back"], ("confirmed",)),
        ("leave", [], (LEFT,)),
        ("change_mind", ["release", "pay at the PG", "come back"], ("released", "confirmed")),
        ("late", ["pay at the PG", "come back"], ("confirmed",)),
        ("fail", ["fail"], ("200",)),
        ("intrude", ["release"], ("released",)),
        ("pay_twice", ["pay at the PG"] * 2 + ["come back"] * 2, ("confirmed", "confirmed")),
        (
            "transfer",
            ["pay at the PG", "come back", "deposit at the PG"],
            ("confirmed",),
        ),
        (
            "release_while_paying",
            ["pay at the PG", "come back", "release"],
            ("confirmed", "200"),
        ),
    ],
)
def test_a_life_sends_its_requests_and_returns_its_ends(
    life: str, names: list[str], ends: tuple[str, ...]
) -> None:
    driver = Driver()
    assert driver.live(life) == ends
    assert driver.names == names
    assert driver.accused == []


REFUSED: dict[str, Script] = {
    "decline": {"come back": problem("payment_declined", 402)},
    "make_up_key": {"come back": problem("payment_declined", 402)},
    "tamper": {"come back": problem("amount_mismatch", 422)},
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("life", LIVES)
def test_no_life_accuses_a_service_without_a_fault(life: str, seed: int) -> None:
    driver = Driver(REFUSED.get(life))
    driver.crowd.orders.append("R2")
    driver.shopper.draw.seed(seed)
    assert driver.live(life)
    assert driver.accused == []


def test_a_payment_returns_to_the_success_url_with_its_key_and_amount() -> None:
    driver = Driver()
    driver.live("pay")
    query = "t=R1&paymentType=NORMAL&orderId=R1&paymentKey=pay-1&amount=1000"
    assert driver.urls("come back") == [f"http://shop.test/v1/payments/toss/success?{query}"]
    assert driver.requests[0].url == "http://pg.test/_payments"
    assert driver.requests[0].body == {"orderId": "R1", "amount": 1000, "method": "card"}


def test_the_last_word_about_an_order_is_its_end() -> None:
    driver = Driver()
    driver.live("pay")
    assert driver.said == ["asked", "confirmed"]


def test_an_answer_that_is_no_end_leaves_the_order_pending() -> None:
    driver = Driver({"come back": problem("invalid_token", 403)})
    assert driver.live("pay") == ("invalid_token",)
    assert driver.said == ["asked", "asked"]


def test_a_deferred_request_is_repeated_after_a_pause() -> None:
    driver = Driver({"prepare": [Answer(0, {}), problem("unavailable", 503), HELD]})
    held = driver.perform(driver.shopper.prepare(BASKET))
    assert held["orderId"] == "R1"
    assert driver.names == ["prepare"] * 3
    assert len({request.headers["Idempotency-Key"] for request in driver.requests}) == 1
    assert all(0.5 <= seconds <= 1.0 for seconds in driver.pauses)


def test_a_request_is_given_up_after_its_last_try() -> None:
    driver = Driver({"prepare": problem("unavailable", 503)})
    assert driver.perform(driver.shopper.prepare(BASKET)) == "unavailable"
    assert driver.names == ["prepare"] * 3


def test_a_pause_follows_the_deferral_up_to_a_limit() -> None:
    habits = Habits(tries_max=3, retry_after_seconds_max=5.0)
    deferrals = [problem("rate_limited", 429, retryAfter=seconds) for seconds in (2, 60)]
    driver = Driver({"prepare": [*deferrals, HELD]}, habits=habits)
    driver.perform(driver.shopper.prepare(BASKET))
    first, second = driver.pauses
    assert 1.0 <= first <= 2.0
    assert 2.5 <= second <= 5.0


def test_an_undecided_payment_is_read_until_it_is_settled() -> None:
    driver = Driver(
        {
            "come back": status("CONFIRMING", 202),
            "wait until settled": [status("CONFIRMING"), status("RELEASED")],
        }
    )
    assert driver.live("pay") == ("declined",)
    assert driver.urls("wait until settled") == ["/v1/reservations/R1?wait=10"] * 2
    assert driver.requests[-1].headers == {"X-Reservation-Token": "tok"}


def test_a_payment_that_stays_undecided_ends_as_confirming() -> None:
    undecided = {"come back": status("CONFIRMING", 202), "wait until settled": status("CONFIRMING")}
    assert Driver(undecided).live("pay") == ("confirming",)


def test_a_buyer_who_reads_no_status_loads_the_page_again() -> None:
    pending = [status("CONFIRMING", 202), Answer(0, {}), status("CONFIRMED")]
    driver = Driver({"come back": pending}, habits=Habits(loads=(3,)))
    assert driver.live("pay") == ("confirmed",)
    assert driver.names == ["pay at the PG"] + ["come back"] * 3


def test_a_payment_without_a_pg_returns_with_an_unknown_key() -> None:
    driver = Driver({"pay at the PG": Answer(0, {})})
    driver.live("pay")
    assert "paymentKey=no-payment-of-R1" in driver.urls("come back")[0]


def test_a_late_buyer_waits_for_the_end_of_the_hold() -> None:
    driver = Driver({"come back": problem("reservation_expired")})
    assert driver.live("late") == ("reservation_expired",)
    assert 30.5 <= driver.pauses[0] <= 32.5


def test_a_declined_buyer_pays_with_another_card() -> None:
    driver = Driver({"come back": [problem("payment_declined", 402), status("CONFIRMED")]})
    assert driver.live("decline") == ("declined", "confirmed")
    bodies = [request.body or {} for request in driver.requests if "PG" in request.name]
    assert ["decline" in body for body in bodies] == [True, False]
    assert driver.accused == []


@pytest.mark.parametrize("paid", ["CONFIRMED", "AWAITING_DEPOSIT"])
def test_a_refused_card_that_is_paid_is_accused(paid: str) -> None:
    driver = Driver({"come back": status(paid)})
    assert driver.live("decline") == (paid.lower(),)
    assert driver.accused == [f"R1: a refused card ended as {paid.lower()}"]


def test_a_made_up_payment_key_that_is_paid_is_accused() -> None:
    driver = Driver({"come back": status("CONFIRMED")})
    driver.live("make_up_key")
    assert driver.accused == ["R1: a made-up payment key ended as confirmed"]


def test_two_ends_of_one_payment_are_accused() -> None:
    driver = Driver({"come back": [problem("payment_declined", 402), status("CONFIRMED")]})
    (end,) = driver.live("refresh")
    assert end == "repeats differ: ['confirmed', 'declined']"
    assert driver.accused == ["R1: one payment ended as ['confirmed', 'declined']"]
    assert driver.said[-1] == "asked"


def test_a_refresh_whose_loads_agree_has_one_end() -> None:
    driver = Driver({"come back": [Answer(0, {}), status("CONFIRMED")]})
    assert driver.live("refresh") == ("confirmed",)
    assert driver.said == ["asked", "confirmed"]


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["reservation_expired", "unavailable", "confirmed"], {"confirmed"}),
        (["reservation_expired", "confirming"], {"reservation_expired"}),
        (["sold_out", "reservation_expired"], {"reservation_expired"}),
        (["sold_out", "confirmed", "refunded"], {"confirmed"}),
        (["expired", "confirmed"], {"confirmed"}),
        (["refunded"], {"refunded"}),
        (["declined", "confirmed"], {"confirmed", "declined"}),
        (["unavailable", "0", "confirming"], set()),
    ],
)
def test_the_ends_of_one_payment_leave_out_refusals_of_the_moment(
    words: list[str], ends: set[str]
) -> None:
    assert ends_of(words) == ends


def test_a_second_order_for_one_key_is_accused() -> None:
    driver = Driver({"prepare": [Answer(201, order("R1")), Answer(201, order("R2"))]})
    driver.perform(driver.shopper.prepare(BASKET, clicks=2))
    assert driver.accused == ["one key, two orders: ['R1', 'R2']"]


def test_two_clicks_that_get_one_order_are_no_fault() -> None:
    driver = Driver()
    held = driver.perform(driver.shopper.prepare(BASKET, clicks=2))
    assert held == order()
    assert driver.names == ["prepare", "prepare"]
    assert driver.accused == []


@pytest.mark.parametrize(
    ("available", "is_accused"), [({"a": 1}, True), ({"a": 0}, False), ({}, False)]
)
def test_sold_out_beside_enough_available_is_accused(
    available: dict[str, int], is_accused: bool
) -> None:
    driver = Driver({"prepare": problem("sold_out", available=available)})
    assert driver.perform(driver.shopper.prepare(BASKET)) == "sold_out"
    assert bool(driver.accused) == is_accused


def test_sold_out_is_no_fault_where_one_line_is_short() -> None:
    basket = Basket(lines={"a": 1, "b": 2}, amount=2400)
    driver = Driver({"prepare": problem("sold_out", available={"a": 5, "b": 1})})
    driver.perform(driver.shopper.prepare(basket))
    assert driver.accused == []


def test_a_hold_at_a_wrong_price_is_accused() -> None:
    driver = Driver()
    driver.perform(driver.shopper.prepare(driver.shopper.mispriced(BASKET)))
    assert driver.requests[0].body == {"items": [{"sku": "a", "quantity": 1}], "amount": 999}
    assert driver.accused == ["R1: prepared at a price that is not its own"]


def test_a_wrong_price_that_is_refused_is_no_fault() -> None:
    driver = Driver({"prepare": problem("amount_mismatch", 422)})
    basket = driver.shopper.mispriced(BASKET)
    assert driver.perform(driver.shopper.prepare(basket)) == "amount_mismatch"
    assert driver.accused == []


@pytest.mark.parametrize("seed", [1, 2])
def test_a_payment_of_another_amount_that_is_accepted_is_accused(seed: int) -> None:
    driver = Driver()
    driver.shopper.draw.seed(seed)
    driver.live("tamper")
    assert driver.accused == ["R1: paid with an amount that is not its own"]
    assert driver.urls("come back")[0].endswith("amount=1")


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("intrude: read", "read"),
        ("intrude: release", "released"),
        ("intrude: come back", "paid"),
    ],
)
def test_an_answer_about_another_buyers_order_is_accused(name: str, tried: str) -> None:
    driver = Driver({name: status("HELD")})
    driver.crowd.orders.extend(["R1", "R2"])
    driver.live("intrude")
    assert driver.accused == [f"R2: {tried} by another buyer, 200"]
    assert "orderId=R2" in driver.urls("intrude: come back")[0]
    assert driver.urls("intrude: read") == ["/v1/reservations/R2"]


def test_a_replay_of_a_hold_that_is_over_is_no_hold() -> None:
    replay = {"orderId": "R1", "amount": 1000, "status": "EXPIRED"}
    driver = Driver({"prepare": Answer(201, replay)})
    assert driver.perform(driver.shopper.prepare(BASKET)) == OVER
    assert driver.said == ["held"]


def test_an_order_without_a_sandbox_is_paid_only_at_a_known_one() -> None:
    real = order(payment={"successUrl": "http://shop.test/", "checkoutUrl": None})
    driver = Driver({"prepare": Answer(201, real)})
    assert driver.perform(driver.shopper.prepare(BASKET)) == NO_SANDBOX
    driver.crowd.sandbox_url = "http://other-pg.test"
    assert driver.perform(driver.shopper.prepare(BASKET)) == real
    driver.live("pay", real)
    assert driver.urls("pay at the PG") == ["http://other-pg.test/_payments"]


def test_a_cut_off_prepare_is_sent_again_with_its_key() -> None:
    driver = Driver(habits=Habits(cut_off=1.0))
    driver.perform(driver.shopper.prepare(BASKET))
    first, second = driver.requests
    assert first.cut_after_seconds is not None
    assert second.cut_after_seconds is None
    assert first.headers == second.headers


def test_a_basket_costs_the_price_of_its_lines() -> None:
    driver = Driver(habits=Habits(items=(2,), quantities=(2,)))
    basket = driver.shopper.basket()
    assert (basket.lines, basket.amount) == ({"a": 2, "b": 2}, 3400)
    assert driver.shopper.basket(first_only=True).lines == {"a": 2}
    assert not Driver(habits=Habits(mispriced=1.0)).shopper.basket().is_fair


def test_a_buyer_reads_the_prices_and_the_hold_time() -> None:
    driver = Driver()
    assert driver.perform(driver.shopper.read_sale())
    assert (driver.crowd.prices, driver.crowd.hold_seconds) == ({"a": 1000}, 30)
    without_sale = Driver({"look": Answer(0, {})})
    assert not without_sale.perform(without_sale.shopper.read_sale())


def test_a_buyer_may_read_the_order_once_more_after_a_life() -> None:
    driver = Driver(habits=Habits(reads=1.0))
    driver.live("leave")
    assert [(one.name, one.url) for one in driver.requests] == [("read", "/v1/reservations/R1")]
    assert driver.requests[0].headers == {"Authorization": "Bearer me"}


def test_a_virtual_account_is_left_to_the_driver_until_its_deposit() -> None:
    driver = Driver({"come back": status("AWAITING_DEPOSIT")})
    assert driver.live("transfer") == ("awaiting_deposit",)
    assert driver.crowd.accounts == ["pay-1"]
    assert driver.requests[-1].body == {"paymentKey": "pay-1"}
