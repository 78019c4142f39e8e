"""The PG's error codes: the verdict about the money, and a decline's message for the buyer.

An unlisted code is Unknown.

Each operation has its own table, because one code may be final for one operation and not for
another: NOT_AVAILABLE_BANK is a final refusal of a confirm, but only postpones a cancel. The HTTP
status never decides alone (PROVIDER_ERROR and INVALID_API_KEY are both 400), with two exceptions
that are both Unknown: a 5xx and a 429 imply nothing about the money, whatever their code.

Sources and the meaning of each class: docs/reference/toss-error-codes.md.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from reservation.domain.payment_gateway import (
    Answer,
    Declined,
    Misconfigured,
    OrderIdUsed,
    PaymentMissing,
    TryAgain,
    Unknown,
)

__all__ = [
    "KEY_REFUSED",
    "SENTENCES",
    "TABLES",
    "Operation",
    "Verdict",
    "answer_of_refusal",
    "decline_sentence",
    "verdict_of",
]


class Operation(StrEnum):
    """An operation of the PG's API."""

    CONFIRM = "confirm"
    LOOK_UP = "look_up"
    CANCEL = "cancel"


class Verdict(StrEnum):
    """The meaning of a listed code."""

    #: A final refusal: this call moved no money.
    DECLINED = "declined"
    #: Our key, our request or our contract: an operator must act.
    OUR_FAULT = "ours"
    #: The order id already has a payment: perhaps this one, from a repeated call.
    USED = "used"
    #: The same call is still running, or was postponed before it began.
    RETRY = "retry"
    #: The PG does not know the payment, or no longer lets it be confirmed.
    MISSING = "missing"
    #: Listed, but implies nothing about the money. Equivalent to an unlisted code; the row
    #: documents that it was considered.
    UNKNOWN = "unknown"


#: Codes of any POST: the PG's front end returns them before the PG reads the payment.
_ENTRANCE = {
    "UNAUTHORIZED_KEY": Verdict.OUR_FAULT,
    "INCORRECT_BASIC_AUTH_FORMAT": Verdict.OUR_FAULT,
    "INVALID_IDEMPOTENCY_KEY": Verdict.OUR_FAULT,
    "IDEMPOTENT_REQUEST_PROCESSING": Verdict.RETRY,
}

#: The PG refuses our API key, for any operation.
KEY_REFUSED = frozenset({"UNAUTHORIZED_KEY", "INCORRECT_BASIC_AUTH_FORMAT", "INVALID_API_KEY"})

