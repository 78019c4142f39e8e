"""Outbox events: one per change, numbered without a gap, chained by hash.

A stream entry `rsv:{S}:outbox` has the id `SEQ-0` and the fields `event`, `order`, `at` (Unix ms),
`data` (JSON) and `chain`. Each chain value covers the one before it, so a flipped byte, a lost
tail or an edited entry is detected (docs/reference/events.md).
"""

import hashlib
from enum import StrEnum

import msgspec

__all__ = ["GENESIS", "Event", "EventName", "chain_of"]

#: The chain value before a sale's first event.
GENESIS = ""

#: Copied for each event: a new hash object would look its algorithm up each time.
_EMPTY = hashlib.sha1(usedforsecurity=False)


class EventName(StrEnum):
    """Event types. docs/reference/events.md describes the `data` of each."""

    SALE_PUT = "sale_put"
    SALE_SWITCHED = "sale_switched"
    RESTOCKED = "restocked"
    LENT = "lent"
    BORROWED = "borrowed"
    REBUILT = "rebuilt"
    PREPARED = "prepared"
    CLAIMED = "claimed"
    TAKEN_OVER = "taken_over"
    CONFIRMED = "confirmed"
    AWAITING_DEPOSIT = "awaiting_deposit"
    DECLINED = "declined"
    VOIDED = "voided"
    RELEASED = "released"
    EXPIRED = "expired"
    REFUNDED = "refunded"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a sale's outbox."""

    sale_id: str
    seq: int
    event: str
    #: Empty for the sale's own events.
    order_id: str
    at_ms: int
    #: JSON text exactly as the script wrote it: the chain covers these bytes.
    data: str
    chain: str


def chain_of(previous: str, seq: int, event: str, order_id: str, at_ms: int, data: str) -> str:
    """The chain value of an event: SHA-1 in hex, the only hash that Lua has inside Redis."""
    text = f"{previous}|{seq}|{event}|{order_id}|{at_ms}|{data}"
    chain = _EMPTY.copy()
    chain.update(text.encode())
    return chain.hexdigest()
