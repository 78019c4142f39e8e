"""The state of a server by its replies of WAIT: every transition, and any order of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reservation.adapters.redis.replica_acks import (
    OVERDUE_SECONDS,
    SETTLE_SECONDS,
    AckState,
    ReplicaAcks,
)


class HandClock:
    """A clock that advances only by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def now_ms(self) -> int:
        return int(self.seconds * 1000)


def closed(wanted: int = 1) -> ReplicaAcks:
    return ReplicaAcks(wanted, clock=HandClock())


def opened(wanted: int = 1, *, attached: int = 0, clock: HandClock | None = None) -> ReplicaAcks:
    acks = ReplicaAcks(wanted, clock=clock or HandClock())
    acks.begin_life("first:6379")
    acks.end_probe(acks.begin_probe(), max(wanted, attached))
    assert acks.is_open
    return acks


def test_a_server_without_required_replicas_is_always_open() -> None:
    acks = closed(0)
    assert acks.suffices(0, acks.asked)
    acks.fall_short()
    acks.begin_life("first:6379")
    assert acks.is_open
    assert not acks.needs_probe


def test_a_call_from_before_a_probe_does_not_close_the_server_again() -> None:
    """It waited for the replica that has left; the server has opened without it since."""
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    asked = acks.asked
    assert not acks.suffices(1, asked)
    assert not acks.is_open
    clock.seconds += SETTLE_SECONDS
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open
    assert not acks.suffices(1, asked)
    assert acks.is_open
    # One that misses a replica of now closes it.
    assert not acks.suffices(0, acks.asked)
    assert not acks.is_open


def test_a_server_opens_with_its_first_acknowledged_probe() -> None:
    acks = closed(2)
    assert acks.needs_probe
    ticket = acks.begin_probe()
    assert acks.state is AckState.PROBING
    assert not acks.is_open
    assert not acks.needs_probe
    acks.end_probe(ticket, 2)
    assert acks.is_open


@pytest.mark.parametrize("count", [0, 1, None, RuntimeError("UNBLOCKED"), "2"])
def test_a_probe_that_is_not_acknowledged_leaves_the_server_closed(count: Any) -> None:
    acks = closed(2)
    acks.end_probe(acks.begin_probe(), count)
    assert acks.state is AckState.SHORT
    assert acks.needs_probe


@pytest.mark.parametrize("count", [0, 1, None, RuntimeError("UNBLOCKED"), "2"])
def test_too_few_acknowledgements_close_the_server(count: Any) -> None:
    acks = opened(2)
    assert acks.suffices(3, acks.asked)
    assert acks.is_open
    assert not acks.suffices(count, acks.asked)
    assert acks.state is AckState.SHORT


def test_an_acknowledged_change_does_not_open_the_server() -> None:
    acks = opened()
    assert not acks.suffices(0, acks.asked)
    assert acks.suffices(1, acks.asked)
    assert acks.state is AckState.SHORT


def test_a_probe_from_before_a_shortfall_does_not_open_the_server() -> None:
    acks = closed(1)
    ticket = acks.begin_probe()
    assert not acks.suffices(0, acks.asked)
    acks.end_probe(ticket, 1)
    assert acks.state is AckState.SHORT
    later = acks.begin_probe()
    acks.end_probe(ticket, 1)
    assert acks.state is AckState.PROBING
    acks.end_probe(later, 1)
    assert acks.is_open


def test_another_server_requires_a_probe() -> None:
    acks = opened()
    acks.begin_life("second:6379")
    assert acks.state is AckState.SHORT


def test_a_change_waits_for_every_attached_replica() -> None:
    acks = opened(1, attached=2)
    assert acks.asked == 2
    assert acks.suffices(2, acks.asked)
    assert not acks.suffices(1, acks.asked)


def test_a_change_needs_no_replica_that_joined_after_it() -> None:
    acks = opened()
    asked = acks.asked
    acks.note_attached(2)
    assert acks.suffices(1, asked)
    assert acks.is_open


