"""Sale checker: judges the calls, the events and the final state of one sale."""

from bisect import bisect_left, bisect_right
from heapq import heappop, heappush
from itertools import accumulate
from typing import Final

import msgspec

from reservation.verification.model.final_state import Books
from reservation.verification.model.history_format import (
    End,
    EventLine,
    Head,
    MoneyLine,
    Operation,
    OrderLine,
    StockLine,
)
from reservation.verification.model.report import Judgement
from reservation.verification.model.response_checks import (
    is_accepted,
    is_refusal,
    is_uninformative,
    objection,
    status_mismatch,
    waits_for,
)
from reservation.verification.model.sale_state import Order, SaleState
from reservation.verification.model.violations import Broken, Violation

__all__ = ["SaleChecker"]

#: A number above that of any event.
NEVER: Final = 1 << 62


class Windows:
    """Each call in numbers of events: from the head before it to the head after it.

    The heads that calls have seen bound those of all other calls.
    """

    def __init__(self) -> None:
        self._at_least: list[tuple[int, int]] = []
        self._at_most: list[tuple[int, int]] = []
        self._at_least_ns: list[int] = []
        self._at_most_ns: list[int] = []
        self._at_least_seq: list[int] = []
        self._at_most_seq: list[int] = []

    def reached(self, at_ns: int, seq: int) -> None:
        """From this time on the head is at least here."""
        self._at_least.append((at_ns, seq))

    def not_past(self, at_ns: int, seq: int) -> None:
        """Until this time the head was here at most."""
        self._at_most.append((at_ns, seq))

    def close(self) -> None:
        """The history is complete."""
        self._at_least.sort()
        self._at_most.sort()
        self._at_least_ns = [at_ns for at_ns, _ in self._at_least]
        self._at_most_ns = [at_ns for at_ns, _ in self._at_most]
        self._at_least_seq = list(accumulate((seq for _, seq in self._at_least), max))
        later = accumulate((seq for _, seq in reversed(self._at_most)), min)
        self._at_most_seq = list(later)[::-1]

    def of(self, invoked_ns: int, answered_ns: int) -> tuple[int, int]:
        """The first and the last number that the head may have had during a call."""
        before = bisect_right(self._at_least_ns, invoked_ns)
        after = bisect_left(self._at_most_ns, answered_ns)
        first = self._at_least_seq[before - 1] if before else 0
        last = self._at_most_seq[after] if after < len(self._at_most_seq) else NEVER
        return first, last


class _Case(msgspec.Struct, eq=False, gc=False):
    """An answer that must have been possible at some moment of its call."""

    line: int
    operation: Operation
    first: int
    last: int
    done: bool = False


