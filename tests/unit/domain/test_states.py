"""The state table: its transitions, the counter of each status, and the transitions in Lua."""

import re
from pathlib import Path

import pytest

from reservation.adapters.redis.scripts import script_folder
from reservation.domain.sale import Item, Sale
from reservation.domain.states import (
    EDGES,
    ENDED,
    HOLDING,
    LIVE,
    TRANSITION_RULES,
    TRANSITIONS,
    HoldPolicy,
    SaleStatus,
    Status,
)

FINISH = (script_folder() / "finish.lua").read_text()
LINES = (script_folder() / "lib" / "lines.lua").read_text()
EXPLAINED = (
    Path(__file__).resolve().parents[3] / "docs" / "explanation" / "architecture.md"
).read_text()


def reachable(start: Status) -> set[Status]:
    found, frontier = {start}, [start]
    while frontier:
        frontier = [to for status in frontier for to in TRANSITIONS[status] if to not in found]
        found.update(frontier)
    return found


def test_each_status_has_transitions_and_none_to_itself() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert not [status for status, ways in TRANSITIONS.items() if status in ways]


def test_the_documented_diagram_shows_exactly_the_transitions() -> None:
    drawn = set(re.findall(r"^    ([A-Z_]+) --> ([A-Z_]+)", EXPLAINED, re.MULTILINE))
    assert drawn == {(start, to) for start, ways in TRANSITIONS.items() for to in ways}


def test_each_rule_has_an_edge_and_names_a_script() -> None:
    assert {edge.rule for edge in EDGES} == set(TRANSITION_RULES)
    scripts = {path.stem for path in script_folder().glob("*.lua")}
    assert {rule.script for rule in TRANSITION_RULES.values()} <= scripts


def test_no_edge_is_listed_twice() -> None:
    assert len({(edge.origin, edge.to) for edge in EDGES}) == len(EDGES)


@pytest.mark.parametrize("start", [Status.HELD, Status.PREPARED])
def test_each_status_is_reachable_and_refunded_is_final(start: Status) -> None:
    other_policy = {Status.HELD, Status.PREPARED} - {start}
    assert reachable(start) >= set(Status) - other_policy
    assert TRANSITIONS[Status.REFUNDED] == frozenset()


def test_money_is_requested_in_exactly_one_status() -> None:
    """A sale is recorded only from CONFIRMING, or from an account that was opened there."""
    into_sold = {status for status, ways in TRANSITIONS.items() if Status.CONFIRMED in ways}
    assert into_sold == {Status.CONFIRMING, Status.AWAITING_DEPOSIT}


def test_only_a_refund_or_a_reversed_deposit_leaves_confirmed() -> None:
    assert TRANSITIONS[Status.CONFIRMED] == {Status.REFUNDED, Status.AWAITING_DEPOSIT}


def test_the_groups_of_states_do_not_overlap() -> None:
    assert not LIVE & ENDED
    assert HOLDING < LIVE
    assert LIVE | ENDED | {Status.CONFIRMED} == set(Status)


def test_lua_and_python_agree_on_the_counter_of_each_status() -> None:
    table = LINES.partition("COUNTER = {")[2].partition("}")[0]
    counters = dict(re.findall(r"(\w+) = \"(\w+)\"", table))
    assert set(counters) == set(Status)
    assert {status for status, name in counters.items() if name == "held"} == HOLDING
    assert {status for status, name in counters.items() if name == "sold"} == {Status.CONFIRMED}


def test_finish_lua_has_exactly_the_payment_transitions() -> None:
    table = FINISH.partition("EDGES = {")[2].partition("\n}")[0]
    walked: dict[Status, set[Status]] = {}
    for _, ways in re.findall(r"(\w+) = \{([^}]*)\}", table):
        for origin, to in re.findall(r"(\w+) = \"(\w+)\"", ways):
            walked.setdefault(Status(origin), set()).add(Status(to))
    for origin, to in walked.items():
        assert to <= TRANSITIONS[origin]
    # The target of `voided` depends on the policy and on the deadline.
    walked[Status.CONFIRMING] |= {Status.PREPARED, Status.EXPIRED}
    assert walked[Status.CONFIRMING] == TRANSITIONS[Status.CONFIRMING]
    assert walked[Status.AWAITING_DEPOSIT] == TRANSITIONS[Status.AWAITING_DEPOSIT]
    assert walked[Status.CONFIRMED] | {Status.REFUNDED} == TRANSITIONS[Status.CONFIRMED]


def sale(switched: SaleStatus = SaleStatus.OPEN, available: int = 1) -> Sale:
    item = Item(sku="a", name="A", price=1000, total=5, limit_per_buyer=1, available=available)
    return Sale(
        sale_id="s",
        name="S",
        currency="KRW",
        opens_at_ms=1000,
        closes_at_ms=2000,
        hold_seconds=60,
        hold_policy=HoldPolicy.PREPARE,
        virtual_accounts=False,
        require_admission=False,
        switched=switched,
        version=1,
        epoch="e",
        seq=1,
        items=(item,),
    )


@pytest.mark.parametrize(
    ("switched", "available", "now_ms", "shown"),
    [
        ("open", 1, 999, "scheduled"),
        ("open", 1, 1000, "open"),
        ("open", 1, 1999, "open"),
        ("open", 1, 2000, "closed"),
        ("open", 0, 999, "scheduled"),
        ("open", 0, 1000, "sold_out"),
        ("open", 0, 2000, "closed"),
        ("paused", 1, 999, "scheduled"),
        ("paused", 0, 1000, "paused"),
        ("paused", 1, 2000, "closed"),
        ("closed", 1, 999, "closed"),
        ("closed", 0, 1500, "closed"),
    ],
)
def test_a_sale_shows_its_most_severe_status(
    switched: str, available: int, now_ms: int, shown: str
) -> None:
    assert sale(SaleStatus(switched), available).status(now_ms) == shown


def test_only_the_scripts_write_a_status() -> None:
    """Python reads and shows a status; none of its commands sets one."""
    root = Path(__file__).resolve().parents[3]
    writers = [
        path.name
        for path in [*root.glob("reservation/**/*.py"), *root.glob("api/**/*.py")]
        if re.search(r"\"HSET\",[^)]*\"status\"", path.read_text())
    ]
    assert writers == []
