"""Load shapes: the number of buyers at each second, one curve for each scenario."""

from collections.abc import Callable
from typing import Final

__all__ = ["SCENARIOS", "Target", "target_at"]

#: Number of buyers, and how many of them may come or go in a second.
Target = tuple[int, float]

#: Duration of a scenario if no run time is given. A soak needs an explicit one.
DEFAULT_SECONDS: Final = {
    "opening": 60.0,
    "steady": 120.0,
    "soak": 3600.0,
    "stampede": 30.0,
    "sold-out": 60.0,
}


def _opening(passed: float, peak: int) -> Target:
    """All buyers at once; half of them gone after a third, a tail of a fifth to the end."""
    if passed < 1 / 3:
        return peak, peak
    share = 0.5 if passed < 2 / 3 else 0.2
    return max(1, round(peak * share)), max(1.0, peak / 5)


def _steady(passed: float, peak: int) -> Target:
    """A ramp over the first tenth, then a level."""
    if passed < 0.1:
        return max(1, round(peak * passed * 10)), max(1.0, peak / 10)
    return peak, max(1.0, peak / 10)


def _soak(passed: float, peak: int) -> Target:
    """Tides: down to a third and up again, twelve times, so that holds end in quiet and in rush."""
    rising = int(passed * 24) % 2 == 0
    return (peak if rising else max(1, peak // 3)), max(1.0, peak / 20)


def _at_once(passed: float, peak: int) -> Target:
    """All of them in the first second, all of them to the end."""
    del passed
    return peak, peak


SCENARIOS: Final[dict[str, Callable[[float, int], Target]]] = {
    "opening": _opening,
    "steady": _steady,
    "soak": _soak,
    "stampede": _at_once,
    "sold-out": _at_once,
}


def target_at(
    scenario: str, seconds: float, *, peak: int, run_seconds: float | None
) -> Target | None:
    """Buyers at this second, or None when the scenario is over.

    Args:
        scenario: a key of `SCENARIOS`.
        seconds: since the start.
        peak: the most buyers at any time; at least 1.
        run_seconds: the duration; by default the scenario's own.
    """
    length = run_seconds or DEFAULT_SECONDS[scenario]
    if seconds >= length:
        return None
    return SCENARIOS[scenario](seconds / length, peak)
