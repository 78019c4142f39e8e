"""Each alert rule, evaluated by promtool: it fires at the first occurrence, and not before."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from reservation.domain.alarms import TICKETS, Alarm
from tests.support.programs import find

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[3]
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0][
    "rules"
]
#: promtool's input: one sample each minute from minute 0 on.
MINUTES = 40
#: The minute of the first occurrence.
AT = 20
#: promtool's clock begins at 0.
HAPPENED = AT * 60


def series(name: str, *values: float | str) -> dict[str, str]:
    """A series with these values, the last one until the end."""
    listed = [str(value) for value in values]
    return {"series": name, "values": " ".join([*listed, f"{listed[-1]}x{MINUTES - len(listed)}"])}


def step(name: str, before: float, after: float, *, by: float = 0) -> dict[str, str]:
    """A series that changes at `AT`; from then on it grows by `by` a minute."""
    grown = f"{after}+{by}x{MINUTES - AT}" if by else f"{after}x{MINUTES - AT}"
    return {"series": name, "values": f"{before}x{AT - 1} {grown}"}


def beats(*, until: int) -> dict[str, str]:
    """A worker that sends heartbeats until this minute."""
    values = [str(min(minute, until) * 60) for minute in range(MINUTES)]
    return {"series": "reservation_worker_beat_timestamp_seconds", "values": " ".join(values)}


def raised(alarm: str, *, before: float = 0) -> dict[str, str]:
    """An alarm that is raised at `AT`."""
    name = f'reservation_alarm_raised_timestamp_seconds{{alarm="{alarm}"}}'
    return step(name, before, HAPPENED)


UNDER_WAY = 'reservation_undecided_payments{sale="s"}'
ENDED = 'reservation_payment_outcomes_total{outcome="confirmed"}'
REQUESTS = "reservation_http_request_seconds_count"
SLOW = 'reservation_http_request_seconds_bucket{operation="prepareReservation",le='

#: Alert -> the occurrence, and the minutes until the alert fires.
FIRES: dict[str, tuple[list[dict[str, str]], int]] = {
    "ServiceDown": ([step('up{job="reservation-api"}', 1, 0)], 1),
    "WorkerSilent": ([beats(until=AT)], 3),
    "SalesUnserved": (
        [
            series('reservation_worker_sales{job="a"}', 50),
            step('reservation_worker_sales{job="b"}', 50, 0),
            series("reservation_sales", 100),
        ],
        1,
    ),
    "PrepareClosed": ([step('reservation_prepare_closed{reason="redis-disk"}', 0, 1)], 1),
    "EventsLost": ([step("reservation_lost_events_total", 0, 3)], 0),
    "OutboxOld": ([step('reservation_outbox_oldest_seconds{sale="s"}', 0, 61, by=60)], 1),
    "OutboxLong": ([step('reservation_outbox_backlog_events{sale="s"}', 0, 500_001)], 0),
    "PaymentsUndecided": ([step(UNDER_WAY, 0, 1), series(ENDED, 0)], 7),
    "RefundsPending": ([step("reservation_pending_refunds_oldest_seconds", 0, 901)], 0),
    "WebhooksSilent": ([step(ENDED, 0, 1), series("reservation_webhooks_total", 0)], 16),
    "Errors": (
        [
            step(f'{REQUESTS}{{status="503"}}', 0, 60, by=60),
            step(f'{REQUESTS}{{status="201"}}', 0, 60, by=60),
        ],
        2,
    ),
    "PrepareSlow": (
        [
            step(f'{SLOW}"0.5"}}', 0, 30, by=30),
            step(f'{SLOW}"1"}}', 0, 60, by=60),
            step(f'{SLOW}"+Inf"}}', 0, 60, by=60),
        ],
        2,
    ),
}

#: Similar series that must fire no alert.
QUIET: dict[str, list[dict[str, str]]] = {
    "a worker at work": [beats(until=MINUTES)],
    "workers that serve some sales twice": [
        series('reservation_worker_sales{job="a"}', 60),
        series('reservation_worker_sales{job="b"}', 50),
        series("reservation_sales", 100),
    ],
    "payments that end while others begin": [
        step(UNDER_WAY, 0, 3),
        step(ENDED, 0, 1, by=1),
        step("reservation_webhooks_total", 0, 1, by=1),
    ],
    "a webhook for the first payment": [
        step(ENDED, 0, 1),
        step("reservation_webhooks_total", 0, 1),
        series(UNDER_WAY, 0),
    ],
    "one slow minute of answers in many": [
        step(f'{REQUESTS}{{status="503"}}', 0, 1, by=1),
        step(f'{REQUESTS}{{status="201"}}', 0, 60, by=60),
    ],
    "a rebuild without a loss": [series("reservation_lost_events_total", 3)],
    "alarms that were never raised": [
        series(f'reservation_alarm_raised_timestamp_seconds{{alarm="{alarm}"}}', 0)
        for alarm in Alarm
    ],
}


def firing(alert: str) -> str:
    return f'count by (alertname) (ALERTS{{alertname="{alert}",alertstate="firing"}})'


def question(expression: str, minute: int, expected: dict[str, int]) -> dict[str, Any]:
    """One query for the firing alerts."""
    return {
        "expr": expression,
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": labels, "value": value} for labels, value in expected.items()],
    }


def judged(tmp_path: Path, tests: list[dict[str, Any]]) -> str:
    """Return promtool's errors for these tests of the shipped rules."""
    program = find("promtool")
    for test in tests:
        test["interval"] = "1m"
    document = {
        "rule_files": [str(ROOT / "deploy/alerts.yml")],
        "evaluation_interval": "10s",
        "tests": tests,
    }
    file = tmp_path / "tests.yml"
    # JSON is YAML.
    file.write_text(json.dumps(document))
    ended = subprocess.run(
        [program, "test", "rules", file], capture_output=True, text=True, timeout=150, check=False
    )
    return "" if ended.returncode == 0 else f"{ended.stdout}{ended.stderr}"