def test_a_server_that_a_replica_left_opens_after_a_failover_would_be_over() -> None:
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    acks.fall_short()
    clock.seconds += SETTLE_SECONDS - 0.1
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.state is AckState.SHORT
    # A later shortfall of a closed server does not count: it serves no hold.
    acks.fall_short()
    clock.seconds += 0.1
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open
    assert acks.asked == 1


def test_a_second_replica_that_leaves_a_closed_server_begins_the_wait_again() -> None:
    clock = HandClock()
    acks = opened(1, attached=3, clock=clock)
    acks.fall_short()
    clock.seconds += SETTLE_SECONDS - 0.1
    acks.end_probe(acks.begin_probe(), 2)
    clock.seconds += 0.2
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.state is AckState.SHORT
    clock.seconds += SETTLE_SECONDS
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open


def test_calls_that_lack_only_the_replica_that_left_do_not_keep_a_server_closed() -> None:
    """Releases and success pages are sent to a closed server, more often than probes."""
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    assert not acks.suffices(1, acks.asked)
    clock.seconds += SETTLE_SECONDS
    ticket = acks.begin_probe()
    assert not acks.suffices(1, acks.asked)
    acks.end_probe(ticket, 1)
    assert acks.is_open


@pytest.mark.parametrize("count", [0, "UNBLOCKED"])
def test_a_call_with_too_few_replicas_outdates_a_probe_in_flight(count: object) -> None:
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    acks.fall_short()
    clock.seconds += SETTLE_SECONDS
    ticket = acks.begin_probe()
    assert not acks.suffices(count, acks.asked)
    acks.end_probe(ticket, 1)
    assert not acks.is_open


def test_a_replica_that_comes_and_goes_does_not_keep_a_server_closed() -> None:
    clock = HandClock()
    acks = opened(1, attached=3, clock=clock)
    acks.fall_short()
    for count in (2, 1, 2, 1):
        clock.seconds += 1
        acks.end_probe(acks.begin_probe(), count)
        assert acks.state is AckState.SHORT
    clock.seconds += 1
    acks.end_probe(acks.begin_probe(), 2)
    assert acks.is_open


def test_sql_waits_for_the_replicas_of_a_closed_server_while_a_failover_may_run() -> None:
    clock = HandClock()
    acks = opened(1, attached=1, clock=clock)
    assert not acks.is_overdue
    for _ in range(2):
        acks.fall_short()
        clock.seconds += OVERDUE_SECONDS - 0.1
        acks.fall_short()
        assert not acks.is_overdue
        clock.seconds += 0.1
        assert acks.is_overdue
        acks.end_probe(acks.begin_probe(), 1)
        assert not acks.is_overdue
    acks.begin_life("another")
    assert not acks.is_overdue


def test_sql_waits_for_no_replica_where_none_must_acknowledge() -> None:
    assert ReplicaAcks(0, clock=HandClock()).is_overdue


def test_a_server_whose_replicas_are_back_opens_at_once() -> None:
    acks = opened(1, attached=2)
    acks.fall_short()
    acks.end_probe(acks.begin_probe(), 2)
    assert acks.is_open


def test_a_promoted_server_opens_with_its_first_replica() -> None:
    acks = opened(1, attached=2)
    acks.fall_short()
    acks.begin_life("second:6379")
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open


def test_a_restarted_server_waits_for_its_replicas_or_a_failover() -> None:
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    acks.begin_life("first:6379")
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.state is AckState.SHORT
    clock.seconds += SETTLE_SECONDS
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open


def test_a_replica_that_joined_is_waited_for_once_it_acknowledges() -> None:
    acks = opened()
    acks.note_listed(1)
    assert not acks.needs_measuring
    acks.note_listed(2)
    for count in (1, None, "UNBLOCKED"):
        assert acks.needs_measuring
        assert acks.probed == 2
        acks.note_attached(count)
        assert acks.asked == 1
    acks.note_attached(2)
    assert acks.asked == 2
    assert not acks.needs_measuring


def test_a_change_that_more_replicas_acknowledge_than_asked_counts_them_all() -> None:
    acks = opened()
    assert acks.suffices(2, acks.asked)
    assert acks.asked == 2


