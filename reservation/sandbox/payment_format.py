"""Payment format: the fields and formats of the PG's API, version 2022-11-16."""

from datetime import timedelta, timezone

from reservation.domain.clock import as_datetime
from reservation.sandbox.refusals import Refusal
from reservation.sandbox.state_records import Cancellation, Entry, PaymentRecord

__all__ = ["KST", "MERCHANT_ID", "payment_view", "time_text", "transaction_view"]

KST = timezone(timedelta(hours=9))
MERCHANT_ID = "tsandbox"

#: The PG names the means of payment in Korean.
_METHODS = {"card": "카드", "virtual_account": "가상계좌"}

#: Of any payment of the sandbox, which has one card only.
_CARD = {
    "issuerCode": "61",
    "acquirerCode": "31",
    "number": "12345678****789*",
    "installmentPlanMonths": 0,
    "approveNo": "00000000",
    "useCardPoint": False,
    "cardType": "신용",
    "ownerType": "개인",
    "acquireStatus": "READY",
    "isInterestFree": False,
    "interestPayer": None,
}

_ALWAYS: dict[str, object] = {
    "version": "2022-11-16",
    "mId": MERCHANT_ID,
    "type": "NORMAL",
    "country": "KR",
    "useEscrow": False,
    "cultureExpense": False,
    "taxFreeAmount": 0,
    "taxExemptionAmount": 0,
    "transfer": None,
    "mobilePhone": None,
    "giftCertificate": None,
    "cashReceipt": None,
    "cashReceipts": None,
    "discount": None,
    "easyPay": None,
    "metadata": None,
    "receipt": None,
    "checkout": None,
}


def time_text(ms: int | None) -> str | None:
    """An instant in the PG's format: Korean time with its offset, whole seconds."""
    if ms is None:
        return None
    return as_datetime(ms).astimezone(KST).replace(microsecond=0).isoformat()


def payment_view(record: PaymentRecord, *, now_ms: int) -> dict[str, object]:
    """The Payment object."""
    vat = record.balance_amount // 11
    paid_by_card = record.method == "card" and record.approved_at_ms is not None
    return _ALWAYS | {
        "paymentKey": record.payment_key,
        "orderId": record.order_id,
        "orderName": record.order_name,
        "status": record.status,
        "method": None if record.method is None else _METHODS[record.method],
        "currency": record.currency,
        "totalAmount": record.total_amount,
        "balanceAmount": record.balance_amount,
        "suppliedAmount": record.balance_amount - vat,
        "vat": vat,
        "requestedAt": time_text(record.requested_at_ms),
        "approvedAt": time_text(record.approved_at_ms),
        "lastTransactionKey": record.last_transaction_key,
        "isPartialCancelable": True,
        "card": {"amount": record.total_amount} | _CARD if paid_by_card else None,
        "virtualAccount": _virtual_account(record, now_ms=now_ms),
        "secret": record.secret if record.approved_at_ms or record.due_at_ms else None,
        "cancels": [_cancel_view(cancel) for cancel in record.cancels] or None,
        "failure": _failure(record),
    }


def transaction_view(entry: Entry, record: PaymentRecord) -> dict[str, object]:
    """One line of the PG's list of transactions."""
    return {
        "mId": MERCHANT_ID,
        "transactionKey": entry.transaction_key,
        "paymentKey": entry.payment_key,
        "orderId": entry.order_id,
        "method": None if record.method is None else _METHODS[record.method],
        "customerKey": record.customer_key,
        "useEscrow": False,
        "receiptUrl": None,
        "status": _TRANSACTION_STATUS.get(entry.kind, record.status),
        "transactionAt": time_text(entry.at_ms),
        "currency": record.currency,
        "amount": entry.amount,
    }


_TRANSACTION_STATUS = {
    "charge": "DONE",
    "deposit": "DONE",
    "deposit_reversed": "WAITING_FOR_DEPOSIT",
}


def _virtual_account(record: PaymentRecord, *, now_ms: int) -> dict[str, object] | None:
    if record.due_at_ms is None:
        return None
    refunded = bool(record.cancels) and record.approved_at_ms is not None
    return {
        "accountType": "일반",
        "accountNumber": f"X{int(record.payment_key[-12:], 16) % 10**14:014d}",
        "bankCode": "20",
        "customerName": "샌드박스",
        "depositorName": "",
        "dueDate": time_text(record.due_at_ms),
        # The PG sends nothing when the due date passes: this is the only place where it shows.
        "expired": record.status == "WAITING_FOR_DEPOSIT" and now_ms >= record.due_at_ms,
        "settlementStatus": "INCOMPLETED",
        "refundStatus": record.account_refund or ("PENDING" if refunded else "NONE"),
        "refundReceiveAccount": None,
    }


def _cancel_view(cancel: Cancellation) -> dict[str, object]:
    return {
        "transactionKey": cancel.transaction_key,
        "cancelReason": cancel.reason,
        "cancelAmount": cancel.amount,
        "refundableAmount": cancel.refundable_after,
        "canceledAt": time_text(cancel.at_ms),
        "cancelStatus": "DONE",
        "taxFreeAmount": 0,
        "taxExemptionAmount": 0,
        "transferDiscountAmount": 0,
        "easyPayDiscountAmount": 0,
        "receiptKey": None,
        "cancelRequestId": None,
    }


def _failure(record: PaymentRecord) -> dict[str, str] | None:
    if record.failure is None:
        return None
    return {"code": record.failure, "message": Refusal(record.failure).message}
