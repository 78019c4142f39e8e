"""Judgement: how much was judged, and every promise that was found broken."""

from typing import Final

import msgspec

from reservation.verification.model.violations import Broken

__all__ = ["Found", "Judgement"]

#: Violations that are kept in full; all of them are counted.
FOUND_MAX: Final = 200


class Found(msgspec.Struct, frozen=True):
    """One violation, and the line that shows it."""

    line: int
    name: Broken
    reason: str


class Judgement(msgspec.Struct, kw_only=True, rename="camel"):
    """The counts of one judgement, and its findings."""

    ok: bool = True
    sales: int = 0
    events: int = 0
    operations: int = 0
    #: Answers that were compared with the events, refusals among them.
    answers: int = 0
    refusals: int = 0
    #: Calls whose outcome is unknown, and answers that are not evidence about the sale.
    unknown: int = 0
    not_judged: int = 0
    #: Answers that withheld a payment's outcome, as too few replicas may have had it.
    unacknowledged: int = 0
    heads: int = 0
    #: Orders whose payment was still undecided when the history ends.
    undecided: int = 0
    #: Whether orders in SQL, counters and the PG's ledger were compared with the events too.
    orders_compared: int = 0
    stock_compared: int = 0
    money_compared: int = 0
    violation_count: int = 0
    violations: list[Found] = []

    def found(self, line: int, name: Broken, reason: str) -> None:
        """Count a violation, and keep it while there is room."""
        self.violation_count += 1
        if len(self.violations) < FOUND_MAX:
            self.violations.append(Found(line, name, reason))
