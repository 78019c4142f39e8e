"""Rate limits: the burst, the steady rate, and a bound on memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reservation.domain import rate_limit as rate
from reservation.domain.rate_limit import Limiter, Rate


def test_a_rate_has_a_sustained_interval() -> None:
    assert Rate(20, 1).interval_ms == 50
    assert Rate(60, 60).interval_ms == 1000


def test_a_burst_is_accepted_up_to_the_rate() -> None:
    limiter = Limiter(Rate(3, 3))
    assert [limiter.wait("a", 10.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limiter.wait("a", 10.0) == pytest.approx(1.0)


def test_a_refused_call_is_not_counted() -> None:
    limiter = Limiter(Rate(1, 1))
    limiter.wait("a", 0.0)
    waits = [limiter.wait("a", 0.5) for _ in range(5)]
    assert waits == [pytest.approx(0.5)] * 5
    assert limiter.wait("a", 1.0) == 0.0


def test_a_call_after_retry_after_is_accepted() -> None:
    limiter = Limiter(Rate(7, 3))
    now = 0.0
    for _ in range(50):
        if wait := limiter.wait("a", now):
            # Rounding may leave a tiny remainder to wait for.
            now += wait + 1e-9
            assert limiter.wait("a", now) == 0.0


def test_a_peek_does_not_count_as_a_call() -> None:
    limiter = Limiter(Rate(2, 2))
    assert all(limiter.is_free("a", 0.0) for _ in range(5))
    assert limiter.wait("a", 0.0) == 0.0
    assert limiter.is_free("a", 0.0)
    assert limiter.wait("a", 0.0) == 0.0
    assert not limiter.is_free("a", 0.5)
    assert limiter.is_free("a", 1.0)


def test_each_caller_has_a_separate_bucket() -> None:
    limiter = Limiter(Rate(1, 60))
    assert limiter.wait("a", 0.0) == 0.0
    assert limiter.wait("b", 0.0) == 0.0
    assert limiter.wait("a", 0.0) > 0


@given(
    st.integers(1, 20),
    st.integers(1, 60),
    st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=100),
)
def test_no_sliding_window_exceeds_the_rate(
    count: int, per_seconds: int, pauses: list[float]
) -> None:
    limiter = Limiter(Rate(count, per_seconds))
    now, admitted = 0.0, []
    for pause in pauses:
        now += pause
        if limiter.wait("a", now) == 0.0:
            admitted.append(now)
    for first, begin in enumerate(admitted):
        for last in range(first, len(admitted)):
            stretch = admitted[last] - begin
            # A burst of `count`, plus the steady rate over the interval.
            assert last - first + 1 <= count + stretch * count / per_seconds + 1e-6


def test_callers_with_a_full_bucket_are_evicted_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rate, "CALLERS_MAX", 3)
    limiter = Limiter(Rate(1, 10))
    limiter.wait("long ago", 0.0)
    limiter.wait("lately", 15.0)
    limiter.wait("just now", 16.0)
    assert limiter.wait("new", 17.0) == 0.0
    assert limiter.wait("lately", 17.0) > 0, "still in the bucket's debt"
    assert limiter.wait("long ago", 17.0) == 0.0


def test_many_distinct_callers_do_not_grow_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rate, "CALLERS_MAX", 10)
    limiter = Limiter(Rate(1, 3600))
    for number in range(1000):
        assert limiter.wait(f"name-{number}", 1.0) == 0.0
        assert len(limiter._arrivals) <= 10