_CONFIRM = _ENTRANCE | {
    # The card or the account.
    "INVALID_REJECT_CARD": Verdict.DECLINED,
    "INVALID_STOPPED_CARD": Verdict.DECLINED,
    "INVALID_CARD_EXPIRATION": Verdict.DECLINED,
    "INVALID_CARD_NUMBER": Verdict.DECLINED,
    "INVALID_CARD_LOST_OR_STOLEN": Verdict.DECLINED,
    "RESTRICTED_TRANSFER_ACCOUNT": Verdict.DECLINED,
    "INVALID_ACCOUNT_INFO_RE_REGISTER": Verdict.DECLINED,
    "NOT_ALLOWED_POINT_USE": Verdict.DECLINED,
    "INVALID_PASSWORD": Verdict.DECLINED,
    "REJECT_CARD_COMPANY": Verdict.DECLINED,
    "REJECT_CARD_PAYMENT": Verdict.DECLINED,
    "REJECT_ACCOUNT_PAYMENT": Verdict.DECLINED,
    "REJECT_TOSSPAY_INVALID_ACCOUNT": Verdict.DECLINED,
    # The buyer's limits.
    "EXCEED_MAX_AMOUNT": Verdict.DECLINED,
    "EXCEED_MAX_PAYMENT_AMOUNT": Verdict.DECLINED,
    "EXCEED_MAX_ONE_DAY_AMOUNT": Verdict.DECLINED,
    "EXCEED_MAX_AUTH_COUNT": Verdict.DECLINED,
    "EXCEED_MAX_DAILY_PAYMENT_COUNT": Verdict.DECLINED,
    "EXCEED_MAX_MONTHLY_PAYMENT_AMOUNT": Verdict.DECLINED,
    "EXCEED_MAX_ONE_DAY_WITHDRAW_AMOUNT": Verdict.DECLINED,
    "EXCEED_MAX_ONE_TIME_WITHDRAW_AMOUNT": Verdict.DECLINED,
    # Instalments.
    "EXCEED_MAX_CARD_INSTALLMENT_PLAN": Verdict.DECLINED,
    "INVALID_CARD_INSTALLMENT_PLAN": Verdict.DECLINED,
    "NOT_SUPPORTED_INSTALLMENT_PLAN_CARD_OR_MERCHANT": Verdict.DECLINED,
    "NOT_SUPPORTED_MONTHLY_INSTALLMENT_PLAN": Verdict.DECLINED,
    # The hour, the bank, the fraud screen, the authentication: the buyer starts again.
    "NOT_AVAILABLE_PAYMENT": Verdict.DECLINED,
    "NOT_AVAILABLE_BANK": Verdict.DECLINED,
    "FDS_ERROR": Verdict.DECLINED,
    "INVALID_AUTHORIZE_AUTH": Verdict.DECLINED,
    # Our price, our request, our keys, our contract.
    "BELOW_MINIMUM_AMOUNT": Verdict.OUR_FAULT,
    "INVALID_REQUEST": Verdict.OUR_FAULT,
    "INVALID_API_KEY": Verdict.OUR_FAULT,
    "NOT_FOUND_TERMINAL_ID": Verdict.OUR_FAULT,
    "NOT_REGISTERED_BUSINESS": Verdict.OUR_FAULT,
    "INVALID_UNREGISTERED_SUBMALL": Verdict.OUR_FAULT,
    "UNAPPROVED_ORDER_ID": Verdict.OUR_FAULT,
    "FORBIDDEN_REQUEST": Verdict.OUR_FAULT,
    # No such payment, or its ten minutes are over.
    "NOT_FOUND_PAYMENT": Verdict.MISSING,
    "NOT_FOUND_PAYMENT_SESSION": Verdict.MISSING,
    # Usually our own earlier success, reported to a repeated call.
    "ALREADY_PROCESSED_PAYMENT": Verdict.UNKNOWN,
    "DUPLICATED_ORDER_ID": Verdict.USED,
    # The PG or the card company failed half-way.
    "PROVIDER_ERROR": Verdict.UNKNOWN,
    "CARD_PROCESSING_ERROR": Verdict.UNKNOWN,
    "FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING": Verdict.UNKNOWN,
    "FAILED_INTERNAL_SYSTEM_PROCESSING": Verdict.UNKNOWN,
    "UNKNOWN_PAYMENT_ERROR": Verdict.UNKNOWN,
    "COMMON_ERROR": Verdict.UNKNOWN,
}

_LOOK_UP = {
    "UNAUTHORIZED_KEY": Verdict.OUR_FAULT,
    "INCORRECT_BASIC_AUTH_FORMAT": Verdict.OUR_FAULT,
    "FORBIDDEN_CONSECUTIVE_REQUEST": Verdict.RETRY,
    "NOT_FOUND_PAYMENT": Verdict.MISSING,
    "NOT_FOUND_PAYMENT_SESSION": Verdict.MISSING,
    # A wrong URL rather than a missing payment, and a wrong URL must not end a hold.
    "NOT_FOUND": Verdict.UNKNOWN,
    "NOT_SUPPORTED_MONTHLY_INSTALLMENT_PLAN_BELOW_AMOUNT": Verdict.UNKNOWN,
    "FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING": Verdict.UNKNOWN,
}

