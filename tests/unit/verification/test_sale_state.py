"""Attempts whose payment was voided, in whole histories of one order."""

import json

import pytest

from reservation.domain.events import GENESIS, chain_of
from reservation.verification.model.checker import HistoryChecker
from reservation.verification.model.history_format import (
    VERSION,
    End,
    EventLine,
    Head,
    History,
    Operation,
    Record,
)
from reservation.verification.model.report import Judgement

KEY = "payment-key"
#: An event's name, its order and its data.
Event = tuple[str, str, dict[str, object]]

ITEM = {"sku": "a", "price": 1000, "total": 10, "limit": 2}
HELD: tuple[Event, ...] = (
    ("sale_put", "", {"items": [ITEM], "opensAt": 0, "closesAt": 10**9, "holdPolicy": "prepare"}),
    (
        "prepared",
        "o",
        {
            "from": "",
            "to": "HELD",
            "items": [["a", 1, 1000]],
            "amount": 1000,
            "expiresAt": 10**6,
            "buyer": "ann",
        },
    ),
)


def claimed(fence: int) -> Event:
    return ("claimed", "o", {"from": "HELD", "to": "CONFIRMING", "fence": fence, "paymentKey": KEY})


def voided(cause: str) -> Event:
    return ("voided", "o", {"from": "CONFIRMING", "to": "HELD", "fence": 1, "cause": cause})


CONFIRMED: Event = ("confirmed", "o", {"from": "CONFIRMING", "to": "CONFIRMED", "fence": 1})
DECLINED: Event = ("declined", "o", {"from": "CONFIRMING", "to": "RELEASED", "fence": 1})
RELEASED: Event = ("released", "o", {"from": "HELD", "to": "RELEASED", "cause": "buyer"})


def accepted() -> Operation:
    return success(status=202, reported="CONFIRMING")


def success(*, status: int, reported: str = "", code: str = "") -> Operation:
    """The buyer's return from the PG, and its answer."""
    return Operation(
        sale="s",
        client="c",
        operation="success",
        invoked_ns=20,
        order="o",
        payment_key=KEY,
        status=status,
        reported=reported,
        code=code,
    )


def judged(
    events: list[Event], call: Operation, *, answered_after: int, replicas_acknowledge: bool = False
) -> Judgement:
    """Judge the call, whose answer came after that many events and before the next one."""
    records: list[Record] = [
        History(
            version=VERSION,
            unix_ms=0,
            monotonic_ns=0,
            replicas_acknowledge=replicas_acknowledge,
        )
    ]
    for at_ns in (10, 40):
        records.append(Head(sale="s", invoked_ns=at_ns, answered_ns=at_ns, seq=answered_after))
    call.answered_ns = 30
    records.append(call)
    chain = GENESIS
    for seq, (event, order_id, members) in enumerate(events, 1):
        data = json.dumps(members)
        chain = chain_of(chain, seq=seq, event=event, order_id=order_id, at_ms=seq, data=data)
        records.append(
            EventLine(
                sale="s", seq=seq, event=event, order=order_id, at=seq, data=data, chain=chain
            )
        )
    records.append(End(sale="s", seq=len(events)))
    checker = HistoryChecker()
    checker.add_all(1, records)
    return checker.finish()


def violations(events: list[Event], call: Operation, *, answered_after: int) -> list[str]:
    found = judged(events, call, answered_after=answered_after).violations
    return [violation.reason for violation in found]


@pytest.mark.parametrize("cause", ["intent_not_written", "the intent could not be written"])
def test_a_retry_after_an_unwritten_intent_may_be_accepted(
    cause: str,
) -> None:
    """events:  claimed, fence 1   voided                        claimed, fence 2
    buyer:                             success -> 202
    """
    events = [*HELD, claimed(1), voided(cause), claimed(2)]
    assert violations(events, accepted(), answered_after=4) == []


def test_a_retry_of_a_voided_payment_is_not_accepted() -> None:
    events = [*HELD, claimed(1), voided("key_of_another_order")]
    [reason] = violations(events, accepted(), answered_after=4)
    assert "reported as CONFIRMING, it is HELD" in reason


def test_a_voided_payment_stays_declined_after_its_release() -> None:
    events = [*HELD, claimed(1), voided("payment_not_found"), RELEASED]
    declined = success(status=402, code="payment_declined")
    assert violations(events, declined, answered_after=5) == []


def test_a_payment_without_a_record_is_not_declined() -> None:
    events = [*HELD, claimed(1), voided("intent_not_written")]
    declined = success(status=402, code="payment_declined")
    [reason] = violations(events, declined, answered_after=4)
    assert "the payment is not declined" in reason


@pytest.mark.parametrize("outcome", [CONFIRMED, DECLINED])
def test_an_outcome_may_be_withheld_only_where_replicas_acknowledge_it(outcome: Event) -> None:
    events = [*HELD, claimed(1), outcome]
    withheld = judged(events, accepted(), answered_after=4, replicas_acknowledge=True)
    assert (withheld.ok, withheld.unacknowledged) == (True, 1), withheld.violations
    [violation] = judged(events, accepted(), answered_after=4).violations
    assert "reported as CONFIRMING" in violation.reason


def test_a_payment_of_an_unknown_order_is_not_accepted() -> None:
    found = judged(list(HELD[:1]), accepted(), answered_after=1, replicas_acknowledge=True)
    [violation] = found.violations
    assert "o does not exist" in violation.reason


def test_a_wrong_outcome_is_found_where_replicas_acknowledge_it() -> None:
    sold = success(status=200, reported="CONFIRMED")
    found = judged([*HELD, claimed(1), DECLINED], sold, answered_after=4, replicas_acknowledge=True)
    assert not found.ok
