"""The load test's verdict: the faults that it reports, and the curves of its scenarios."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtests.buyer_outcomes import WRONG_MAX, Answers
from loadtests.operator_api import CannotBegin, address_of
from loadtests.shapes import DEFAULT_SECONDS, SCENARIOS, target_at
from loadtests.verdict import RequestLine, Sample, Verdict, judge, problems_of_sample, write
from reservation.domain.ids import OrderIds
from reservation.verification.balance_check import BalanceCheck, books_of

SALE = "sale-1"
IDS = OrderIds(b"k" * 32)
FIRST, SECOND = (
    IDS.order_id(sale_id=SALE, buyer_id=buyer, idempotency_key="once") for buyer in ("a", "b")
)
LINE = RequestLine(
    method="GET",
    name="look",
    requests=2,
    failures=0,
    per_second=1,
    median_ms=1,
    p95_ms=1,
    p99_ms=1,
)
SAMPLE = Sample(seconds=1, sku="a", total=2, available=1, held=0, sold=1)


def order(order_id: str, status: str, amount: int = 1000) -> dict[str, Any]:
    items = [{"sku": "a", "quantity": 1}]
    return {"orderId": order_id, "status": status, "items": items, "amount": amount}


def books(**audit: Any) -> BalanceCheck:
    """The first order is sold, the second released."""
    row = {"sku": "a", "total": 2, "available": 1, "held": 0, "sold": 1}
    return books_of(
        SALE,
        audit={"ok": True, "lag": 0, "problems": [], "skus": [row]} | audit,
        orders=[order(FIRST, "CONFIRMED"), order(SECOND, "RELEASED")],
        entries=[{"orderId": FIRST, "kind": "charge", "amount": 1000}],
    )


def answers_of(**words: str) -> Answers:
    answers = Answers()
    for order_id, word in {FIRST: words.get("first"), SECOND: words.get("second")}.items():
        if word:
            answers.say({"orderId": order_id, "amount": 1000}, word)
    return answers


def verdict(**changes: Any) -> Verdict:
    given: dict[str, Any] = {
        "books": books(),
        "answers": answers_of(first="confirmed", second="released"),
        "samples": [SAMPLE],
        "statistics": [LINE],
        "sale_id": SALE,
        "scenario": "opening",
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "seconds": 1.0,
        "users": 2,
    }
    return judge(**(given | changes))


def test_a_run_with_matching_books_and_answers_is_clean() -> None:
    found = verdict()
    assert found.problems == []
    assert found.ok


def test_a_run_without_requests_is_inconclusive() -> None:
    found = verdict(statistics=[])
    assert not found.ok
    assert found.problems == ["no request was made: nothing was proved"]


def prepares(requests: int, failures: int, name: str = "prepare") -> RequestLine:
    return msgspec.structs.replace(LINE, name=name, requests=requests, failures=failures)


def test_a_run_without_orders_is_inconclusive() -> None:
    answers = Answers()
    answers.lives["pay: unauthenticated"] += 30
    answers.lives["leave: unauthenticated"] += 6
    found = verdict(answers=answers, statistics=[LINE, prepares(36, 36)])
    assert found.problems[0] == "all 36 prepares failed, and none by a refusal of the sale"
    assert found.problems[1] == (
        "no buyer got an order, so no answer was checked: nothing was proved (30 x pay: "
        "unauthenticated, 6 x leave: unauthenticated)"
    )


def test_successful_and_refused_prepares_are_no_problem() -> None:
    for lines in (
        [prepares(36, 35)],
        [prepares(30, 30), prepares(6, 0, "prepare: sold out")],
    ):
        assert verdict(statistics=[LINE, *lines]).ok


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://shop.example", "https://shop.example"),
        ("http://[::1]:8000//", "http://[::1]:8000"),
    ],
)
def test_a_trailing_slash_of_the_url_is_removed(url: str, address: str) -> None:
    assert address_of(url) == address


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "http://h:x", "ftp://h", "http://h/v1", "http://h?x=1", ""]
)
def test_an_invalid_service_url_is_refused_by_setting_name(url: str) -> None:
    with pytest.raises(CannotBegin, match="not an address of a service"):
        address_of(url)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("released", "released"),
        ("declined", "released"),
        ("sold_out", "released"),
        ("reservation_expired", "released"),
        ("confirmed", "confirmed"),
    ],
)
def test_a_buyer_with_a_different_answer_is_a_problem(first: str, second: str) -> None:
    assert not verdict(answers=answers_of(first=first, second=second)).ok


@pytest.mark.parametrize("word", ["held", "asked", "confirming"])
def test_a_buyer_without_a_final_answer_may_have_the_unit_or_not(word: str) -> None:
    assert verdict(answers=answers_of(first=word, second=word)).ok


def test_an_order_missing_in_sql_is_a_problem() -> None:
    answers = answers_of(first="confirmed")
    answers.say({"orderId": "sale-1-lost", "amount": 1000}, "held")
    assert "missing in SQL" in verdict(answers=answers).problems[0]


def test_an_unexpected_amount_is_a_problem() -> None:
    answers = Answers()
    answers.say({"orderId": FIRST, "amount": 1}, "confirmed")
    assert "reported amount 1, expected 1000" in verdict(answers=answers).problems[0]


@pytest.mark.parametrize(
    "change",
    [
        {"books": books(problems=["the counters differ"], ok=False)},
        {"books": books(lag=3)},
        {"exceptions": 1},
        {"seen": ["oversold, at 3.0 s"]},
    ],
    ids=["audit", "lag", "exception", "seen"],
)
def test_any_other_error_is_a_problem(change: dict[str, Any]) -> None:
    assert not verdict(**change).ok


def test_wrong_answers_beyond_the_kept_ones_are_counted() -> None:
    answers = answers_of(first="confirmed", second="released")
    for number in range(WRONG_MAX + 5):
        answers.accuse(f"one key, two orders: {number}")
    assert verdict(answers=answers).problems[-1] == "and 5 more such answers"


@pytest.mark.parametrize(
    ("counters", "found"),
    [
        ((2, 1, 0, 1), 0),
        ((2, 2, 0, 1), 1),
        ((2, -1, 2, 1), 1),
        ((1, -1, 0, 2), 2),
    ],
)
def test_counters_must_add_up_at_each_observation(
    counters: tuple[int, int, int, int], found: int
) -> None:
    total, available, held, sold = counters
    sample = Sample(seconds=1, sku="a", total=total, available=available, held=held, sold=sold)
    assert len(problems_of_sample(sample)) == found


def test_answers_of_all_processes_are_merged() -> None:
    worker, master = answers_of(first="held"), answers_of(second="released")
    worker.lives["pay: sold_out"] += 1
    assert master.merge(worker.take())
    worker.say({"orderId": FIRST, "amount": 1000}, "confirmed")
    assert master.merge(worker.take())
    assert not master.merge(worker.take())
    assert {order_id: last.word for order_id, last in master.orders.items()} == {
        FIRST: "confirmed",
        SECOND: "released",
    }
    assert master.lives == {"pay: sold_out": 1}


def test_a_verdict_is_written_as_json_and_as_a_self_contained_page(tmp_path: Path) -> None:
    write(msgspec.structs.replace(verdict(), problems=["</script><b>"]), tmp_path)
    verdict_json = json.loads((tmp_path / "verdict.json").read_text())
    assert (verdict_json["saleId"], verdict_json["samples"][0]["sold"]) == (SALE, 1)
    page = (tmp_path / "verdict.html").read_text()
    assert "</script><b>" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_scenario_reaches_its_peak_and_ends(scenario: str) -> None:
    seconds = [target_at(scenario, at, peak=30, run_seconds=60) for at in range(60)]
    counts = [target[0] for target in seconds if target]
    assert len(counts) == 60
    assert max(counts) == 30
    assert min(counts) >= 1
    assert all(target[1] >= 1 for target in seconds if target)
    assert target_at(scenario, 60, peak=30, run_seconds=60) is None
    assert target_at(scenario, DEFAULT_SECONDS[scenario], peak=30, run_seconds=None) is None
