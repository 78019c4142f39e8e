"""Causes are codes: sentences may be reworded, and sentences of earlier versions still parse."""

from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from reservation.adapters.sql.orders import OrderRow
from reservation.application.audit.expected_records import order_fields
from reservation.domain import payment
from reservation.domain.events import Event
from reservation.domain.payment import SENTENCES, Attempt, Cause, Outcome, PaymentOutcome, Reason

CODES = ("", "REJECT_CARD_COMPANY", "with:colons")
#: Outcomes that have a cause.
ENDS = [
    PaymentOutcome.DECLINED,
    PaymentOutcome.VOIDED,
    PaymentOutcome.EXPIRED,
    PaymentOutcome.REFUNDED,
]


def test_each_cause_has_a_distinct_sentence() -> None:
    assert SENTENCES.keys() == set(Cause)
    assert len(set(SENTENCES.values())) == len(Cause)


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("outcome", ENDS)
@pytest.mark.parametrize("code", CODES)
def test_a_reason_survives_its_event_and_an_attempt_its_text(
    cause: Cause, outcome: PaymentOutcome, code: str
) -> None:
    reason = Reason(cause, code, "Kim", "a note")
    assert Reason.read(outcome, reason.members()) == reason
    attempt = Attempt(outcome, Reason(cause, code))
    assert Attempt.read(attempt.text()) == attempt


def story(*events: tuple[str, dict[str, Any]]) -> list[Event]:
    return [
        Event(
            sale_id="s",
            seq=seq,
            event=name,
            order_id="s-order",
            at_ms=seq,
            data=msgspec.json.encode(data).decode(),
            chain="",
        )
        for seq, (name, data) in enumerate(events, 2)
    ]


def fields_after(name: str, **data: Any) -> dict[str, str]:
    """The order's hash after a claim and this outcome."""
    claimed = {"from": "HELD", "to": "CONFIRMING", "fence": 1, "paymentKey": "pk"}
    ended = {"from": "CONFIRMING", "to": "RELEASED", "fence": 1, **data}
    row = OrderRow(
        order_id="s-order",
        sale_id="s",
        buyer_id="b",
        status="RELEASED",
        amount=1,
        currency="KRW",
        order_name="n",
        digest="d",
        created_at_ms=0,
        updated_at_ms=3,
        expires_at_ms=1000,
        seq=3,
        fence=1,
        payment_key="pk",
        claimed_at_ms=2,
        lease_until_ms=None,
        due_at_ms=None,
        lines=(),
    )
    return order_fields(row, story(("claimed", claimed), (name, ended)))


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("outcome", ENDS)
def test_a_reworded_sentence_leaves_stored_events_unchanged(
    monkeypatch: pytest.MonkeyPatch, cause: Cause, outcome: PaymentOutcome
) -> None:
    ended = Outcome(name=outcome, reason=Reason(cause, "CODE"))
    assert ended.reason is not None
    said = ended.reason.sentence()
    before = (ended.attempt, ended.event_members, fields_after(outcome, **ended.event_members))
    reworded = MappingProxyType(dict.fromkeys(Cause, "Other words."))
    monkeypatch.setattr(payment, "SENTENCES", reworded)
    after = (ended.attempt, ended.event_members, fields_after(outcome, **ended.event_members))
    assert before == after
    assert ended.reason.sentence() != said


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("outcome", ENDS)
def test_a_rebuilt_attempt_equals_the_one_written_by_finish(
    cause: Cause, outcome: PaymentOutcome
) -> None:
    ended = Outcome(name=outcome, reason=Reason(cause, "CODE"))
    fields = fields_after(outcome, **ended.event_members)
    assert fields.get("attempt:pk", "") == ended.attempt
    assert ("payment_key" in fields) == bool(ended.attempt)


