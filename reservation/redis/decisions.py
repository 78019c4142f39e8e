"""What prepare.lua's words mean: a decision or a refusal for each basket."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from reservation.domain.clock import as_wire
from reservation.domain.errors import (
    AmountMismatch,
    IdempotencyKeyReused,
    InvalidAdmission,
    RateLimited,
    ReservationError,
    SaleClosed,
    SaleNotOpen,
    SalePaused,
    SaleRecovering,
    SkuNotFound,
    Unavailable,
)
from reservation.domain.reservation import Basket, Reservation
from reservation.domain.states import Status
from reservation.redis.outcomes import PrepareWord
from reservation.redis.records import as_items, as_mapping
from reservation.redis.store import limit_exceeded, sold_out

__all__ = ["RETRY_AFTER_SECONDS", "Decision", "Replayed", "decision_of", "looked_up"]

#: What a refused caller is told to wait, in seconds.
RETRY_AFTER_SECONDS: Final = 1


class Replayed(msgspec.Struct, frozen=True):
    """The order stands already, made from the same body."""


Decision = Reservation | Replayed


def decision_of(
    basket: Basket, word: PrepareWord, facts: Sequence[str]
) -> Decision | ReservationError:
    """What the script's word and facts say of this basket."""
    if word is PrepareWord.HELD or word is PrepareWord.PREPARED:
        return _reservation(basket, word, facts)
    return Replayed() if word is PrepareWord.REPLAYED else _refusal(word, facts)


def _reservation(basket: Basket, word: PrepareWord, facts: Sequence[str]) -> Reservation:
    expires_at, seq, created_at, items = facts
    created_at_ms = int(created_at)
    return Reservation(
        order_id=basket.order_id,
        sale_id=basket.sale_id,
        buyer_id=basket.buyer_id,
        status=Status.HELD if word is PrepareWord.HELD else Status.PREPARED,
        lines=as_items(items),
        amount=basket.amount,
        currency=basket.currency,
        order_name=basket.order_name,
        created_at_ms=created_at_ms,
        updated_at_ms=created_at_ms,
        expires_at_ms=int(expires_at),
        seq=int(seq),
    )


def _refusal(word: PrepareWord, facts: Sequence[str]) -> ReservationError:
    match word:
        case PrepareWord.SOLD_OUT:
            return sold_out(facts)
        case PrepareWord.LIMIT_EXCEEDED:
            return limit_exceeded(facts)
        case PrepareWord.AMOUNT_MISMATCH:
            return AmountMismatch(expectedAmount=int(facts[0]))
        case PrepareWord.SKU_NOT_FOUND:
            return SkuNotFound(sku=facts[0])
        case PrepareWord.KEY_REUSED:
            return IdempotencyKeyReused()
        case PrepareWord.NOT_ADMITTED:
            return InvalidAdmission()
        case PrepareWord.RATE_LIMITED:
            return RateLimited(retryAfter=max(1, -(-int(facts[0]) // 1000)))
        case PrepareWord.CLOSED:
            return SaleClosed()
        case PrepareWord.NOT_OPEN:
            return SaleNotOpen(opensAt=as_wire(int(facts[0])))
        case PrepareWord.PAUSED:
            return SalePaused(retryAfter=RETRY_AFTER_SECONDS)
        case PrepareWord.RECOVERING:
            return SaleRecovering(retryAfter=RETRY_AFTER_SECONDS)
        case PrepareWord.TOO_LATE:
            return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        case _:
            raise AssertionError(word)


def looked_up(digest: str, flat: Any) -> Decision | ReservationError:
    """What an order's hash, or none, says of a basket whose reply was lost.

    Whether the lost call took the hold or an earlier one under the same key, nobody can say any
    more: so it is told as a replay, in its present state, and never twice as a new order.
    """
    fields = as_mapping(flat)
    if not fields:
        return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
    if fields["digest"] != digest:
        return IdempotencyKeyReused()
    return Replayed()