def fires(alert: str, inputs: list[dict[str, str]], after: int) -> dict[str, Any]:
    name = f'{{alertname="{alert}"}}'
    return {
        "name": alert,
        "input_series": inputs,
        "promql_expr_test": [
            question(firing(alert), AT - 1, {}),
            question(firing(alert), AT + after, {name: 1}),
        ],
    }


def test_each_rule_fires_at_the_first_occurrence(tmp_path: Path) -> None:
    assert {*FIRES, "OperatorNeeded", "AlarmTicket"} == {rule["alert"] for rule in RULES}
    assert judged(tmp_path, [fires(name, *wish) for name, wish in FIRES.items()]).splitlines() == []


@pytest.mark.parametrize("before", [0, 60], ids=["never before", "raised 19 minutes before"])
def test_each_alarm_pages_or_opens_a_ticket_at_its_first_occurrence(
    tmp_path: Path, before: float
) -> None:
    expected: dict[str, int] = {}
    for alarm in Alarm:
        pages = alarm not in TICKETS
        alert = "OperatorNeeded" if pages else "AlarmTicket"
        severity = "page" if pages else "ticket"
        expected[f'{{alarm="{alarm}",alertname="{alert}",severity="{severity}"}}'] = 1
    expression = 'count by (alertname, alarm, severity) (ALERTS{alertstate="firing"})'
    test = {
        "input_series": [raised(alarm, before=before) for alarm in Alarm],
        "promql_expr_test": [
            question(expression, AT - 1, {}),
            question(expression, AT, expected),
            question(expression, AT + 9, expected),
            question(expression, AT + 11, {}),
        ],
    }
    assert judged(tmp_path, [test]).splitlines() == []


def test_an_alarm_raised_before_the_first_scrape_fires(tmp_path: Path) -> None:
    """Raised between the start and the first scrape: the series begins with the alarm."""
    name = f'reservation_alarm_raised_timestamp_seconds{{alarm="{Alarm.PREFLIGHT}"}}'
    born = {"series": name, "values": f"{'_ ' * AT}{HAPPENED - 5}x{MINUTES - AT}"}
    assert judged(tmp_path, [fires("OperatorNeeded", [born], 0)]).splitlines() == []


def test_similar_but_healthy_metrics_fire_no_alert(tmp_path: Path) -> None:
    tests = [
        {
            "name": name,
            "input_series": inputs,
            "promql_expr_test": [
                question('ALERTS{alertstate="firing"}', minute, {})
                for minute in range(1, MINUTES, 3)
            ],
        }
        for name, inputs in QUIET.items()
    ]
    assert judged(tmp_path, tests).splitlines() == []
