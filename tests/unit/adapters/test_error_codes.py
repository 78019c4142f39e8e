"""Every row of the table that maps a PG error code to its meaning for the money."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reservation.adapters.toss.error_codes import (
    SENTENCES,
    TABLES,
    Operation,
    Verdict,
    answer_of_refusal,
    decline_sentence,
    verdict_of,
)
from reservation.domain.payment_gateway import (
    Answer,
    Declined,
    Misconfigured,
    OrderIdUsed,
    PaymentMissing,
    TryAgain,
    Unknown,
)

CONFIRM, LOOK_UP, CANCEL = Operation.CONFIRM, Operation.LOOK_UP, Operation.CANCEL

#: A second copy of the table, with the PG's HTTP statuses, so that a slip in the table of the code
#: fails a test. docs/reference/toss-error-codes.md holds the reasons.
ROWS = """
confirm 400 declined INVALID_REJECT_CARD INVALID_STOPPED_CARD INVALID_CARD_EXPIRATION
confirm 400 declined INVALID_CARD_NUMBER INVALID_CARD_LOST_OR_STOLEN EXCEED_MAX_AMOUNT
confirm 400 declined EXCEED_MAX_PAYMENT_AMOUNT EXCEED_MAX_DAILY_PAYMENT_COUNT
confirm 400 declined EXCEED_MAX_MONTHLY_PAYMENT_AMOUNT EXCEED_MAX_ONE_DAY_WITHDRAW_AMOUNT
confirm 400 declined EXCEED_MAX_ONE_TIME_WITHDRAW_AMOUNT EXCEED_MAX_CARD_INSTALLMENT_PLAN
confirm 400 declined INVALID_CARD_INSTALLMENT_PLAN NOT_SUPPORTED_MONTHLY_INSTALLMENT_PLAN
confirm 400 declined NOT_SUPPORTED_INSTALLMENT_PLAN_CARD_OR_MERCHANT NOT_ALLOWED_POINT_USE
confirm 400 declined RESTRICTED_TRANSFER_ACCOUNT INVALID_ACCOUNT_INFO_RE_REGISTER
confirm 400 declined NOT_AVAILABLE_PAYMENT INVALID_AUTHORIZE_AUTH
confirm 403 declined REJECT_CARD_COMPANY REJECT_CARD_PAYMENT REJECT_ACCOUNT_PAYMENT
confirm 403 declined REJECT_TOSSPAY_INVALID_ACCOUNT EXCEED_MAX_AUTH_COUNT INVALID_PASSWORD
confirm 403 declined EXCEED_MAX_ONE_DAY_AMOUNT NOT_AVAILABLE_BANK FDS_ERROR
confirm 400 ours BELOW_MINIMUM_AMOUNT INVALID_REQUEST INVALID_API_KEY NOT_FOUND_TERMINAL_ID
confirm 400 ours NOT_REGISTERED_BUSINESS INVALID_UNREGISTERED_SUBMALL UNAPPROVED_ORDER_ID
confirm 400 ours INVALID_IDEMPOTENCY_KEY
confirm 401 ours UNAUTHORIZED_KEY
confirm 403 ours FORBIDDEN_REQUEST INCORRECT_BASIC_AUTH_FORMAT
confirm 404 missing NOT_FOUND_PAYMENT NOT_FOUND_PAYMENT_SESSION
confirm 409 retry IDEMPOTENT_REQUEST_PROCESSING
confirm 400 used DUPLICATED_ORDER_ID
confirm 400 unknown ALREADY_PROCESSED_PAYMENT PROVIDER_ERROR
confirm 400 unknown CARD_PROCESSING_ERROR
confirm 500 unknown FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING FAILED_INTERNAL_SYSTEM_PROCESSING
confirm 500 unknown UNKNOWN_PAYMENT_ERROR COMMON_ERROR

