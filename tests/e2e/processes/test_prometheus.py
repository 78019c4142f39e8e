"""Prometheus scrapes a running service: each alert fires at its first occurrence."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.programs import find
from tests.support.service import Served, eventually, free_port, running_service

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
RULES: dict[str, Any] = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
ALERTS = {rule["alert"] for rule in RULES["groups"][0]["rules"]}
#: Far above a few scrapes, one a second, on a busy machine.
PATIENCE_SECONDS = 60.0

#: Another worker's /metrics, with counts set by lines of Python: hours of a broken sale.
EXPORTER = """
import sys, time
from reservation.domain.alarms import Alarm
from reservation.telemetry import metrics
with metrics.served("127.0.0.1", int(sys.argv[1])):
    for line in sys.stdin:
        exec(line)
"""


class Prometheus:
    """The results of a started Prometheus."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def up(self) -> set[str]:
        """Jobs that it has scraped successfully."""
        with suppress(httpx.TransportError):
            answer = self._http.get("/api/v1/query", params={"query": "up == 1"})
            if answer.is_success:
                return {found["metric"]["job"] for found in answer.json()["data"]["result"]}
        return set()

    def evaluations(self) -> set[str]:
        """The time of each rule's last evaluation."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return {rule["lastEvaluation"] for group in groups for rule in group["rules"]}

    def firing(self) -> set[str]:
        """Alerts by name; those that are for any alarm or reason with it behind a colon."""
        alerts = self._http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {
            ":".join(
                alert["labels"][label]
                for label in ("alertname", "alarm", "reason")
                if label in alert["labels"]
            )
            for alert in alerts
            if alert["state"] == "firing"
        }


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """One with the shipped rules, but that it waits for a second wherever they wait for longer."""
    program = find("prometheus")
    rules = json.loads(json.dumps(RULES))
    for rule in rules["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = "1s"
    # JSON is YAML.
    (folder / "rules.yml").write_text(json.dumps(rules))
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]}
            for job, target in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    with (
        (folder / "prometheus.log").open("wb") as log,
        subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
                yield Prometheus(http)
        finally:
            process.terminate()


@contextmanager
def exporter(port: int) -> Iterator[Callable[[str], None]]:
    """Counts from lines of Python."""
    with subprocess.Popen(
        [sys.executable, "-c", EXPORTER, str(port)], cwd=ROOT, stdin=subprocess.PIPE, text=True
    ) as process:

        def count(line: str) -> None:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

        try:
            yield count
        finally:
            process.terminate()


def test_each_alert_fires_at_the_first_occurrence(tmp_path: Path) -> None:
    port, seen = free_port(), set[str]()
    with (
        running_service(tmp_path / "var", RESERVATION_WORKERS="1") as served,
        exporter(port) as count,
    ):
        targets = {
            "reservation-api": f"127.0.0.1:{served.settings.port}",
            "another-worker": f"127.0.0.1:{port}",
        }
        with prometheus(tmp_path, targets) as watcher:

            def wait_for(*names: str) -> None:
                def scrape() -> set[str]:
                    seen.update(watcher.firing())
                    return set(names) - seen

                eventually(scrape, lambda missing: not missing, within=PATIENCE_SECONDS)

            eventually(watcher.up, lambda up: up == set(targets), within=PATIENCE_SECONDS)
            judged = watcher.evaluations()
            eventually(watcher.evaluations, lambda now: not now & judged, within=PATIENCE_SECONDS)
            assert watcher.firing() == set()

            close_prepare(served)
            wait_for("OperatorNeeded:preflight", "PrepareClosed:redis-fsync-policy")
            refuse_many(served)
            wait_for("Errors")
            count("metrics.UNDECIDED.labels('s').set(1)")
            wait_for("PaymentsUndecided")
            count("metrics.PAYMENTS.labels('confirmed').inc()")
            count("metrics.PENDING_REFUNDS_AGE.set(901)")
            count("metrics.SALES.set(1_000)")
            count("metrics.LOST_EVENTS.inc(3)")
            count("metrics.OUTBOX_AGE.labels('s').set(61)")
            count("metrics.OUTBOX_BACKLOG.labels('s').set(500_001)")
            count("metrics.alarm(Alarm.SECOND_PAYMENT)")
            count("slow = metrics.HTTP_SECONDS.labels('prepareReservation', '201')")
            for _ in range(3):
                count("slow.observe_all([0.7] * 99)")
                time.sleep(1)
            wait_for("WebhooksSilent", "OutboxOld", "OutboxLong", "PrepareSlow", "EventsLost")
            wait_for("AlarmTicket:second_payment", "RefundsPending", "SalesUnserved")
            count("metrics.WORKER_BEAT.set(time.time() - 61)")
            served.process.terminate()
            wait_for("ServiceDown", "WorkerSilent")
    assert {name.partition(":")[0] for name in seen} == ALERTS


def close_prepare(served: Served) -> None:
    """Redis forgets its promise to sync each write."""
    with served.redis() as client:
        client.config_set("appendfsync", "no")


def refuse_many(served: Served) -> None:
    """Prepares that are answered 503, in more than one scrape."""
    sale_id, buyer = served.sale(), served.buyer()
    until = time.monotonic() + 4
    while time.monotonic() < until:
        assert served.prepare(sale_id, buyer).status_code == 503
        time.sleep(0.1)