_CANCEL = _ENTRANCE | {
    # The refund account.
    "INVALID_REFUND_ACCOUNT_INFO": Verdict.DECLINED,
    "INVALID_REFUND_ACCOUNT_NUMBER": Verdict.DECLINED,
    "INVALID_BANK": Verdict.DECLINED,
    "FORBIDDEN_BANK_REFUND_REQUEST": Verdict.DECLINED,
    # Not allowed by the payment or the contract.
    "EXCEED_CANCEL_AMOUNT_DISCOUNT_AMOUNT": Verdict.DECLINED,
    "INVALID_REQUEST": Verdict.DECLINED,
    "REFUND_REJECTED": Verdict.DECLINED,
    "NOT_CANCELABLE_PAYMENT": Verdict.DECLINED,
    "NOT_CANCELABLE_PAYMENT_FOR_DORMANT_USER": Verdict.DECLINED,
    "EXCEED_MAX_REFUND_DUE": Verdict.DECLINED,
    "EXCEED_CANCEL_LIMIT": Verdict.DECLINED,
    "NOT_ALLOWED_PARTIAL_REFUND": Verdict.DECLINED,
    "NOT_ALLOWED_PARTIAL_REFUND_WAITING_DEPOSIT": Verdict.DECLINED,
    "FORBIDDEN_REQUEST": Verdict.DECLINED,
    "NOT_FOUND_PAYMENT": Verdict.MISSING,
    # Probably an earlier cancel of ours: only the balance can prove it.
    "ALREADY_CANCELED_PAYMENT": Verdict.UNKNOWN,
    "ALREADY_REFUND_PAYMENT": Verdict.UNKNOWN,
    "NOT_CANCELABLE_AMOUNT": Verdict.UNKNOWN,
    "NOT_MATCHES_REFUNDABLE_AMOUNT": Verdict.UNKNOWN,
    # Retry later, after a look-up of the payment.
    "PROVIDER_ERROR": Verdict.UNKNOWN,
    "FORBIDDEN_CONSECUTIVE_REQUEST": Verdict.UNKNOWN,
    "NOT_AVAILABLE_BANK": Verdict.UNKNOWN,
    "FAILED_REFUND_PROCESS": Verdict.UNKNOWN,
    "FAILED_PARTIAL_REFUND": Verdict.UNKNOWN,
    "FAILED_METHOD_HANDLING_CANCEL": Verdict.UNKNOWN,
    "FAILED_INTERNAL_SYSTEM_PROCESSING": Verdict.UNKNOWN,
    "FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING": Verdict.UNKNOWN,
    "COMMON_ERROR": Verdict.UNKNOWN,
}

TABLES: Mapping[Operation, Mapping[str, Verdict]] = MappingProxyType(
    {
        Operation.CONFIRM: MappingProxyType(_CONFIRM),
        Operation.LOOK_UP: MappingProxyType(_LOOK_UP),
        Operation.CANCEL: MappingProxyType(_CANCEL),
    }
)

_CARD: Final = "The card company declined the card. Try another card or payment method."
_LOST: Final = "The card is reported as lost or stolen. Use another card."
_STOPPED: Final = "The card is suspended. Use another card."
_NUMBER: Final = "The card's number or expiry date is wrong."
_PASSWORD: Final = "The card's password is wrong."  # noqa: S105 - a sentence
_ACCOUNT: Final = "The bank declined the account. Try another account or payment method."
_AMOUNT: Final = "The amount is above the limit of the card or account."
_COUNT: Final = "The card or account has reached its limit for today or this month."
_INSTALMENTS: Final = "The card does not support this number of instalments."
_HOUR: Final = "The bank or card company does not accept payments at this hour. Try again later."
_RETRY: Final = "The payment was not authenticated. Start the payment again."
_FRAUD: Final = "The payment provider's fraud check refused the payment."
_ACCOUNTS_OFF: Final = "This sale does not accept virtual accounts. Choose another payment method."
_ORDER_USED: Final = "This order already had another payment. Start a new order."
_CANCELLED: Final = "The payment was cancelled."