class SaleChecker:
    """Receives the lines of one sale in order.

    Args:
        judgement: receives the counts and the findings.
        clock_ms: the lag of the history's monotonic clock behind Unix time, in milliseconds.
        replicas_acknowledge: whether a payment's outcome is 202 until replicas acknowledge it.
    """

    def __init__(self, judgement: Judgement, clock_ms: int, *, replicas_acknowledge: bool) -> None:
        self.begun = self.ended = False
        self._judgement = judgement
        self._clock_ms = clock_ms
        self._replicas_acknowledge = replicas_acknowledge
        self._state = SaleState()
        self._books = Books(judgement)
        self._calls: list[tuple[int, Operation]] = []
        self._heads: list[tuple[int, Head]] = []
        self._windows = Windows()
        #: The call that returned each new order.
        self._acknowledged: dict[str, tuple[int, Operation]] = {}
        #: Calls still to begin, the latest first; open calls, by end and by the change they wait
        #: for.
        self._coming: list[_Case] = []
        self._closing: list[tuple[int, int, _Case]] = []
        self._waiting: dict[str, list[_Case]] = {}
        #: The number of the next event that needs more than the fold.
        self._next = NEVER

    def operation(self, line: int, operation: Operation) -> None:
        """A call, before the first event."""
        self._judgement.operations += 1
        self._calls.append((line, operation))

    def head(self, line: int, head: Head) -> None:
        """A head seen from outside, before the first event."""
        self._judgement.heads += 1
        self._heads.append((line, head))

    def event(self, line: int, event: EventLine) -> None:
        """The next event: check it, apply it, and judge the answers of its moment."""
        if not self.begun:
            self._begin()
        self._judgement.events += 1
        state, name, order_id, seq = self._state, event.event, event.order, event.seq
        data = event.data
        try:
            state.follow(seq, name, order_id, event.at, data, event.chain)
        except Violation as broken:
            self._judgement.found(line, broken.name, broken.reason)
            if broken.name is Broken.REPEATED:
                return
        try:
            order = state.apply(name, order_id, event.at, data)
        except Violation as broken:
            self._judgement.found(line, broken.name, f"event {seq}: {broken.reason}")
            order = state.orders.get(order_id)
        if name == "prepared" and order is not None and self._acknowledged:
            self._match(order_id, order, seq)
        if self._closing:
            self._try_again(order_id, order)
        if seq >= self._next:
            self._judge(seq)

    def order(self, line: int, order: OrderLine) -> None:
        """An order as SQL has it."""
        self._books.order(line, order)

    def stock(self, line: int, stock: StockLine) -> None:
        """An item as it was at the end."""
        self._books.stock(line, stock)

    def money(self, line: int, money: MoneyLine) -> None:
        """An entry of the PG's ledger."""
        self._books.money(line, money)

    def end(self, line: int, end: End) -> None:
        """The sale's last line."""
        if not self.begun:
            self._begin()
        self.ended = True
        seq, found = self._state.seq, self._judgement.found
        if end.seq != seq:
            found(line, Broken.GAP, f"the history ends at {end.seq}, its last event is {seq}")
        self._judge(NEVER)
        for prepare_line, operation in self._acknowledged.values():
            order = operation.order
            found(
                prepare_line, Broken.LOST, f"{order}: acknowledged to its buyer, but has no event"
            )
        self._books.close(line, end, self._state)

    def _begin(self) -> None:
        """All calls are known: compute the window of each."""
        self.begun = True
        windows = self._windows
        for _, head in self._heads:
            windows.reached(head.answered_ns, head.seq)
            windows.not_past(head.invoked_ns, head.seq)
        for line, call in self._calls:
            self._expect(line, call)
        windows.close()
        self._heads.sort(key=lambda one: one[1].seq, reverse=True)
        for line, head in self._heads:
            first, last = windows.of(head.invoked_ns, head.answered_ns)
            if not first <= head.seq <= last:
                reason = (
                    f"the head is {head.seq}, other calls observed {first} before it and {last} "
                    "after it"
                )
                self._judgement.found(line, Broken.REAL_TIME, reason)
        for line, call in self._calls:
            self._open(line, call)
        self._calls.clear()
        self._coming.sort(key=lambda case: case.first, reverse=True)
        self._update_closing()

    def _expect(self, line: int, call: Operation) -> None:
        """A new order, returned to its buyer: its event is expected, and bounds the other calls."""
        created = call.operation == "prepare" and call.status == 201 and not call.replayed
        if not created or call.answered_ns is None:
            return
        if call.order in self._acknowledged:
            reason = f"{call.order} is reported as a new order twice"
            self._judgement.found(line, Broken.ANSWER, reason)
            return
        self._acknowledged[call.order] = line, call
        if call.seq:
            self._windows.reached(call.answered_ns, call.seq)
            self._windows.not_past(call.invoked_ns, call.seq - 1)

    def _open(self, line: int, call: Operation) -> None:
        judgement = self._judgement
        if call.answered_ns is None or call.status == 0 or call.code == "outcome_unknown":
            judgement.unknown += 1
            return
        if call.order in self._acknowledged and self._acknowledged[call.order][0] == line:
            judgement.answers += 1
            return
        if is_uninformative(call):
            judgement.not_judged += 1
            return
        judgement.answers += 1
        judgement.refusals += is_refusal(call)
        first, last = self._windows.of(call.invoked_ns, call.answered_ns)
        if first > last:
            reason = (
                f"{call.operation}: sent after event {first}, answered with the state of event "
                f"{last} or earlier"
            )
            judgement.found(line, Broken.REAL_TIME, reason)
            return
        self._coming.append(_Case(line, call, first, last))

    def _match(self, order_id: str, order: Order, seq: int) -> None:
        """Compare a new order's event with the answer to its buyer."""
        reported = self._acknowledged.pop(order_id, None)
        if reported is None:
            return
        line, call = reported
        found = self._judgement.found
        lines = [(sku, quantity) for sku, quantity, _ in order.lines]
        answered = call.seq or seq, call.amount, call.buyer, sorted(call.lines)
        happened = seq, order.amount, order.buyer, sorted(lines)
        wrong = [] if answered == happened else _differences(answered, happened)
        answered_ms = (call.answered_ns or 0) // 1_000_000 + self._clock_ms
        # An answer with a long delay may report the hold as expired by then.
        mismatch = status_mismatch(order, call.reported, answered_ms)
        if mismatch:
            wrong.append(mismatch)
        if wrong:
            found(line, Broken.ANSWER, f"{order_id}: {'; '.join(wrong)}")
        first, last = self._windows.of(call.invoked_ns, call.answered_ns or call.invoked_ns)
        if not first < seq <= last:
            reason = f"{order_id} is event {seq}, its call lies between events {first} and {last}"
            found(line, Broken.REAL_TIME, reason)

    def _judge(self, seq: int) -> None:
        """Check the answers given at this moment against the sale."""
        last = self._state.seq
        while self._coming and self._coming[-1].first <= seq:
            case = self._coming.pop()
            if case.first > last:
                reason = f"answered after event {case.first}, the history ends at {last}"
                self._judgement.found(case.line, Broken.LOST, reason)
            elif not self._possible(case):
                for key in waits_for(self._state, case.operation):
                    self._waiting.setdefault(key, []).append(case)
                heappush(self._closing, (case.last, case.line, case))
        while self._closing and self._closing[0][0] <= seq:
            self._close(heappop(self._closing)[2])
        if not self._closing:
            self._waiting.clear()
        while self._heads and self._heads[-1][1].seq <= seq:
            self._compare(*self._heads.pop())
        self._update_closing()

    def _update_closing(self) -> None:
        coming = self._coming[-1].first if self._coming else NEVER
        closing = self._closing[0][0] if self._closing else NEVER
        head = self._heads[-1][1].seq if self._heads else NEVER
        self._next = min(coming, closing, head)

    def _try_again(self, order_id: str, order: Order | None) -> None:
        """Retry the cases that wait for a change by this event."""
        keys = [order_id]
        if order is not None:
            keys += [f"buyer:{order.buyer}", *(f"sku:{sku}" for sku, _, _ in order.lines)]
        for key in keys:
            cases = self._waiting.get(key)
            if not cases:
                continue
            left = [case for case in cases if not case.done and not self._possible(case)]
            if left:
                self._waiting[key] = left
            else:
                del self._waiting[key]

    def _possible(self, case: _Case) -> bool:
        case.done = not self._objection(case)
        return case.done

    def _is_unacknowledged(self, case: _Case) -> bool:
        """Whether the answer withholds an outcome that too few replicas have."""
        known = case.operation.order in self._state.orders
        return self._replicas_acknowledge and known and is_accepted(case.operation)

    def _objection(self, case: _Case) -> str:
        answered_ms = (case.operation.answered_ns or 0) // 1_000_000 + self._clock_ms
        return objection(self._state, case.operation, answered_ms)

    def _close(self, case: _Case) -> None:
        """End a call: report its answer if it was impossible at every moment of the call."""
        against = "" if case.done else self._objection(case)
        case.done = True
        if not against:
            return
        if self._is_unacknowledged(case):
            self._judgement.unacknowledged += 1
            return
        call = case.operation
        last = min(case.last, self._state.seq)
        reason = (
            f"{call.operation} {call.order}: {call.status} {call.code or call.reported} at no "
            f"moment from event {case.first} to {last}: {against}"
        )
        self._judgement.found(case.line, Broken.ANSWER, reason)

    def _compare(self, line: int, head: Head) -> None:
        """Counters that were read from outside at exactly this number."""
        if head.seq > self._state.seq:
            reason = f"event {head.seq} was observed, the history ends at {self._state.seq}"
            self._judgement.found(line, Broken.LOST, reason)
            return
        if head.seq < self._state.seq:
            # The event of this number is missing, which is already reported.
            return
        for sku, row in head.stock.items():
            item = self._state.items.get(sku)
            if item is None or item.row != row:
                reason = f"{sku} at event {head.seq}: observed {row}, expected {item and item.row}"
                self._judgement.found(line, Broken.COUNTERS, reason)


def _differences(answered: tuple[object, ...], happened: tuple[object, ...]) -> list[str]:
    """The differences between the answer about a new order and its event."""
    names = "number", "amount", "buyer", "lines"
    return [
        f"{name} reported as {reported!r}, expected {true!r}"
        for name, reported, true in zip(names, answered, happened, strict=True)
        if reported != true
    ]
