"""The buyer's message for a declined payment, by the PG's code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["SENTENCES", "decline_sentence"]

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

#: Every DECLINED code of a confirm (`reservation.adapters.toss.error_codes`), and implied codes.
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


def decline_sentence(code: str) -> str:
    """The message for this code; a general one for a code that the PG has added since."""
    return SENTENCES.get(code, "The payment was declined. Try another payment method.")