look_up 401 ours UNAUTHORIZED_KEY
look_up 403 ours INCORRECT_BASIC_AUTH_FORMAT
look_up 403 retry FORBIDDEN_CONSECUTIVE_REQUEST
look_up 404 missing NOT_FOUND_PAYMENT NOT_FOUND_PAYMENT_SESSION
look_up 404 unknown NOT_FOUND
look_up 400 unknown NOT_SUPPORTED_MONTHLY_INSTALLMENT_PLAN_BELOW_AMOUNT
look_up 500 unknown FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING

cancel 400 declined INVALID_REFUND_ACCOUNT_INFO INVALID_REFUND_ACCOUNT_NUMBER INVALID_BANK
cancel 400 declined FORBIDDEN_BANK_REFUND_REQUEST EXCEED_CANCEL_AMOUNT_DISCOUNT_AMOUNT
cancel 400 declined INVALID_REQUEST REFUND_REJECTED
cancel 403 declined NOT_CANCELABLE_PAYMENT NOT_CANCELABLE_PAYMENT_FOR_DORMANT_USER
cancel 403 declined EXCEED_MAX_REFUND_DUE EXCEED_CANCEL_LIMIT NOT_ALLOWED_PARTIAL_REFUND
cancel 403 declined NOT_ALLOWED_PARTIAL_REFUND_WAITING_DEPOSIT FORBIDDEN_REQUEST
cancel 401 ours UNAUTHORIZED_KEY
cancel 403 ours INCORRECT_BASIC_AUTH_FORMAT
cancel 400 ours INVALID_IDEMPOTENCY_KEY
cancel 404 missing NOT_FOUND_PAYMENT
cancel 409 retry IDEMPOTENT_REQUEST_PROCESSING
cancel 400 unknown ALREADY_CANCELED_PAYMENT ALREADY_REFUND_PAYMENT PROVIDER_ERROR
cancel 400 unknown NOT_MATCHES_REFUNDABLE_AMOUNT
cancel 403 unknown NOT_CANCELABLE_AMOUNT FORBIDDEN_CONSECUTIVE_REQUEST NOT_AVAILABLE_BANK
cancel 500 unknown FAILED_REFUND_PROCESS FAILED_PARTIAL_REFUND FAILED_METHOD_HANDLING_CANCEL
cancel 500 unknown FAILED_INTERNAL_SYSTEM_PROCESSING FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING
cancel 500 unknown COMMON_ERROR
"""


def cases() -> list[tuple[Operation, int, str, Verdict]]:
    found: list[tuple[Operation, int, str, Verdict]] = []
    for row in filter(None, ROWS.splitlines()):
        operation, status, verdict, *codes = row.split()
        found += [(Operation(operation), int(status), code, Verdict(verdict)) for code in codes]
    return found


CASES = cases()
LISTED = frozenset(code for table in TABLES.values() for code in table)

codes = st.from_regex(r"[A-Z][A-Z0-9_]{0,40}", fullmatch=True)
#: Refused before the PG reads the idempotency key.
AT_THE_ENTRANCE = {"UNAUTHORIZED_KEY", "INCORRECT_BASIC_AUTH_FORMAT", "INVALID_IDEMPOTENCY_KEY"}

#: The PG refuses the API key, for any operation.
KEY_REFUSED = {"UNAUTHORIZED_KEY", "INCORRECT_BASIC_AUTH_FORMAT", "INVALID_API_KEY"}

statuses = st.integers(100, 599)
operations = st.sampled_from(Operation)


def expected(verdict: Verdict, status: int, code: str) -> Answer:
    return {
        Verdict.DECLINED: Declined(code, "why"),
        Verdict.OUR_FAULT: Misconfigured(
            code,
            "why",
            key_refused=code in KEY_REFUSED,
            bound_to_key=code not in AT_THE_ENTRANCE,
        ),
        Verdict.USED: OrderIdUsed(code),
        Verdict.RETRY: TryAgain(code),
        Verdict.MISSING: PaymentMissing(code),
        Verdict.UNKNOWN: Unknown(f"{status} {code}", bound_to_key=status < 500),
    }[verdict]


@pytest.mark.parametrize(("operation", "status", "code", "verdict"), CASES)
def test_each_error_code_has_its_documented_verdict(
    operation: Operation, status: int, code: str, verdict: Verdict
) -> None:
    assert TABLES[operation][code] is verdict
    answer = answer_of_refusal(operation, status=status, code=code, message="why")
    assert answer == expected(verdict, status, code)


def test_the_test_covers_each_row_of_the_code_table() -> None:
    rows = {(operation, code) for operation, _, code, _ in CASES}
    assert rows == {(operation, code) for operation in TABLES for code in TABLES[operation]}
    assert len(CASES) == len(rows)


def test_the_reference_page_lists_the_same_rows() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "toss-error-codes.md").read_text()
    words = {"try again": Verdict.RETRY} | {verdict.value: verdict for verdict in Verdict}
    for operation, title in ((CONFIRM, "Confirm"), (LOOK_UP, "Look-up"), (CANCEL, "Cancel")):
        section = page.split(f"## {title}\n")[1].split("\n#")[0]
        verdicts: dict[str, Verdict] = {}
        for first, second in re.findall(r"^\| ([a-z][^|]*) \| ([^|]*) \|$", section, re.MULTILINE):
            if first != "class":
                verdict = words[re.split(r"[:,(]", first)[0].strip()]
                verdicts |= dict.fromkeys(re.findall(r"`([A-Z_]+)`", second), verdict)
        assert verdicts == dict(TABLES[operation])


@given(operation=operations, status=statuses, code=codes.filter(lambda code: code not in LISTED))
def test_an_unlisted_code_leaves_the_payment_undecided(
    operation: Operation, status: int, code: str
) -> None:
    answer = answer_of_refusal(operation, status=status, code=code, message="")
    assert isinstance(answer, Unknown)
    assert answer.bound_to_key == (400 <= status < 500 and status != 429)


@given(
    operation=operations,
    status=st.integers(500, 599) | st.integers(200, 399) | st.just(429),
    code=st.sampled_from(sorted(LISTED)),
)
def test_a_listed_code_outside_4xx_or_with_429_stays_undecided(
    operation: Operation, status: int, code: str
) -> None:
    answer = answer_of_refusal(operation, status=status, code=code, message="")
    assert answer == Unknown(f"{status} {code}", bound_to_key=False)


@given(status=st.integers(400, 499).filter(lambda status: status != 404))
def test_a_payment_is_missing_only_if_code_and_status_agree(status: int) -> None:
    assert verdict_of(CONFIRM, status=status, code="NOT_FOUND_PAYMENT") is Verdict.UNKNOWN


@given(operation=operations, code=codes, status=st.integers(400, 499))
def test_every_decline_is_on_the_allow_list(operation: Operation, code: str, status: int) -> None:
    if isinstance(answer_of_refusal(operation, status=status, code=code, message=""), Declined):
        assert (operation, code) in {
            (row[0], row[2]) for row in CASES if row[3] is Verdict.DECLINED
        }


@pytest.mark.parametrize(
    ("code", "confirmed", "cancelled"),
    [
        ("NOT_AVAILABLE_BANK", Verdict.DECLINED, Verdict.UNKNOWN),
        ("INVALID_REQUEST", Verdict.OUR_FAULT, Verdict.DECLINED),
        ("FORBIDDEN_REQUEST", Verdict.OUR_FAULT, Verdict.DECLINED),
    ],
)
def test_the_verdict_of_a_code_depends_on_the_operation(
    code: str, confirmed: Verdict, cancelled: Verdict
) -> None:
    assert TABLES[CONFIRM][code] is confirmed
    assert TABLES[CANCEL][code] is cancelled
    assert code not in TABLES[LOOK_UP]


def test_each_decline_has_a_message_for_the_buyer() -> None:
    declined = {code for code, verdict in TABLES[CONFIRM].items() if verdict is Verdict.DECLINED}
    assert declined <= SENTENCES.keys()
    assert decline_sentence("A_CODE_OF_NEXT_YEAR")
    assert not any("charged" in sentence for sentence in SENTENCES.values())
