"""Answers to the buyers: the last one for each order, collected from every process."""

from collections import Counter
from typing import Any, Final

import msgspec

from reservation.verification.model.history_format import Operation

__all__ = ["Answers", "LastAnswer"]

#: Orders whose last answer is kept: some hours of a soak, in some hundred megabytes. The verdict
#: reports later ones as unchecked.
ORDERS_MAX: Final = 1_000_000
#: Calls that are recorded: an hour of a soak, in a gigabyte. The verdict reports later ones as
#: unjudged.
OPERATIONS_MAX: Final = 2_000_000
#: Wrong answers that are kept in full; all of them are counted.
WRONG_MAX: Final = 100


class LastAnswer(msgspec.Struct, frozen=True):
    """The last answer to a buyer about an order."""

    #: `held` after a prepare, `asked` while an answer is pending, else its end.
    word: str
    amount: int


class Report(msgspec.Struct, kw_only=True):
    """The answers of one process since its last report."""

    orders: dict[str, LastAnswer] = {}
    lives: dict[str, int] = {}
    wrong: list[str] = []
    wrong_count: int = 0
    sandbox_url: str = ""
    operations: list[Operation] = []


class Answers:
    """Collects words in the process of the buyers; merges reports in the verdict's process."""

    def __init__(self) -> None:
        self.orders: dict[str, LastAnswer] = {}
        #: How the buyers' lives ended.
        self.lives: Counter[str] = Counter()
        #: Answers that no service may give, whatever the books say.
        self.wrong: list[str] = []
        self.wrong_count = 0
        self.unchecked = 0
        #: The PG's address, known from the first order.
        self.sandbox_url = ""
        #: Every call with its answer, where the run is recorded.
        self.operations: list[Operation] = []
        self.unrecorded = 0

    def record(self, operation: Operation) -> None:
        """A call for the history checker."""
        if len(self.operations) < OPERATIONS_MAX:
            self.operations.append(operation)
        else:
            self.unrecorded += 1

    def say(self, order: dict[str, Any], word: str) -> None:
        """The last word about an order; a later one takes its place."""
        order_id: str = order["orderId"]
        if order_id not in self.orders and len(self.orders) >= ORDERS_MAX:
            self.unchecked += 1
            return
        self.orders[order_id] = LastAnswer(word, order["amount"])

    def accuse(self, what: str) -> None:
        """An answer that violates the contract."""
        self.wrong_count += 1
        if len(self.wrong) < WRONG_MAX:
            self.wrong.append(what)

    def take(self) -> bytes:
        """Everything since the last take; clears it."""
        report = Report(
            orders=self.orders,
            lives=dict(self.lives),
            wrong=self.wrong,
            wrong_count=self.wrong_count,
            sandbox_url=self.sandbox_url,
            operations=self.operations,
        )
        self.orders, self.wrong, self.wrong_count = {}, [], 0
        self.operations = []
        self.lives.clear()
        return msgspec.msgpack.encode(report)

    def merge(self, data: bytes) -> bool:
        """Merge the report of another process; returns whether it had any content."""
        report = msgspec.msgpack.decode(data, type=Report)
        room = ORDERS_MAX - len(self.orders)
        new = [order_id for order_id in report.orders if order_id not in self.orders]
        for order_id in new[max(room, 0) :]:
            del report.orders[order_id]
            self.unchecked += 1
        self.orders |= report.orders
        self.lives.update(report.lives)
        self.wrong += report.wrong[: WRONG_MAX - len(self.wrong)]
        self.wrong_count += report.wrong_count
        self.sandbox_url = report.sandbox_url or self.sandbox_url
        for operation in report.operations:
            self.record(operation)
        return bool(report.orders or report.lives)
