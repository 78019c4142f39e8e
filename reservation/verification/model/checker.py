"""History checker: folds the events once and checks every answer against them.

The outbox is the order in which everything happened, so no search is needed: an answer that names
an event is compared with it, and every other one must have been possible at some moment of its
call.
"""

from collections.abc import Iterable

from reservation.verification.model.history_format import (
    VERSION,
    End,
    EventLine,
    Head,
    History,
    MoneyLine,
    Operation,
    OrderLine,
    Record,
    StockLine,
)
from reservation.verification.model.report import Judgement
from reservation.verification.model.sale_checker import SaleChecker

__all__ = ["HistoryChecker", "NotAHistory"]


class NotAHistory(Exception):
    """The lines are not a whole history."""


class HistoryChecker:
    """Receives the lines of a history in order; returns its judgement at the end."""

    def __init__(self) -> None:
        self.judgement = Judgement()
        self._history: History | None = None
        self._sales: dict[str, SaleChecker] = {}

    def add_all(self, first: int, records: Iterable[Record]) -> None:
        """Add consecutive lines; `first` is the number of the first.

        Raises:
            NotAHistory: one of them is out of place.
        """
        line, sales = first, self._sales
        try:
            for line, record in enumerate(records, first):
                # Nearly every line is one: the check here saves a call for each.
                if isinstance(record, EventLine) and record.sale in sales:
                    sales[record.sale].event(line, record)
                else:
                    self.add(line, record)
        except NotAHistory as error:
            raise NotAHistory(f"line {line}: {error}") from error

    def add(self, line: int, record: Record) -> None:
        """Add one line.

        Raises:
            NotAHistory: it is out of place.
        """
        if isinstance(record, History):
            self._begin(record)
            return
        sale = self._sale(record.sale)
        match record:
            case EventLine():
                sale.event(line, record)
            case Operation() | Head() if sale.begun:
                raise NotAHistory("an operation follows the events of its sale")
            case Operation():
                sale.operation(line, record)
            case Head():
                sale.head(line, record)
            case OrderLine():
                sale.order(line, record)
            case StockLine():
                sale.stock(line, record)
            case MoneyLine():
                sale.money(line, record)
            case End():
                sale.end(line, record)

    def finish(self) -> Judgement:
        """The history is complete.

        Raises:
            NotAHistory: it was cut off.
        """
        if self._history is None:
            raise NotAHistory("the file is empty")
        cut_off = [name for name, sale in self._sales.items() if not sale.ended]
        if cut_off:
            raise NotAHistory(f"it is truncated: no end of {cut_off[0]}")
        self.judgement.sales = len(self._sales)
        self.judgement.ok = not self.judgement.violation_count
        return self.judgement

    def _begin(self, record: History) -> None:
        if self._history is not None:
            raise NotAHistory("a second first line")
        if record.version != VERSION:
            raise NotAHistory(f"version {record.version} is not supported, only {VERSION}")
        self._history = record

    def _sale(self, sale_id: str) -> SaleChecker:
        if self._history is None:
            raise NotAHistory("its first line must be of kind history")
        found = self._sales.get(sale_id)
        if found is None:
            clock = self._history.unix_ms - self._history.monotonic_ns // 1_000_000
            found = self._sales[sale_id] = SaleChecker(
                self.judgement, clock, replicas_acknowledge=self._history.replicas_acknowledge
            )
        return found
