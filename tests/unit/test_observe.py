"""Log lines about requests: one where something was wrong, and not one for each of a crowd."""

import pytest
import structlog
from structlog.testing import LogCapture

from api import observe


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    """What is logged."""
    captured = LogCapture()
    log = structlog.wrap_logger(None, processors=[captured])
    monkeypatch.setattr(observe, "log", log)
    monkeypatch.setattr(observe, "_lines", observe._Lines())
    return captured


def test_what_fails_or_is_slow_gets_a_line(lines: LogCapture) -> None:
    observe.record("prepareReservation", 201, 0.004, "quick")
    observe.record("prepareReservation", 503, 0.004, "failed")
    observe.record("prepareReservation", 201, 1.5, "slow")
    observe.record("watchStock", 200, 60.0, "waits by design")
    assert [line["request_id"] for line in lines.entries] == ["failed", "slow"]


def test_a_crowd_that_is_turned_away_is_counted_in_the_next_line(
    lines: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "LINES_A_SECOND_MAX", 2)
    seconds = [100.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: seconds[0])
    for number in range(10):
        observe.record("prepareReservation", 503, 0.001, f"r{number}")
    seconds[0] += 1
    observe.record("prepareReservation", 503, 0.001, "later")
    told = [(line["request_id"], line.get("left_out", 0)) for line in lines.entries]
    assert told == [("r0", 0), ("r1", 0), ("later", 8)]