def test_a_promoted_server_waits_for_the_listed_replicas_while_a_failover_may_run() -> None:
    clock = HandClock()
    acks = opened(1, attached=2, clock=clock)
    acks.begin_life("second:6379")
    acks.note_listed(2)
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.state is AckState.SHORT
    clock.seconds += SETTLE_SECONDS
    acks.end_probe(acks.begin_probe(), 1)
    assert acks.is_open


def test_the_replicas_of_another_server_are_not_waited_for() -> None:
    acks = opened(1, attached=2)
    acks.note_listed(3)
    acks.begin_life("second:6379")
    assert (acks.asked, acks.probed) == (1, 1)


def test_only_one_probe_runs_at_a_time() -> None:
    acks = closed(1)
    acks.begin_probe()
    with pytest.raises(RuntimeError, match="probing"):
        acks.begin_probe()


class AnyOrder(RuleBasedStateMachine):
    """Open exactly while a probe was acknowledged that began after the last shortfall.

    By all replicas that acknowledged before or are listed, or by enough once a failover would be
    over.
    """

    @initialize(wanted=st.integers(1, 3))
    def begin(self, wanted: int) -> None:
        self.clock = HandClock()
        self.acks = ReplicaAcks(wanted, clock=self.clock)
        self.tickets: list[tuple[int, bool]] = []
        self.proven = False
        self.attached = self.listed = 0
        self.since = float("-inf")
        self.fewest = 9

    @rule(seconds=st.sampled_from([0.1, 1.0, SETTLE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.clock.seconds += seconds

    @rule(count=st.integers(0, 4))
    def change(self, count: int) -> None:
        enough = count >= max(self.acks.wanted, self.attached)
        assert self.acks.suffices(count, self.acks.asked) == enough
        if enough:
            if self.proven:
                self.attached = max(self.attached, count)
            return
        if self.proven:
            self._fall_short()
        elif count < self._required():
            self._close()
        self._note(count)

    @rule()
    def lose_a_replica(self) -> None:
        self.acks.fall_short()
        self._fall_short()

    @rule(address=st.sampled_from(["first:6379", "second:6379"]))
    def begin_a_life(self, address: str) -> None:
        self.since = self.clock.seconds
        if address != self.acks._address:
            self.attached = self.listed = 0
        self.fewest = 9
        self.acks.begin_life(address)
        self._close()

    def _fall_short(self) -> None:
        if self.proven:
            self.since = self.clock.seconds
            self.fewest = 9
        self._close()

    def _required(self) -> int:
        over = self.clock.seconds - self.since >= SETTLE_SECONDS
        return self.acks.wanted if over else max(self.acks.wanted, self.attached, self.listed)

    def _note(self, count: int) -> None:
        if count < self.fewest < 9:
            self.since = self.clock.seconds
        self.fewest = min(count, self.fewest)

    def _close(self) -> None:
        self.proven = False
        self.tickets = [(ticket, False) for ticket, _ in self.tickets]

    @precondition(lambda self: self.acks.needs_probe)
    @rule()
    def probe(self) -> None:
        self.tickets.append((self.acks.begin_probe(), True))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), count=st.one_of(st.none(), st.integers(0, 4)))
    def end_a_probe(self, data: st.DataObject, count: int | None) -> None:
        ticket, current = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        self.acks.end_probe(ticket, count)
        if current and count is not None:
            self._note(count)
        if current and count is not None and count >= self._required():
            self.proven, self.attached = True, count

    @rule(count=st.integers(0, 4))
    def list_replicas(self, count: int) -> None:
        self.listed = count
        self.acks.note_listed(count)

    @rule(count=st.integers(0, 4))
    def measure(self, count: int) -> None:
        self.acks.note_attached(count)
        if self.proven:
            self.attached = max(self.attached, count)

    @invariant()
    def open_only_when_proven(self) -> None:
        assert self.acks.is_open == self.proven
        assert self.acks.asked == max(self.acks.wanted, self.attached)


TestAnyOrder = AnyOrder.TestCase


@given(counts=st.lists(st.integers(0, 3), max_size=20))
def test_without_a_probe_no_series_of_changes_opens_the_server(counts: list[int]) -> None:
    acks = closed(1)
    for count in counts:
        acks.suffices(count, acks.asked)
        assert not acks.is_open
