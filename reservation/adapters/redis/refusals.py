"""Refusals that several scripts return with the same facts."""

from collections.abc import Sequence

from reservation.domain.clock import as_wire
from reservation.domain.errors import BuyerLimitExceeded, SoldOut

__all__ = ["limit_exceeded", "sold_out"]


def sold_out(facts: Sequence[str]) -> SoldOut:
    """The refusal from a script's `{next deadline or "", sku, available, ...}`."""
    available = {facts[i]: int(facts[i + 1]) for i in range(1, len(facts), 2)}
    return SoldOut(available=available, nextDeadline=as_wire(int(facts[0])) if facts[0] else None)


def limit_exceeded(facts: Sequence[str]) -> BuyerLimitExceeded:
    """The refusal from a script's `{sku, limit, taken}`."""
    return BuyerLimitExceeded(sku=facts[0], limit=int(facts[1]), taken=int(facts[2]))
