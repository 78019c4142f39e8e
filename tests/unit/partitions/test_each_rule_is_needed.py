"""Each rule of the design is needed: without it the search finds a violation.

A failure of a witness prints the search; a violation has the shortest trace.
"""

import pytest

from tests.unit.partitions.explorer import explore
from tests.unit.partitions.sale import REFILLS, Rules
from tests.unit.partitions.scenarios import FOR_EACH_RULE, with_rules

FALSE_ANSWER = "sold_out was false at every instant of the call"
TWICE = "a partition received more than its peer lent"
OVERTAKEN = "another order took the units that were borrowed for a waiting one"
CLOSED = "a partition stays closed"


def without(cause: str) -> Rules:
    """Return the rules with one cause that does not count as a refill."""
    return Rules(refills=REFILLS - {cause})


#: A scenario, the rules without one of them, and the violation.
WITNESSES = {
    "one reading": (
        "a unit in turn at two partitions",
        Rules(reads_twice=False),
        FALSE_ANSWER,
    ),
    "refills are not compared": (
        "a unit in turn at two partitions",
        Rules(compares_refills=False),
        FALSE_ANSWER,
    ),
    "a release is not a refill": (
        "a unit in turn at two partitions",
        without("release"),
        FALSE_ANSWER,
    ),
    "an expiry is not a refill": ("a unit in turn by expiry", without("expire"), FALSE_ANSWER),
    "a decline is not a refill": (
        "a unit in turn by declined payments",
        without("decline"),
        FALSE_ANSWER,
    ),
    "an operator's change is not a refill": (
        "a unit in turn by operators",
        without("change"),
        FALSE_ANSWER,
    ),
    "a claim after the deadline is not a refill": (
        "payments that begin after the deadline",
        without("late_claim"),
        FALSE_ANSWER,
    ),
    "epochs are not compared": (
        "a unit in turn by losses",
        Rules(compares_epochs=False),
        FALSE_ANSWER,
    ),
    "overdue holds are ignored": (
        "a unit in turn by expiry",
        Rules(counts_due=False),
        FALSE_ANSWER,
    ),
    "units in transit are ignored": (
        "two buyers and a unit far from one",
        Rules(counts_transit=False),
        FALSE_ANSWER,
    ),
    "a closed partition is read": (
        "the server of a released hold goes back",
        Rules(reads_only_open=False),
        FALSE_ANSWER,
    ),
    "a certificate is older than the call": (
        "a certificate for several calls",
        Rules(fresh_certificates=False),
        FALSE_ANSWER,
    ),
    "a certificate serves a smaller basket": (
        "baskets of two sizes",
        Rules(certificates_by_size=False),
        FALSE_ANSWER,
    ),
    "a borrow before SQL has the lend": (
        "the server of a lend goes back",
        Rules(saves_lends=False),
        TWICE,
    ),
    "a row of a lend before the events of its donor": (
        "the server of a lend goes back",
        Rules(saves_events_before=False),
        TWICE,
    ),
    "a borrow of the units that a collector remembers": (
        "lends of two sizes under one number",
        Rules(borrows_saved_units=False),
        TWICE,
    ),
    "a number is taken twice": (
        "a collector stops",
        Rules(checks_numbers=False, takes_differences=False),
        TWICE,
    ),
    "an old number is taken": (
        "a collector stops",
        Rules(checks_numbers=False),
        "available is below zero",
    ),
    "a borrow of the units of one number": (
        "SQL and a donor are restored, and its receiver goes back",
        Rules(takes_differences=False),
        TWICE,
    ),
    "a borrow without the hold": (
        "two buyers and a unit far from one",
        Rules(holds_in_borrow=False),
        OVERTAKEN,
    ),
    "a worker that does not wait for the collector": (
        "two buyers and a unit far from one",
        Rules(workers_wait=False),
        OVERTAKEN,
    ),
    "a borrow without the limit": (
        "two orders of one buyer",
        Rules(limits_borrows=False),
        "a buyer has more than the limit",
    ),
    "an order that is not recognised": (
        "a call and its repeat",
        Rules(knows_orders=False),
        "an order has two holds",
    ),
    "a recovery without its peers": (
        "SQL and a donor are restored",
        Rules(repeats_lends=False),
        TWICE,
    ),
    "a recovery that repeats its lends first": (
        "SQL and a partition that lent on are restored",
        Rules(borrows_before_repeating=False),
        CLOSED,
    ),
    "a recovery that borrows before SQL has the lend": (
        "the servers of a receiver and its donor go back",
        Rules(borrows_again_saved=False),
        CLOSED,
    ),
    "an operator's change without its number": (
        "two changes of operators",
        Rules(checks_changes=False),
        "the totals and the units in transit are not the total of the sale",
    ),
    "a withdrawal before SQL has its reservation": (
        "a withdrawal of an operator and a loss",
        Rules(saves_reservations=False),
        "a partition stays closed",
    ),
    "a recovery without the operator's changes": (
        "a change of an operator and a loss",
        Rules(catches_up=False),
        "an open partition lacks an operator's change that was answered",
    ),
}


@pytest.mark.parametrize("omission", WITNESSES)
def test_a_sale_without_the_rule_breaks_a_promise(omission: str) -> None:
    scenario, rules, violation = WITNESSES[omission]
    search = explore(with_rules(FOR_EACH_RULE[scenario], rules))
    assert search.broken == violation, str(search)


def test_each_rule_has_a_witness() -> None:
    broken = {
        name
        for _, rules, _ in WITNESSES.values()
        for name in Rules.__struct_fields__
        if getattr(rules, name) != getattr(Rules(), name)
    }
    assert set(Rules.__struct_fields__) - broken == {"adds_transit"}


@pytest.mark.parametrize(
    "scenario",
    [
        "one unit and three buyers",
        "a certificate for several calls",
        "lends of two sizes under one number",
        "SQL and a partition that lent on are restored",
    ],
)
def test_a_borrow_need_not_count_as_a_refill(scenario: str) -> None:
    """Available and lent less received is not changed by a transfer, so its sum needs no count."""
    search = explore(with_rules(FOR_EACH_RULE[scenario], without("borrow")))
    assert search.broken is None, str(search)
