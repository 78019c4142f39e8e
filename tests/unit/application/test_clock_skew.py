"""Clock skew: a jump is detected; slow drift or another server's clock is not a jump."""

import pytest

from reservation.adapters.redis.client import ClockReading
from reservation.application.readiness.clock_skew import DRIFT_MS_MAX, EVEN_SECONDS, Clocks

START_MS = 1_000_000


def reading(
    at: float, *, server_off: int = 0, ours_off: int = 0, took: float = 0.002, run_id: str = "a"
) -> ClockReading:
    """A reading at this second, from clocks with these offsets."""
    return ClockReading(
        sent=at - took,
        received=at,
        our_ms=START_MS + int(at * 1000) + ours_off,
        server_ms=START_MS + int((at - took / 2) * 1000) + server_off,
        run_id=run_id,
    )


def seen(*readings: ClockReading) -> Clocks:
    clocks = Clocks()
    for one in readings:
        clocks.observe(one)
    return clocks


@pytest.mark.parametrize("off", [300, -300, 3_600_000, -3_600_000])
def test_a_redis_clock_jump_is_detected_in_either_direction(off: int) -> None:
    clocks = seen(reading(0), reading(3, server_off=off))
    assert clocks.jumped
    assert not clocks.may_expire


@pytest.mark.parametrize("off", [300, -300])
def test_a_local_clock_jump_is_detected_in_either_direction(off: int) -> None:
    assert seen(reading(0), reading(3, ours_off=off)).jumped


def test_the_monotonic_clock_reveals_a_jump_of_both_clocks() -> None:
    clocks = seen(reading(0), reading(3, server_off=60_000, ours_off=60_000))
    assert clocks.jumped
    assert abs(clocks.offset_ms) < 5


def test_slow_drift_is_not_reported_as_a_jump() -> None:
    # 40 ms a second, the tolerated drift, for a minute.
    clocks = seen(*(reading(at, server_off=40 * at) for at in range(0, 60, 5)))
    assert not clocks.jumped
    assert clocks.offset_ms > 2_000
    assert not clocks.may_expire


def test_the_allowed_drift_grows_between_two_readings() -> None:
    assert not seen(reading(0), reading(50, server_off=8 * DRIFT_MS_MAX)).jumped
    assert seen(reading(0), reading(5, server_off=2 * DRIFT_MS_MAX)).jumped


def test_a_restarted_server_starts_a_new_clock_comparison() -> None:
    clocks = seen(reading(0), reading(3, server_off=400, run_id="b"))
    assert not clocks.jumped
    assert clocks.may_expire


def test_a_jump_is_cleared_after_a_steady_period() -> None:
    clocks = seen(reading(0), reading(3, server_off=900))
    clocks.observe(reading(3 + EVEN_SECONDS / 2, server_off=900))
    assert clocks.jumped
    clocks.observe(reading(3 + EVEN_SECONDS, server_off=900))
    assert not clocks.jumped
    assert clocks.may_expire


def test_a_slow_reply_counts_neither_as_jump_nor_as_offset() -> None:
    # The server answered at once; a busy process reads the reply a second later.
    late = ClockReading(
        sent=3.0, received=4.0, our_ms=START_MS + 4_000, server_ms=START_MS + 3_001, run_id="a"
    )
    clocks = seen(reading(0), late)
    assert not clocks.jumped
    assert abs(clocks.offset_ms) <= 1


@pytest.mark.parametrize(("off", "may"), [(1_990, True), (2_100, False), (-2_100, False)])
def test_a_clock_offset_above_two_seconds_stops_expiry(off: int, may: bool) -> None:
    assert seen(reading(0, server_off=off)).may_expire is may
