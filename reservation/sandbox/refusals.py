"""The PG's refusals: each code with its HTTP status, and a sentence where the PG's own is known."""

from typing import Final

__all__ = ["Refusal", "status_of"]

_UNNAMED: Final = "요청을 처리할 수 없습니다."
_REFUSED: Final = "결제가 거절되었습니다."

#: Codes whose status is not 400.
_STATUS: Final = {
    "UNAUTHORIZED_KEY": 401,
    "EXCEED_CANCEL_LIMIT": 403,
    "EXCEED_MAX_AUTH_COUNT": 403,
    "EXCEED_MAX_ONE_DAY_AMOUNT": 403,
    "EXCEED_MAX_REFUND_DUE": 403,
    "FDS_ERROR": 403,
    "FORBIDDEN_CONSECUTIVE_REQUEST": 403,
    "FORBIDDEN_REQUEST": 403,
    "INCORRECT_BASIC_AUTH_FORMAT": 403,
    "INVALID_PASSWORD": 403,
    "NOT_ALLOWED_PARTIAL_REFUND": 403,
    "NOT_ALLOWED_PARTIAL_REFUND_WAITING_DEPOSIT": 403,
    "NOT_AVAILABLE_BANK": 403,
    "NOT_CANCELABLE_AMOUNT": 403,
    "NOT_CANCELABLE_PAYMENT": 403,
    "NOT_CANCELABLE_PAYMENT_FOR_DORMANT_USER": 403,
    "REJECT_ACCOUNT_PAYMENT": 403,
    "REJECT_CARD_COMPANY": 403,
    "REJECT_CARD_PAYMENT": 403,
    "REJECT_TOSSPAY_INVALID_ACCOUNT": 403,
    "NOT_FOUND": 404,
    "NOT_FOUND_PAYMENT": 404,
    "NOT_FOUND_PAYMENT_SESSION": 404,
    "IDEMPOTENT_REQUEST_PROCESSING": 409,
    "TOO_MANY_REQUESTS": 429,
    "COMMON_ERROR": 500,
    "FAILED_INTERNAL_SYSTEM_PROCESSING": 500,
    "FAILED_METHOD_HANDLING_CANCEL": 500,
    "FAILED_PARTIAL_REFUND": 500,
    "FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING": 500,
    "FAILED_REFUND_PROCESS": 500,
    "UNKNOWN_PAYMENT_ERROR": 500,
}

_MESSAGES: Final = {
    "ALREADY_CANCELED_PAYMENT": "이미 취소된 결제 입니다.",
    "ALREADY_PROCESSED_PAYMENT": "이미 처리된 결제 입니다.",
    "DUPLICATED_ORDER_ID": "이미 승인 및 취소가 진행된 중복된 주문번호 입니다.",
    "EXPIRED_PAYMENT": "결제 시간이 만료되었습니다.",
    "FORBIDDEN_REQUEST": "허용되지 않은 요청입니다.",
    "IDEMPOTENT_REQUEST_PROCESSING": "이전 멱등 요청이 처리중입니다.",
    "INCORRECT_BASIC_AUTH_FORMAT": "잘못된 요청입니다. ':' 를 포함해 인코딩해주세요.",
    "INVALID_REQUEST": "잘못된 요청입니다.",
    "NOT_CANCELABLE_AMOUNT": "취소 할 수 없는 금액 입니다.",
    "NOT_CANCELABLE_PAYMENT": "취소 할 수 없는 결제 입니다.",
    "NOT_FOUND": "존재하지 않는 정보 입니다.",
    "NOT_FOUND_PAYMENT": "존재하지 않는 결제 정보 입니다.",
    "NOT_FOUND_PAYMENT_SESSION": "결제 시간이 만료되어 결제 진행 데이터가 존재하지 않습니다.",
    "PAY_PROCESS_ABORTED": "결제 진행 중 승인에 실패하여 결제가 중단되었습니다.",
    "PAY_PROCESS_CANCELED": "사용자에 의해 결제가 취소되었습니다.",
    "REJECT_CARD_COMPANY": "결제 승인이 거절되었습니다.",
    "REJECT_CARD_PAYMENT": "한도초과 혹은 잔액부족으로 결제에 실패했습니다.",
    "UNAUTHORIZED_KEY": "인증되지 않은 시크릿 키 혹은 클라이언트 키 입니다.",
}


class Refusal(Exception):
    """A refusal of the PG.

    Args:
        code: the PG's code.
        message: its message; that of the code if absent.
    """

    def __init__(self, code: str, message: str | None = None) -> None:
        self.code = code
        self.status = status_of(code)
        self.message = message or _MESSAGES.get(
            code, _REFUSED if self.status in {400, 403} else _UNNAMED
        )
        super().__init__(code)


def status_of(code: str) -> int:
    """The HTTP status that the PG gives with a code."""
    return _STATUS.get(code, 400)
