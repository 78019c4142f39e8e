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
def test_a_jump_of_redis_clock_is_noticed_either_way(off: int) -> None:
    clocks = seen(reading(0), reading(3, server_off=off))
    assert clocks.jumped
    assert not clocks.may_expire


@pytest.mark.parametrize("off", [300, -300])
def test_a_jump_of_our_own_clock_is_noticed_either_way(off: int) -> None:
    assert seen(reading(0), reading(3, ours_off=off)).jumped


def test_both_clocks_jumping_together_are_noticed_by_the_monotonic_one() -> None:
    clocks = seen(reading(0), reading(3, server_off=60_000, ours_off=60_000))
    assert clocks.jumped
    assert abs(clocks.offset_ms) < 5


def test_slow_drift_is_no_jump() -> None:
    # 40 ms a second, the tolerated drift, for a minute.
    clocks = seen(*(reading(at, server_off=40 * at) for at in range(0, 60, 5)))
    assert not clocks.jumped
    assert clocks.offset_ms > 2_000
    assert not clocks.may_expire


def test_the_allowed_drift_grows_between_two_readings() -> None:
    assert not seen(reading(0), reading(50, server_off=8 * DRIFT_MS_MAX)).jumped
    assert seen(reading(0), reading(5, server_off=2 * DRIFT_MS_MAX)).jumped


def test_another_life_of_the_server_has_another_clock() -> None:
    clocks = seen(reading(0), reading(3, server_off=400, run_id="b"))
    assert not clocks.jumped
    assert clocks.may_expire


def test_a_jump_is_over_once_the_clocks_went_evenly_for_long_enough() -> None:
    clocks = seen(reading(0), reading(3, server_off=900))
    clocks.observe(reading(3 + EVEN_SECONDS / 2, server_off=900))
    assert clocks.jumped
    clocks.observe(reading(3 + EVEN_SECONDS, server_off=900))
    assert not clocks.jumped
    assert clocks.may_expire


def test_a_slow_answer_is_neither_a_jump_nor_an_offset() -> None:
    # The server answered at once; a busy process reads the reply a second later.
    late = ClockReading(
        sent=3.0, received=4.0, our_ms=START_MS + 4_000, server_ms=START_MS + 3_001, run_id="a"
    )
    clocks = seen(reading(0), late)
    assert not clocks.jumped
    assert abs(clocks.offset_ms) <= 1


@pytest.mark.parametrize(("off", "may"), [(1_990, True), (2_100, False), (-2_100, False)])
def test_nothing_is_expired_by_clocks_that_differ_by_over_two_seconds(off: int, may: bool) -> None:
    assert seen(reading(0, server_off=off)).may_expire is may
