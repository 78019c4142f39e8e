"""Losses: the events that an unacknowledged failover may lose, and the answers to their buyers.

A promoted replica may lack the last events of a sale. The sale is then closed and rebuilt from SQL,
which writes a `rebuilt` event. Answers between the last event in SQL before the loss and that event
may be about lost events: nothing remains to judge them by. Everything else is judged as usual. A
hold without an event is allowed only before such a `rebuilt` event, and its buyer must get
`hold_lost`; or the answer that its payment is undecided, where SQL has an intent.
"""

from collections.abc import Iterable, Sequence

import msgspec

from reservation.verification.model.history_format import (
    DECODER,
    EventLine,
    Head,
    History,
    Operation,
)
from reservation.verification.model.response_checks import is_uninformative

__all__ = ["Losses", "Span", "separated"]

#: Clocks are read in whole milliseconds.
_SLACK_NS = 2_000_000
_REBUILT = "rebuilt"


class Span(msgspec.Struct, frozen=True):
    """The time of one loss, on the clock of the calls: from the fork to the rebuild."""

    since_ns: int
    until_ns: int

    def meets(self, since_ns: int, until_ns: int) -> bool:
        return since_ns <= self.until_ns and until_ns >= self.since_ns


class Losses(msgspec.Struct, kw_only=True):
    """The recording without the calls that nothing remains to judge by."""

    calls: list[Operation | Head]
    spans: list[Span]
    #: Orders that were answered with 201 and have no event.
    lost: list[str]
    #: Answers left out.
    unjudged: int

    @property
    def longest_seconds(self) -> float:
        """The longest time from a fork to its rebuild."""
        return max(((one.until_ns - one.since_ns) / 1e9 for one in self.spans), default=0.0)


def separated(past: bytes, calls: Iterable[Operation | Head], now: History) -> Losses:
    """Separate the calls of the lost time from the others.

    Args:
        past: the output of `reservation history`.
        calls: the clients' calls and the heads.
        now: the same moment on both clocks.
    """
    events = [one for one in DECODER.decode_lines(past) if isinstance(one, EventLine)]
    recorded = list(calls)
    rebuilt = [number for number, event in enumerate(events) if event.event == _REBUILT]
    if not rebuilt:
        return Losses(calls=recorded, spans=[], lost=[], unjudged=0)
    prepared = {one.order: one.seq for one in events if one.event == "prepared"}
    created = [one for one in recorded if isinstance(one, Operation) and _is_created(one)]
    gone = [one for one in created if prepared.get(one.order) != one.seq]
    spans = _spans(events, rebuilt, gone, now)
    last_ns = spans[-1].until_ns
    losable = {id(one) for one in gone if one.invoked_ns <= last_ns}
    lost_orders = {one.order for one in gone if id(one) in losable}
    kept: list[Operation | Head] = []
    unjudged = 0
    for call in recorded:
        if id(call) in losable:
            continue
        if isinstance(call, Operation) and call.order in lost_orders and _is_undecided(call):
            unjudged += 1
            continue
        sure = isinstance(call, Operation) and _is_created(call)
        until_ns = call.answered_ns or call.invoked_ns
        if not sure and any(span.meets(call.invoked_ns, until_ns) for span in spans):
            unjudged += isinstance(call, Operation) and _says_something(call)
            continue
        kept.append(call)
    lost = [one.order for one in gone if id(one) in losable and one.order not in prepared]
    return Losses(calls=kept, spans=spans, lost=lost, unjudged=unjudged)


def _is_created(call: Operation) -> bool:
    return call.operation == "prepare" and call.status == 201 and not call.replayed and call.seq > 0


def _says_something(call: Operation) -> bool:
    """Whether the answer would have been judged."""
    return call.answered_ns is not None and call.status != 0 and not is_uninformative(call)


def _is_undecided(call: Operation) -> bool:
    """Whether the answer says that the order's payment is undecided."""
    return call.reported == "CONFIRMING" or call.code == "payment_in_progress"


def _spans(
    events: Sequence[EventLine], rebuilt: Sequence[int], gone: Sequence[Operation], now: History
) -> list[Span]:
    """The time of each loss: it begins with the first call that has no event, at the latest."""
    spans: list[Span] = []
    before_ns = min((one.invoked_ns for one in gone), default=0) - 1
    for number in rebuilt:
        until_ns = _monotonic_ns(events[number].at, now) + _SLACK_NS
        fork_ns = _monotonic_ns(events[number - 1].at, now) if number else 0
        first_ns = [one.invoked_ns for one in gone if before_ns < one.invoked_ns <= until_ns]
        spans.append(Span(min([fork_ns, *first_ns]) - _SLACK_NS, until_ns))
        before_ns = until_ns
    return spans


def _monotonic_ns(at_ms: int, now: History) -> int:
    return now.monotonic_ns + (at_ms - now.unix_ms) * 1_000_000
