"""The alert rules and the dashboard ask for what the service really counts, and are explained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from api.app import create_app
from reservation import metrics
from reservation.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/reservation.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"][0][
    "rules"
]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
CONSOLE = (ROOT / "api" / "static" / "ops-figures.js").read_text()
#: Every question that something of ours asks Prometheus, or the text itself.
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
def test_what_is_asked_for_is_counted(place: str) -> None:
    known = counted()
    names = set(re.findall(r"\breservation_\w+", ASKED[place]))
    assert names <= known.keys()
    for name, labels in re.findall(r"\b(reservation_\w+)\{(.*?)\}", ASKED[place]):
        assert set(re.findall(r"(\w+)=", labels)) <= known[name]


def test_an_invented_name_would_be_found() -> None:
    assert "reservation_invented_total" not in counted()
    assert len(counted()) > 10


def test_the_operations_that_are_asked_for_exist(tmp_path: Path) -> None:
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
def test_each_alert_has_its_lines_in_the_runbook(alert: str) -> None:
    assert re.search(rf"^\|.*`{alert}`.*\|.*\|.*\|$", RUNBOOK, re.MULTILINE)


def test_each_alarm_of_the_code_is_in_the_runbook() -> None:
    named: set[str] = set()
    for path in [*ROOT.glob("reservation/**/*.py"), *ROOT.glob("api/**/*.py")]:
        named |= set(re.findall(r'\balarm(?:\(\s*|=)"(\w+)"', path.read_text()))
    flusher = (ROOT / "reservation/persistence/events.py").read_text()
    kinds = re.search(r"class ApplyKind\(.*?\n\n\n", flusher, re.DOTALL)
    assert kinds
    members = set(re.findall(r"^    ([A-Z_]+) = ", kinds[0], re.MULTILINE)) - {"APPLIED"}
    named |= {f"flush_{kind.lower()}" for kind in members}
    assert named > {"gateway_misconfigured", "payment_undecided", "worker_bug"}
    assert [name for name in sorted(named) if f"`{name}`" not in RUNBOOK] == []
