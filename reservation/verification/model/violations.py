"""Violations: the promises that a history can break, each by a stable name."""

from enum import StrEnum

__all__ = ["Broken", "Violation"]


class Broken(StrEnum):
    """Which promise a history breaks."""

    #: An event is missing, or occurs twice.
    GAP = "gap"
    REPEATED = "repeated"
    #: The hash does not follow from the one before it.
    CHAIN = "chain"
    UNREADABLE = "unreadable"
    OVERSOLD = "oversold"
    #: Counters that differ from the sum of the events.
    COUNTERS = "counters"
    TRANSITION = "transition"
    #: An order that ended comes to another end.
    SECOND_END = "second_end"
    LIMIT = "limit"
    PRICE = "price"
    UNKNOWN_ORDER = "unknown_order"
    UNKNOWN_ITEM = "unknown_item"
    #: A payment's outcome was written under another fence than its request.
    FENCE = "fence"
    #: Sold without a payment at the PG, or before it was paid.
    UNPAID = "unpaid"
    #: The PG keeps money for an order that is not sold.
    MONEY = "money"
    #: A hold outside of the sale's window, or one that ended before its deadline.
    TIME = "time"
    #: A client got an answer that was true at no moment of its call.
    ANSWER = "answer"
    #: A client got an answer about an event that never happened, or that is lost.
    LOST = "lost"
    #: Answers that contradict the order in which they came.
    REAL_TIME = "real_time"
    #: The final state is not the result of the events.
    FINAL = "final"


class Violation(Exception):
    """One promise that was not kept."""

    def __init__(self, name: Broken, reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.reason = reason
