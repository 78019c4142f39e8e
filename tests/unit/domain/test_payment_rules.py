"""Interpretation of the PG's answers: the rules that decide about money, as properties."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reservation.domain.alarms import Alarm
from reservation.domain.payment import Cause, PaymentOutcome
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    Declined,
    Misconfigured,
    OrderIdUsed,
    Payment,
    PaymentMissing,
    PaymentStatus,
    TryAgain,
    Unknown,
)
from reservation.domain.payment_rules import (
    AnswerTo,
    CancelFirst,
    Decision,
    Finish,
    LookUp,
    Unapproved,
    Undecided,
    decide,
    may_be_refunded,
    may_still_succeed,
)
from reservation.domain.reservation import Line, Reservation
from reservation.domain.states import Status

ORDER = Reservation(
    order_id="s-" + "A" * 24,
    sale_id="s",
    buyer_id="b",
    status=Status.CONFIRMING,
    lines=(Line(sku="a", quantity=1, price=1000),),
    amount=1000,
    currency="KRW",
    order_name="n",
    created_at_ms=0,
    updated_at_ms=0,
    expires_at_ms=0,
    seq=1,
)
GIVES_BACK = {"declined", "expired", "voided", "refunded"}


def payment(status: str = "DONE", **changes: object) -> Payment:
    members: dict[str, object] = {
        "payment_key": "pk",
        "order_id": ORDER.order_id,
        "status": status,
        "total_amount": 1000,
        "balance_amount": 1000,
        "currency": "KRW",
        "approved_at": datetime(2026, 1, 1, tzinfo=UTC),
        "due_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return Payment(**(members | changes))  # pyright: ignore[reportArgumentType] - a test's members


def verdict(
    answer: Answer, asked: AnswerTo = AnswerTo.FIRST_CONFIRM, *, accounts: bool = False
) -> Decision:
    return decide(answer, order=ORDER, payment_key="pk", asked=asked, virtual_accounts=accounts)


def after_refusal(refused: Answer, shown: Answer) -> Decision:
    return decide(
        shown,
        order=ORDER,
        payment_key="pk",
        asked=AnswerTo.LOOK_UP,
        virtual_accounts=True,
        refused=refused,
    )


def cause_of(found: Decision) -> str:
    assert isinstance(found, Finish), found
    assert found.outcome.reason is not None
    return found.outcome.reason.cause


def name_of(found: Decision) -> str:
    return found.outcome.name if isinstance(found, Finish | CancelFirst) else type(found).__name__


asked_any = st.sampled_from(AnswerTo)
statuses = st.sampled_from([*PaymentStatus, "SOMETHING_NEW"])


@pytest.mark.parametrize(
    ("status", "accounts", "expected"),
    [
        ("DONE", False, "confirmed"),
        ("ABORTED", False, "declined"),
        ("EXPIRED", False, "expired"),
        ("CANCELED", False, "refunded"),
        ("WAITING_FOR_DEPOSIT", True, "awaiting_deposit"),
        ("WAITING_FOR_DEPOSIT", False, "declined"),
        ("READY", False, "Unapproved"),
        ("IN_PROGRESS", False, "Unapproved"),
        ("PARTIAL_CANCELED", False, "Undecided"),
        ("SOMETHING_NEW", False, "Undecided"),
    ],
)
def test_the_status_of_a_look_up_decides_the_outcome(
    status: str, accounts: bool, expected: str
) -> None:
    assert (
        name_of(verdict(Answered(payment(status)), AnswerTo.LOOK_UP, accounts=accounts)) == expected
    )


def test_an_unwanted_virtual_account_is_cancelled_first() -> None:
    waiting = Answered(payment("WAITING_FOR_DEPOSIT"))
    assert isinstance(verdict(waiting, AnswerTo.LOOK_UP), CancelFirst)
    assert isinstance(verdict(waiting), LookUp)


def test_a_decline_releases_only_after_the_first_confirm() -> None:
    declined = Declined("REJECT_CARD_COMPANY", "")
    assert name_of(verdict(declined)) == "declined"
    assert isinstance(verdict(declined, AnswerTo.LATER_CONFIRM), LookUp)


def test_a_payment_unknown_to_the_pg_is_looked_up() -> None:
    missing = PaymentMissing("NOT_FOUND_PAYMENT")
    assert verdict(missing) == LookUp(missing=True)
    assert verdict(missing, AnswerTo.LATER_CONFIRM) == LookUp(missing=True)
    assert verdict(missing, AnswerTo.LOOK_UP) == Unapproved(missing=True)


@given(asked_any)
def test_a_misconfiguration_raises_an_alarm_and_keeps_the_hold(asked: AnswerTo) -> None:
    found = verdict(Misconfigured("INVALID_API_KEY", ""), asked)
    looked_up = Undecided(alarm=Alarm.GATEWAY_MISCONFIGURED)
    assert found == (looked_up if asked is AnswerTo.LOOK_UP else LookUp())


@given(st.sampled_from([TryAgain("x"), Unknown("x"), Unknown("x", bound_to_key=True)]), asked_any)
def test_an_unknown_outcome_never_releases_stock(answer: Answer, asked: AnswerTo) -> None:
    assert verdict(answer, asked) == Undecided()


@given(
    statuses,
    asked_any,
    st.booleans(),
    st.sampled_from(
        [
            {"order_id": "s-" + "B" * 24},
            {"payment_key": "another"},
            {"total_amount": 999},
            {"total_amount": 100_000},
            {"currency": "USD"},
        ]
    ),
)
def test_an_answer_with_a_mismatched_member_sells_nothing(
    status: str, asked: AnswerTo, accounts: bool, change: dict[str, object]
) -> None:
    found = verdict(Answered(payment(status, **change)), asked, accounts=accounts)
    assert name_of(found) not in ("confirmed", "awaiting_deposit")
    if "order_id" in change or "payment_key" in change:
        assert found == Undecided(alarm=Alarm.ANSWER_FOR_ANOTHER_ORDER)


@given(st.sampled_from([{"total_amount": 999}, {"currency": "USD"}]))
def test_a_payment_of_another_amount_is_cancelled_only_after_a_look_up(
    change: dict[str, object],
) -> None:
    done = Answered(payment("DONE", **change))
    assert isinstance(verdict(done), LookUp)
    found = verdict(done, AnswerTo.LOOK_UP)
    assert isinstance(found, CancelFirst)
    assert found.outcome.name == "refunded"


@given(statuses)
def test_an_answer_to_a_repeated_confirm_is_verified_by_a_look_up(status: str) -> None:
    assert verdict(Answered(payment(status)), AnswerTo.LATER_CONFIRM) == LookUp()


REFUSED = Misconfigured("INVALID_REQUEST", "", bound_to_key=True)
UNPAID = ("READY", "IN_PROGRESS", "ABORTED", "EXPIRED")


@pytest.mark.parametrize("status", UNPAID)
@pytest.mark.parametrize("change", [{"total_amount": 100}, {"currency": "USD"}])
def test_an_unpaid_payment_of_another_amount_voids_a_refused_attempt(
    status: str, change: dict[str, object]
) -> None:
    found = after_refusal(REFUSED, Answered(payment(status, **change)))
    assert (name_of(found), cause_of(found)) == ("voided", Cause.AMOUNT_MISMATCH)


@given(statuses)
def test_a_payment_of_another_order_voids_a_refused_attempt(status: str) -> None:
    found = after_refusal(REFUSED, Answered(payment(status, order_id="s-" + "B" * 24)))
    assert (name_of(found), cause_of(found)) == ("voided", Cause.PAYMENT_OF_ANOTHER_ORDER)


@given(statuses, st.sampled_from([{"order_id": "s-" + "B" * 24}, {"total_amount": 100}]))
def test_a_rejected_api_key_voids_no_attempt(status: str, change: dict[str, object]) -> None:
    refused = Misconfigured("UNAUTHORIZED_KEY", "", key_refused=True)
    assert name_of(after_refusal(refused, Answered(payment(status, **change)))) != "voided"


def test_a_captured_wrong_amount_is_cancelled_after_a_refusal() -> None:
    found = after_refusal(REFUSED, Answered(payment("DONE", total_amount=100)))
    assert isinstance(found, CancelFirst)


@pytest.mark.parametrize("status", ["READY", "IN_PROGRESS"])
def test_a_refused_but_matching_payment_raises_an_alarm(status: str) -> None:
    found = after_refusal(REFUSED, Answered(payment(status)))
    assert found == Undecided(alarm=Alarm.GATEWAY_MISCONFIGURED)


@pytest.mark.parametrize("status", UNPAID)
def test_a_used_order_id_declines_an_unpaid_payment(status: str) -> None:
    found = after_refusal(OrderIdUsed("DUPLICATED_ORDER_ID"), Answered(payment(status)))
    assert (name_of(found), cause_of(found)) == ("declined", Cause.ORDER_ID_USED)


def test_an_order_id_used_by_the_same_payment_is_sold() -> None:
    found = after_refusal(OrderIdUsed("DUPLICATED_ORDER_ID"), Answered(payment("DONE")))
    assert name_of(found) == "confirmed"


@given(statuses)
def test_after_any_other_refusal_the_look_up_alone_decides(status: str) -> None:
    shown = Answered(payment(status))
    asked = verdict(shown, AnswerTo.LOOK_UP, accounts=True)
    for other in (Declined("X", ""), PaymentMissing("X"), Unknown("x"), TryAgain("x")):
        assert after_refusal(other, shown) == asked


@pytest.mark.parametrize(
    ("status", "outcome", "is_cancelled", "refundable"),
    [
        (Status.AWAITING_DEPOSIT, PaymentOutcome.EXPIRED, False, True),
        (Status.CONFIRMING, PaymentOutcome.REFUNDED, False, True),
        # Its sale was lost, and the bank reversed the deposit before the refund.
        (Status.CONFIRMING, PaymentOutcome.DECLINED, True, True),
        (Status.CONFIRMING, PaymentOutcome.DECLINED, False, False),
    ],
)
def test_a_refund_depends_on_the_state_and_the_payment_outcome(
    status: Status, outcome: PaymentOutcome, *, is_cancelled: bool, refundable: bool
) -> None:
    assert may_be_refunded(status, outcome, is_cancelled=is_cancelled) is refundable


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        Declined("REFUND_REJECTED", ""),
        PaymentMissing("NOT_FOUND_PAYMENT"),
        Unknown("500 COMMON_ERROR"),
    ],
)
def test_an_answer_to_a_cancel_ends_every_earlier_call(answer: Answer, *, before: bool) -> None:
    assert not may_still_succeed(answer, before=before)


@pytest.mark.parametrize("before", [True, False])
def test_a_cancel_that_was_not_read_leaves_earlier_calls_open(*, before: bool) -> None:
    assert may_still_succeed(TryAgain("no connection"), before=before) is before
    assert may_still_succeed(Misconfigured("UNAUTHORIZED_KEY", ""), before=before) is before


@pytest.mark.parametrize(
    "answer", [TryAgain("IDEMPOTENT_REQUEST_PROCESSING"), Unknown("502"), Unknown("time-out")]
)
def test_a_cancel_without_an_answer_may_still_succeed(answer: Answer) -> None:
    assert may_still_succeed(answer, before=False)
