"""A head is evidence only if its server was still the master later."""

from reservation.verification.model.history_format import Head
from tests.faults.chaos.master_heads import DOUBT_SECONDS, Mastership, certified

DOUBT_NS = int(DOUBT_SECONDS * 1e9)


def head(at_ns: int) -> Head:
    return Head(sale="s", invoked_ns=at_ns, answered_ns=at_ns + 1, seq=7)


def test_the_last_heads_of_a_former_master_are_no_evidence() -> None:
    """Its successor may have taken events since, even when it answers the observer much later."""
    masters = [Mastership("a", 0, 2 * DOUBT_NS), Mastership("b", 9 * DOUBT_NS, 11 * DOUBT_NS)]
    before, doubtful, after = head(DOUBT_NS), head(DOUBT_NS + 1), head(9 * DOUBT_NS)
    assert certified([before, doubtful, after], masters) == [before, after]


def test_the_last_heads_of_an_observation_are_no_evidence() -> None:
    """A failover may have begun that the observer never detected."""
    masters = [Mastership("a", 0, 2 * DOUBT_NS)]
    assert certified([head(DOUBT_NS + 1)], masters) == []


def test_without_a_failover_the_heads_before_the_last_seconds_are_evidence() -> None:
    masters = [Mastership("a", 0, 2 * DOUBT_NS)]
    heads = [head(at_ns) for at_ns in (0, 1, DOUBT_NS)]
    assert certified(heads, masters) == heads
