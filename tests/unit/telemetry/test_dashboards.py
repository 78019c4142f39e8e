"""Alert rules and dashboards query only metrics that the service exports, and are documented."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from api.http.app import create_app
from reservation.config.settings import Settings
from reservation.domain.alarms import TICKETS, Alarm
from reservation.telemetry import metrics

ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/reservation.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0][
    "rules"
]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
CONSOLE = (ROOT / "api/http/static/console/figures.js").read_text()
#: Every Prometheus query of an alert, a panel or a page, or the text itself.
ASKED = {
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES},
    **{
        f"panel {panel['title']}": " ".join(target["expr"] for target in panel["targets"])
        for panel in DASHBOARD["panels"]
    },
    "console": CONSOLE,
}
SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_count", "_sum")}


def counted() -> dict[str, set[str]]:
    """Every series by name, with its labels."""
    found: dict[str, set[str]] = {}
    for one in vars(metrics).values():
        for kind, suffixes in SUFFIXES.items():
            if isinstance(one, kind):
                names = {one._name + suffix for suffix in suffixes}
                found |= {name: {*one._labelnames, "le"} for name in names}
    return found


@pytest.mark.parametrize("place", ASKED)
def test_each_queried_metric_and_label_exists(place: str) -> None:
    known = counted()
    names = set(re.findall(r"\breservation_\w+", ASKED[place]))
    assert names <= known.keys()
    for name, labels in re.findall(r"\b(reservation_\w+)\{(.*?)\}", ASKED[place]):
        assert set(re.findall(r"(\w+)=", labels)) <= known[name]


def test_an_invented_metric_name_would_be_found() -> None:
    assert "reservation_invented_total" not in counted()
    assert len(counted()) > 10


def test_each_queried_operation_exists(tmp_path: Path) -> None:
    settings = Settings.load({"RESERVATION_DATA_DIR": str(tmp_path)}, None)
    document = create_app(settings).openapi_schema.to_schema()
    known = {
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
        if isinstance(operation, dict)
    }
    asked = set(re.findall(r'operation(?:=|: | !== )"(\w+)"', " ".join(ASKED.values())))
    assert {"prepareReservation", "paymentSucceeded"} <= asked <= known


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_each_alert_has_a_runbook_entry(alert: str) -> None:
    assert re.search(rf"^\|.*`{alert}`.*\|.*\|.*\|$", RUNBOOK, re.MULTILINE)


def calls_of_alarms() -> dict[str, ast.expr]:
    """Every call that raises an alarm, with its name expression."""
    found: dict[str, ast.expr] = {}
    for path in [*ROOT.glob("reservation/**/*.py"), *ROOT.glob("api/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in {"alarm", "on_alarm", "_on_alarm"}:
                found[place] = node.args[0]
            for keyword in node.keywords:
                if keyword.arg == "alarm" and called != "error":
                    found[place] = keyword.value
    return found


def test_each_raised_alarm_is_registered() -> None:
    """A name that is not a member of Alarm has no series before its first count."""
    strange = {
        place: ast.unparse(name)
        for place, name in calls_of_alarms().items()
        if not re.fullmatch(r"Alarm\.[A-Z_]+", ast.unparse(name))
        # Tables of the judge and of the flusher; pyright checks them against Alarm.
        and ast.unparse(name) not in {"name", "ALARMS[outcome.kind]"}
    }
    assert strange == {}


def test_each_registered_alarm_is_raised_somewhere() -> None:
    code = " ".join(
        path.read_text()
        for path in [*ROOT.glob("reservation/**/*.py"), *ROOT.glob("api/**/*.py")]
        if path.name != "alarms.py"
    )
    assert [alarm for alarm in Alarm if f"Alarm.{alarm.name}" not in code] == []


def test_the_runbook_lists_exactly_the_registered_alarms() -> None:
    table = RUNBOOK.split("| alarm | meaning | response |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+` ?)+)\|", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(Alarm)


def test_the_alert_rules_list_exactly_the_ticket_alarms() -> None:
    for alert in ("AlarmTicket", "OperatorNeeded"):
        listed = re.search(r'alarm[=!]~"([^"]+)"', ASKED[f"alert {alert}"])
        assert listed
        assert set(listed[1].split("|")) == TICKETS


def test_every_alarm_and_outcome_is_exported_at_zero_from_the_start() -> None:
    program = (
        "from prometheus_client import generate_latest; from reservation.telemetry import metrics;"
        "print(generate_latest(metrics.registry()).decode())"
    )
    exported = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    ).stdout.splitlines()
    for alarm in Alarm:
        assert f'reservation_alarms_total{{alarm="{alarm}"}} 0.0' in exported
        assert f'reservation_alarm_raised_timestamp_seconds{{alarm="{alarm}"}} 0.0' in exported
    assert 'reservation_payment_outcomes_total{outcome="confirmed"} 0.0' in exported
    assert "reservation_webhooks_total 0.0" in exported
    assert any(line.startswith("reservation_build_info{") for line in exported)
