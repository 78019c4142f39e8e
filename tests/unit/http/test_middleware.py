"""Request logs: a line for each slow or failed request, rate limited for a crowd."""

import asyncio

import pytest
import structlog
from structlog.testing import LogCapture

from api.http import middleware as observe
from reservation.telemetry.log_rate_limit import LogRateLimit
from reservation.telemetry.metrics import HTTP_SECONDS


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    """The logged lines."""
    captured = LogCapture()
    log = structlog.wrap_logger(None, processors=[captured])
    monkeypatch.setattr(observe, "log", log)
    monkeypatch.setattr(observe, "_lines", LogRateLimit(observe.LINES_A_SECOND_MAX))
    return captured


async def test_failed_and_slow_requests_are_logged(lines: LogCapture) -> None:
    observe.record("prepareReservation", 201, 0.004, "quick")
    observe.record("prepareReservation", 503, 0.004, "failed")
    observe.record("prepareReservation", 201, 1.5, "slow")
    observe.record("watchStock", 200, 60.0, "waits by design")
    assert [line["request_id"] for line in lines.entries] == ["failed", "slow"]


async def test_a_failure_logs_a_warning_except_for_readiness_probes(lines: LogCapture) -> None:
    observe.record("prepareReservation", 503, 0.004, "failed")
    observe.record("ready", 503, 0.004, "not ready yet")
    observe.record("prepareReservation", 201, 1.5, "slow")
    observe.record("ready", 200, 1.5, "slow probe")
    logged = [(line["request_id"], line["log_level"]) for line in lines.entries]
    assert logged == [("failed", "warning"), ("slow", "info"), ("slow probe", "info")]


async def test_omitted_log_lines_are_counted_in_the_next_one(
    lines: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [100.0]
    monkeypatch.setattr(observe, "_lines", LogRateLimit(2, clock=lambda: seconds[0]))
    for number in range(10):
        observe.record("prepareReservation", 503, 0.001, f"r{number}")
    seconds[0] += 1
    observe.record("prepareReservation", 503, 0.001, "later")
    logged = [(line["request_id"], line.get("suppressed", 0)) for line in lines.entries]
    assert logged == [("r0", 0), ("r1", 0), ("later", 8)]


async def test_batched_metrics_equal_individual_ones() -> None:
    seconds = [0.0, 0.001, 0.0011, 0.3, 0.3, 30.0, 31.0]
    one_by_one, together = "oneByOne", "together"
    for each in seconds:
        HTTP_SECONDS.labels(one_by_one, "200").observe(each)
        observe.record(together, 200, each, "id")
    observe.record(together, 409, 0.1, "id")
    assert counted(together) == {}
    await asyncio.sleep(0)
    assert counted(together)["200"] == counted(one_by_one)["200"]
    assert counted(together)["409"]["_count"] == 1
    # The next iteration's counts are added.
    observe.record(together, 200, 0.5, "id")
    await asyncio.sleep(0)
    assert counted(together)["200"]["_count"] == len(seconds) + 1


def counted(operation: str) -> dict[str, dict[str, float]]:
    """The histogram of an operation, by status."""
    logged: dict[str, dict[str, float]] = {}
    for sample in next(iter(HTTP_SECONDS.collect())).samples:
        name = sample.name.removeprefix("reservation_http_request_seconds")
        if sample.labels["operation"] == operation and name != "_created":
            of_status = logged.setdefault(sample.labels["status"], {})
            of_status[name + sample.labels.get("le", "")] = sample.value
    return logged
