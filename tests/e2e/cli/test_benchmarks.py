"""Benchmark: runs to its end with the installed contenders; no measurement is judged here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders.launcher import CONTENDERS
from benchmarks.parts.overload import DISK, PROCESSOR
from tests.support.programs import needs

ROOT = Path(__file__).resolve().parents[3]
PARTS = [
    "compare",
    "crowd",
    "whole",
    "edges",
    "script",
    "memory",
    "growth",
    "overload",
    "disk",
    "behind",
    "sales",
    "purchase",
    "rebuild",
    "verify",
    "beyond",
]

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    needs("wrk", "cc")
    home = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--home", str(home)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1_400, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((home / "results.json").read_text())


@pytest.mark.timeout(1_460)
def test_each_part_has_a_table_in_the_results(results: dict[str, Any]) -> None:
    assert list(results["sections"]) == PARTS
    assert all(section["rows"] for section in results["sections"].values())
    assert results["quick"] is True


@pytest.mark.timeout(1_460)
def test_each_installed_contender_took_holds(results: dict[str, Any]) -> None:
    for part in ("compare", "crowd"):
        check_rows({row["name"]: row for row in results["sections"][part]["data"]})


def check_rows(rows: dict[str, dict[str, Any]]) -> None:
    """Every contender is among them, with its own numbers."""
    assert set(rows) == {one.name for one in CONTENDERS if one.missing() is None}
    for row in rows.values():
        numbers = ("per_second", "p50_ms", "p99_ms", "p999_ms", "server_us")
        assert all(row[name] > 0 for name in numbers), row
        assert row["redis_us"] > 0 or row["name"] in {"floor", "asgi"}


@pytest.mark.timeout(1_460)
def test_each_hold_of_a_contender_with_a_write_behind_is_in_sql(results: dict[str, Any]) -> None:
    rows = {row["name"]: row["phases"] for row in results["sections"]["whole"]["data"]}
    present = {one.name for one in CONTENDERS if one.holds and one.missing() is None}
    assert set(rows) >= present | {f"{name}+sql" for name in present}
    assert set(rows) >= {"ours+sql, 2 processes", "ours+sql, many sales"}
    for name, [phase] in rows.items():
        assert phase["held"] >= phase["measured"]["answers"] > 0
        written = "+sql" in name
        assert phase["orders"] == (phase["held_in_all"] if written else None), name
        assert written or phase["behind_us"] == 0, name
    [whole] = rows["ours+sql"]
    assert whole["sold_out"]["refused"] == whole["sold_out"]["answers"] > 0


@pytest.mark.timeout(1_460)
def test_each_other_part_measured_something(results: dict[str, Any]) -> None:
    data = {name: section["data"] for name, section in results["sections"].items()}
    [edge] = data["edges"]
    assert edge["sold_out"]["refused"] > 0
    assert edge["half"]["answers"] > 0
    assert edge["half_with_rewrite"]["answers"] > 0
    rates, beside_rewrite = data["script"]["rates"], data["script"]["beside_rewrite_ms"]
    assert all(rate["holds_per_second"] > 0 and rate["p999_ms"] > 0 for rate in rates)
    assert all(ms > 0 for ms in beside_rewrite)
    assert set(data["memory"]["by_key"]) >= {"order", "buyer", "buyer-orders"}
    assert data["memory"]["total"] > 0
    assert all(data["growth"][size]["measured"][0]["answers"] > 0 for size in ("few", "many"))
    assert data["growth"]["moving"]["usual_us"] > 0
    assert [one["limit"] for one in data["overload"]] == [PROCESSOR.name, DISK.name]
    assert all(step["holds_per_second"] > 0 for step in data["disk"])
    assert all(check["real"] > 0 and check["simulated"] > 0 for check in data["beyond"]["checks"])
    assert all(row["ended_seconds"] > 0 for row in data["beyond"]["rows"])
    for idle in data["sales"]:
        assert idle["flushed_per_second"] > 0
        assert idle["list_ms"] > 0
        assert idle["start_seconds"] > 0
        assert sum(idle["cpu"].values()) > 0
    for purchases in data["purchase"]:
        for found in purchases["rounds"]:
            assert found["per_second"] > 0
            assert found["cost"]["api"] > 0
            assert (found["cost"]["sql"] > 0) == (purchases["database"] == "postgresql")
    for rebuilt in data["rebuild"]:
        assert rebuilt["by_command_seconds"] > 0
        assert rebuilt["by_worker_seconds"] > 0
    for overload in data["overload"]:
        assert overload["surge"]["sold_per_second"] > 0
        assert overload["surge"]["confirmed"] > 0


@pytest.mark.timeout(1_460)
def test_head_and_itself_are_compared_pair_by_pair(tmp_path: Path) -> None:
    needs("wrk", "git")
    command = [sys.executable, "-m", "benchmarks", "between", "HEAD", "--quick"]
    ended = subprocess.run(
        [*command, "--home", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1_400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    data = json.loads((tmp_path / "results.json").read_text())["sections"]["between"]["data"]
    assert data["before"] == data["after"]
    assert len(data["pairs"]) == 2
    for pair in data["pairs"]:
        for side in pair.values():
            assert side["holds"] > 0
            assert side["hold"]["api"] > 0
            assert len(side["purchases"]) == 4
            assert all(paid["cost"]["api"] > 0 for paid in side["purchases"].values())
    ratio = data["ratios"]["hold, API + worker + Redis"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert not (tmp_path / "between" / "before").exists()