#: Every DECLINED code of a confirm, and implied codes.
SENTENCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "INVALID_REJECT_CARD": _CARD,
        "REJECT_CARD_COMPANY": _CARD,
        "REJECT_CARD_PAYMENT": "The card's balance or limit does not cover the amount.",
        "INVALID_STOPPED_CARD": _STOPPED,
        "INVALID_CARD_EXPIRATION": _NUMBER,
        "INVALID_CARD_NUMBER": _NUMBER,
        "INVALID_CARD_LOST_OR_STOLEN": _LOST,
        "INVALID_PASSWORD": _PASSWORD,
        "RESTRICTED_TRANSFER_ACCOUNT": _ACCOUNT,
        "INVALID_ACCOUNT_INFO_RE_REGISTER": _ACCOUNT,
        "REJECT_ACCOUNT_PAYMENT": "The account's balance does not cover the amount.",
        "REJECT_TOSSPAY_INVALID_ACCOUNT": _ACCOUNT,
        "NOT_ALLOWED_POINT_USE": "The card's points cannot be used for this payment.",
        "EXCEED_MAX_AMOUNT": _AMOUNT,
        "EXCEED_MAX_PAYMENT_AMOUNT": _AMOUNT,
        "EXCEED_MAX_ONE_DAY_AMOUNT": _COUNT,
        "EXCEED_MAX_AUTH_COUNT": _COUNT,
        "EXCEED_MAX_DAILY_PAYMENT_COUNT": _COUNT,
        "EXCEED_MAX_MONTHLY_PAYMENT_AMOUNT": _COUNT,
        "EXCEED_MAX_ONE_DAY_WITHDRAW_AMOUNT": _COUNT,
        "EXCEED_MAX_ONE_TIME_WITHDRAW_AMOUNT": _AMOUNT,
        "EXCEED_MAX_CARD_INSTALLMENT_PLAN": _INSTALMENTS,
        "INVALID_CARD_INSTALLMENT_PLAN": _INSTALMENTS,
        "NOT_SUPPORTED_INSTALLMENT_PLAN_CARD_OR_MERCHANT": _INSTALMENTS,
        "NOT_SUPPORTED_MONTHLY_INSTALLMENT_PLAN": _INSTALMENTS,
        "NOT_AVAILABLE_PAYMENT": _HOUR,
        "NOT_AVAILABLE_BANK": _HOUR,
        "FDS_ERROR": _FRAUD,
        "INVALID_AUTHORIZE_AUTH": _RETRY,
        "VIRTUAL_ACCOUNT_NOT_ACCEPTED": _ACCOUNTS_OFF,
        "DUPLICATED_ORDER_ID": _ORDER_USED,
        "CANCELED": _CANCELLED,
        "ABORTED": _CANCELLED,
        "NOT_FOUND_PAYMENT": "The payment provider has no such payment.",
    }
)


def verdict_of(operation: Operation, *, status: int, code: str) -> Verdict:
    """The verdict of a refusal with this status and code."""
    if status == 429 or not 400 <= status < 500:
        return Verdict.UNKNOWN
    verdict = TABLES[operation].get(code, Verdict.UNKNOWN)
    # An attempt may be voided on "missing", so both the code and the status must agree.
    if verdict is Verdict.MISSING and status != 404:
        return Verdict.UNKNOWN
    return verdict


def answer_of_refusal(operation: Operation, *, status: int, code: str, message: str) -> Answer:
    """The gateway's answer to a readable refusal of the PG."""
    # The PG stores a 4xx with the idempotency key and replays it. It returns a 429 and the codes of
    # its front end before it reads the key, and there is no evidence that it stores a 5xx.
    bound = 400 <= status < 500 and status != 429 and code not in _ENTRANCE
    match verdict_of(operation, status=status, code=code):
        case Verdict.DECLINED:
            return Declined(code, message)
        case Verdict.OUR_FAULT:
            return Misconfigured(code, message, key_refused=code in KEY_REFUSED, bound_to_key=bound)
        case Verdict.USED:
            return OrderIdUsed(code)
        case Verdict.RETRY:
            return TryAgain(code)
        case Verdict.MISSING:
            return PaymentMissing(code)
        case Verdict.UNKNOWN:
            return Unknown(f"{status} {code}", bound_to_key=bound)


def decline_sentence(code: str) -> str:
    """The message for this code; a general one for a code that the PG has added since."""
    return SENTENCES.get(code, "The payment was declined. Try another payment method.")
