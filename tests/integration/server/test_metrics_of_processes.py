"""Metrics of processes that share a directory, when one dies and another takes its place."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from reservation.domain.alarms import Alarm

BEGIN = "from reservation.telemetry import metrics; from reservation.domain.alarms import Alarm\n"
CLOSED = (
    "metrics.alarm(Alarm.PREFLIGHT)\n"
    "metrics.PREPARE_CLOSED.labels('redis-disk').set(1)\n"
    "metrics.WORKER_BEAT.set(5)\n"
)
EXPORT = (
    "from prometheus_client import generate_latest\n"
    "print(generate_latest(metrics.registry()).decode())"
)
DEAD = "from prometheus_client.multiprocess import mark_process_dead\nmark_process_dead({})\n"


def run(folder: Path, program: str) -> tuple[int, list[str]]:
    """A process of the service that ends at once; its id and its output."""
    environ: dict[str, Any] = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN + program], env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        printed, _ = process.communicate(timeout=150)
    assert process.returncode == 0
    return process.pid, printed.splitlines()


def test_a_restarted_process_keeps_alarms_and_resets_gauges(
    tmp_path: Path,
) -> None:
    dead, before = run(tmp_path, CLOSED + EXPORT)
    closed = 'reservation_prepare_closed{reason="redis-disk"} 1.0'
    assert closed in before
    # As the supervisor does when one of its processes has ended.
    _, after = run(tmp_path, DEAD.format(dead) + EXPORT)
    assert closed not in after
    assert 'reservation_alarms_total{alarm="preflight"} 1.0' in after
    assert "reservation_worker_beat_timestamp_seconds 5.0" in after
    raised = [line for line in after if line.startswith("reservation_alarm_raised_timestamp")]
    assert len(raised) == len(Alarm)
    assert [line for line in raised if not line.endswith(" 0.0")] == [
        line for line in raised if 'alarm="preflight"' in line
    ]
    _, twice = run(tmp_path, "metrics.alarm(Alarm.PREFLIGHT)\n" + EXPORT)
    assert 'reservation_alarms_total{alarm="preflight"} 2.0' in twice
