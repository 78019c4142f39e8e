"""The result words of the scripts, as in their headers, and the results that they stand for."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from reservation.domain.clock import as_wire
from reservation.domain.errors import (
    BuyerLimitExceeded,
    PartitionDry,
    ReservationExpired,
    SoldOut,
)
from reservation.domain.payment import Claimed, Present
from reservation.domain.states import Status

__all__ = [
    "RETRY_AFTER_SECONDS",
    "AddTombstonesWord",
    "AuditWord",
    "BorrowWord",
    "ClaimWord",
    "ExpireWord",
    "FinishWord",
    "LeaseWord",
    "LendAgainWord",
    "LendWord",
    "PrepareWord",
    "PutSaleWord",
    "ReadingWord",
    "RefundWord",
    "ReleaseWord",
    "RemakeWord",
    "ReopenWord",
    "RestockWord",
    "RestoreOrderWord",
    "RestoreWord",
    "RetireWord",
    "SwitchWord",
    "TouchWord",
    "available_in",
    "claim_answer",
    "dry",
    "limit_exceeded",
    "sold_out",
]

#: Retry-After of a refused caller, in seconds.
RETRY_AFTER_SECONDS: Final = 1


class PrepareWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    TOMBSTONES = "tombstones"
    REPLAYED = "replayed"
    TOO_MANY_ORDERS = "too_many_orders"
    RATE_LIMITED = "rate_limited"
    SKU_NOT_FOUND = "sku_not_found"
    KEY_REUSED = "key_reused"
    NOT_ADMITTED = "not_admitted"
    CLOSED = "closed"
    NOT_OPEN = "not_open"
    PAUSED = "paused"
    AMOUNT_MISMATCH = "amount_mismatch"
    DUE = "due"
    AGAIN = "again"
    LIMIT_EXCEEDED = "limit_exceeded"
    SOLD_OUT = "sold_out"
    DRY = "dry"
    HELD = "held"
    PREPARED = "prepared"


class LendWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    LENT = "lent"
    OVERTAKEN = "overtaken"
    DUE = "due"
    DRY = "dry"


class LendAgainWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    DONE = "done"
    SHORT = "short"
    LENT = "lent"


class BorrowWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    DONE = "done"
    TOMBSTONES = "tombstones"
    SKU_NOT_FOUND = "sku_not_found"
    HELD = "held"
    PREPARED = "prepared"
    BORROWED = "borrowed"


class ReadingWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    READING = "reading"


class ClaimWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    NOT_FOUND = "not_found"
    CLAIMED = "claimed"
    PRESENT = "present"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    EXPIRED = "expired"
    DUE = "due"
    LIMIT_EXCEEDED = "limit_exceeded"
    SOLD_OUT = "sold_out"
    DRY = "dry"


class LeaseWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    NOT_FOUND = "not_found"
    TAKEN = "taken"
    STALE = "stale"
    LEASED = "leased"
    MOVED = "moved"


class FinishWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    NOT_FOUND = "not_found"
    DONE = "done"
    LOST = "lost"
    STALE = "stale"


class ReleaseWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    NOT_FOUND = "not_found"
    RELEASED = "released"
    PRESENT = "present"


class ExpireWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    SETTLED = "settled"
    NOT_DUE = "not_due"
    EXPIRED = "expired"


class RefundWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    NOT_FOUND = "not_found"
    REFUNDED = "refunded"
    PRESENT = "present"


class PutSaleWord(StrEnum):
    TOO_LATE = "too_late"
    EXISTS = "exists"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    DONE = "done"
    CHANGED = "changed"
    FIXED = "fixed"
    TOTAL_TOO_LOW = "total_too_low"
    ITEM_IN_USE = "item_in_use"


class RestockWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    DONE = "done"
    KEY_REUSED = "key_reused"
    SKU_NOT_FOUND = "sku_not_found"
    INSUFFICIENT = "insufficient"
    TOO_MANY = "too_many"


class RetireWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    NOT_ENDED = "not_ended"
    OPEN = "open"
    BEHIND = "behind"
    DONE = "done"


class SwitchWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    DONE = "done"
    CLOSED = "closed"


class RestoreWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    DONE = "done"


class AddTombstonesWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    DONE = "done"


class RestoreOrderWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    WENT_BACK = "went_back"
    PRESENT = "present"
    NOT_FOUND = "not_found"
    DIFFERS = "differs"
    DONE = "done"


class RemakeWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    DONE = "done"
    ITEM_GONE = "item_gone"
    DUE = "due"
    LIMIT_EXCEEDED = "limit_exceeded"
    SOLD_OUT = "sold_out"
    DRY = "dry"


class ReopenWord(StrEnum):
    TOO_LATE = "too_late"
    RECOVERING = "recovering"
    DONE = "done"


class TouchWord(StrEnum):
    NOT_FOUND = "not_found"
    DONE = "done"


class AuditWord(StrEnum):
    NOT_FOUND = "not_found"
    CHANGED = "changed"
    COUNTERS = "counters"


def sold_out(facts: Sequence[str]) -> SoldOut:
    """The refusal from a script's `{next deadline or "", sku, available, ...}`."""
    next_deadline = as_wire(int(facts[0])) if facts[0] else None
    return SoldOut(available=available_in(facts), nextDeadline=next_deadline)


def available_in(facts: Sequence[str]) -> dict[str, int]:
    """The units by SKU in a script's `{next deadline or "", sku, available, ...}`."""
    return {facts[i]: int(facts[i + 1]) for i in range(1, len(facts), 2)}


def dry(facts: Sequence[str]) -> PartitionDry:
    """The refusal of a partition from the same facts."""
    return PartitionDry(available=available_in(facts), retryAfter=RETRY_AFTER_SECONDS)


def limit_exceeded(facts: Sequence[str]) -> BuyerLimitExceeded:
    """The refusal from a script's `{sku, limit, taken}`."""
    return BuyerLimitExceeded(sku=facts[0], limit=int(facts[1]), taken=int(facts[2]))


def claim_answer(word: ClaimWord, facts: Sequence[str], claim_id: str) -> Claimed | Present:
    """The script's answer to a claim, except `due`, which its caller repeats.

    Raises:
        SoldOut, PartitionDry, BuyerLimitExceeded, ReservationExpired: nothing was claimed.
    """
    match word:
        case ClaimWord.CLAIMED:
            return Claimed(int(facts[0]), int(float(facts[1])), claim_id)
        case ClaimWord.PRESENT:
            return Present(Status(facts[0]), facts[1])
        case ClaimWord.EXPIRED:
            raise ReservationExpired
        case ClaimWord.ATTEMPTS_EXHAUSTED:
            raise ReservationExpired("This order has no payment attempts left; start a new order.")
        case ClaimWord.LIMIT_EXCEEDED:
            raise limit_exceeded(facts)
        case ClaimWord.SOLD_OUT:
            raise sold_out(facts)
        case ClaimWord.DRY:
            raise dry(facts)
        case (
            ClaimWord.TOO_LATE
            | ClaimWord.RECOVERING
            | ClaimWord.WENT_BACK
            | ClaimWord.NOT_FOUND
            | ClaimWord.DUE
        ):
            raise AssertionError(word)