#: Event, cause and attempt as versions before the codes wrote them, with their meaning.
OLD = [
    ("voided", "key of another order", "void:KEY_OF_ANOTHER_ORDER", Cause.KEY_OF_ANOTHER_ORDER, ""),
    (
        "voided",
        "the PG knows no such payment",
        "void:NOT_FOUND_PAYMENT",
        Cause.PAYMENT_NOT_FOUND,
        "",
    ),
    (
        "expired",
        "the PG never approved the payment",
        "expired:never approved",
        Cause.NEVER_APPROVED,
        "",
    ),
    ("expired", "no deposit came", "expired:deposit", Cause.NO_DEPOSIT, ""),
    ("expired", "EXPIRED", "expired:EXPIRED", Cause.PAYMENT_EXPIRED, ""),
    (
        "expired",
        "NOT_FOUND_PAYMENT_SESSION",
        "expired:NOT_FOUND_PAYMENT_SESSION",
        Cause.SESSION_EXPIRED,
        "",
    ),
    ("refunded", "money came after the end", "refunded:too late", Cause.PAID_AFTER_END, ""),
    (
        "refunded",
        "cancelled at the PG",
        "refunded:cancelled at the PG",
        Cause.CANCELLED_AT_PROVIDER,
        "",
    ),
    ("refunded", "amount_mismatch", "refunded:amount_mismatch", Cause.AMOUNT_MISMATCH, ""),
    ("declined", "CANCELED", "declined:CANCELED", Cause.PAYMENT_CANCELLED, ""),
    ("declined", "ABORTED", "declined:ABORTED", Cause.PAYMENT_ABORTED, ""),
    (
        "declined",
        "VIRTUAL_ACCOUNT_NOT_ACCEPTED",
        "declined:VIRTUAL_ACCOUNT_NOT_ACCEPTED",
        Cause.ACCOUNT_NOT_ACCEPTED,
        "",
    ),
    (
        "declined",
        "REJECT_CARD_COMPANY",
        "declined:REJECT_CARD_COMPANY",
        Cause.PROVIDER_DECLINED,
        "REJECT_CARD_COMPANY",
    ),
]


@pytest.mark.parametrize(("event", "said", "attempt", "cause", "code"), OLD)
def test_sentences_of_earlier_versions_are_read_as_codes(
    event: str, said: str, attempt: str, cause: Cause, code: str
) -> None:
    reason = Reason.read(event, {"from": "CONFIRMING", "cause": said})
    assert reason == Reason(cause, code)
    assert Attempt.read(attempt) == Attempt(event, reason)
    assert fields_after(event, cause=said)["attempt:pk"] == Attempt(event, reason).text()


def test_an_unwritten_intent_of_an_earlier_version_leaves_no_attempt() -> None:
    fields = fields_after("voided", cause="the intent could not be written")
    assert not {"payment_key", "attempt:pk"} & fields.keys()
    assert fields["attempts"] == "0"


def test_releases_and_refunds_of_earlier_versions_are_read() -> None:
    page = Reason.read("released", {"from": "HELD", "cause": "payment page: PAY_PROCESS_CANCELED"})
    assert page == Reason(Cause.PAYMENT_PAGE, "PAY_PROCESS_CANCELED")
    refund = Reason.read("refunded", {"from": "CONFIRMED", "cause": "Kim: buyer: changed mind"})
    assert refund == Reason(Cause.OPERATOR, "", "Kim", "buyer: changed mind")
    assert Reason.read("released", {"from": "HELD", "cause": "buyer"}) == Reason(Cause.BUYER)
    assert Reason.read("confirmed", {"from": "CONFIRMING"}) is None


def test_a_cause_of_a_later_version_is_kept_unchanged() -> None:
    later = Reason.read("declined", {"cause": "sanctioned", "providerCode": "X"})
    assert later == Reason("sanctioned", "X")
    assert Attempt.read(Attempt("declined", later).text()) == Attempt("declined", later)
    assert later is not None
    assert later.sentence() == "sanctioned (X)."
