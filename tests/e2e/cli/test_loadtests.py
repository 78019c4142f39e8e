"""Load tests as a user runs them; always in their own process, for Locust patches its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.programs import end
from tests.support.service import Served, eventually, free_port

pytestmark = [pytest.mark.e2e]

#: More than the run, the longest hold and the verdict together, on a busy machine.
RUN_SECONDS = 80
STOP_SECONDS = 20
#: Placeholder for a free port.
PORT = "{port}"


def command(served: Served, folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """`python -m loadtests` against this service with twenty users, and its environment."""
    words = [sys.executable, "-m", "loadtests", "--url", served.url, "--only-summary"]
    words += ["--users", "20", "--stock", "15", "--hold-seconds", "2", "--record"]
    environ = {
        "PATH": os.environ["PATH"],
        "RESERVATION_DATA_DIR": str(served.settings.data_dir),
        "RESERVATION_PORT": str(served.settings.port),
    }
    return [*words, "--report-dir", str(folder), *arguments], environ


def run(served: Served, folder: Path, *arguments: str, **given: str) -> tuple[int, str]:
    """A run without the web UI: its exit status, and all that it printed."""
    words, environ = command(served, folder, "--headless", "--run-time", "5s", *arguments)
    environ |= given
    with started(words, environ, folder / "locust.log") as process:
        status = process.wait(RUN_SECONDS)
    return status, (folder / "locust.log").read_text()


@contextmanager
def started(
    words: list[str], environ: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets SIGTERM, so that it can end its own children."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=environ, stdout=output, stderr=output)
    try:
        yield process
    finally:
        end(process, within=STOP_SECONDS)


def verdict_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verdict.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        pytest.param(
            ("--processes", "2", "--master-bind-port", PORT, "--master-port", PORT),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--scenario", "stampede"), marks=pytest.mark.slow),
        pytest.param(("--scenario", "sold-out"), marks=pytest.mark.slow),
    ],
    ids=["alone", "two processes", "stampede", "sold out"],
)
def test_a_run_ends_with_a_clean_verdict(
    served: Served, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    port = str(free_port())
    status, output = run(served, tmp_path, *(word.replace(PORT, port) for word in arguments))
    assert status == 0, output
    verdict = verdict_in(tmp_path)
    assert verdict["problems"] == []
    assert verdict["charged"] == verdict["confirmedAmount"] > 0
    # The end of a run may interrupt a prepare of each buyer: that order has no answer.
    unanswered = verdict["orders"] - verdict["answersChecked"]
    assert 0 <= unanswered <= verdict["users"]
    assert verdict["answersChecked"] > 0
    history = verdict["history"]
    assert history["operations"] > history["refusals"] > 0
    assert history["heads"] > 50
    assert history["ordersCompared"] == verdict["orders"]
    assert history["moneyCompared"] > 0
    # Sold out and similar refusals are not failures.
    assert verdict["failures"] == 0
    assert any(line["name"] == "prepare: sold out" for line in verdict["statistics"])
    assert (tmp_path / "verdict.html").stat().st_size > 0


@pytest.mark.slow
def test_a_piece_that_was_sold_behind_the_books_fails_the_run(
    served: Served, tmp_path: Path
) -> None:
    sale_id = served.sale(holdSeconds=2)
    with served.redis() as client:
        client.hincrby(f"rsv:{{{sale_id}}}:stock:a", "sold", 1)
        status, output = run(served, tmp_path, "--sale", sale_id)
        # A sale with inconsistent counters makes the service unready, and other tests share it.
        client.hincrby(f"rsv:{{{sale_id}}}:stock:a", "sold", -1)
    assert status == 1, output
    assert "NOT CLEAN" in output
    problems = verdict_in(tmp_path)["problems"]
    assert any(problem.startswith("audit: ") for problem in problems)
    assert any("is not available + held + sold" in problem for problem in problems)
    assert any("counted as sold" in problem for problem in problems)
    assert any(problem.startswith("history, line ") for problem in problems)


def test_an_unknown_mix_fails_without_a_run(served: Served, tmp_path: Path) -> None:
    status, output = run(served, tmp_path, "--mix", "steal=1")
    assert status == 1
    assert "no buyer is called 'steal'" in output
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ({"RESERVATION_ADMIN_API_KEY": "w" * 32}, "own RESERVATION_ADMIN_API_KEY"),
        ({"RESERVATION_JWT_SECRET": "w" * 32}, "RESERVATION_AUTH=guest and RESERVATION_JWT_SECRET"),
    ],
    ids=["the operator's key", "the buyers' secret"],
)
def test_a_setting_that_is_not_the_services_is_named_at_once(
    served: Served, tmp_path: Path, given: dict[str, str], output: str
) -> None:
    status, printed = run(served, tmp_path, **given)
    assert status == 78
    assert [line for line in printed.splitlines() if line.startswith("loadtests: ")] == [
        printed.strip()
    ]
    assert output in printed
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.slow
def test_an_address_with_a_slash_at_its_end_is_the_same_service(
    served: Served, tmp_path: Path
) -> None:
    status, output = run(served, tmp_path, "--url", f"{served.url}/")
    assert status == 0, output
    assert "Traceback" not in output


@contextmanager
def web_ui(served: Served, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Locust's web UI with a run that starts by itself; its address and its process."""
    port = free_port()
    words, environ = command(
        served, folder, "--web-port", str(port), "--autostart", "--run-time", "4s"
    )
    with started(words, environ, folder / "locust.log") as process:
        yield f"http://127.0.0.1:{port}", process


@pytest.mark.slow
def test_the_stock_tab_shows_the_run_and_then_the_verdict(served: Served, tmp_path: Path) -> None:
    with web_ui(served, tmp_path) as (address, process):

        def board() -> dict[str, Any]:
            try:
                return httpx.get(f"{address}/stock/board.json", trust_env=False).json()
            except httpx.TransportError:
                return {}

        running = eventually(board, lambda found: len(found.get("samples", [])) >= 2)
        assert running["verdict"] is None or running["state"] == "done"
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert "./stock/board.js" in client.get("/").text
            assert "drawBoard" in client.get("/stock/board.js").text
            assert client.get("/stock/locustfile.py").status_code == 404
            (table,) = client.get("/stats/requests").json()["extended_stats"]
        assert {row["sku"] for row in table["data"]} == {"piece-1", "piece-2"}
        assert {row["oversold"] for row in table["data"]} == {0}
        done = eventually(board, lambda found: found.get("state") == "done", within=60)
        assert done["verdict"]["problems"] == []
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.slow
def test_a_run_that_cannot_start_shows_its_reason_and_no_old_verdict(
    served: Served, tmp_path: Path
) -> None:
    with web_ui(served, tmp_path) as (address, process):

        def board() -> dict[str, Any]:
            try:
                return httpx.get(f"{address}/stock/board.json", trust_env=False).json()
            except httpx.TransportError:
                return {}

        done = eventually(board, lambda found: found.get("state") == "done", within=60)
        assert done["verdict"]["ok"]
        # The chart ends with the verdict.
        time.sleep(2)
        assert board()["samples"] == done["samples"]
        for form, output in (
            ({"host": "http://127.0.0.1:1"}, "no service is reachable at http://127.0.0.1:1"),
            ({"host": served.url, "mix": "steal=1"}, "no buyer is called 'steal'"),
        ):
            start = {"user_count": "3", "spawn_rate": "3", **form}
            httpx.post(f"{address}/swarm", data=start, trust_env=False).raise_for_status()
            found = eventually(board, lambda now: now.get("state") == "not begun", within=30)
            assert found["verdict"] is None
            assert found["samples"] == []
            assert output in found["problems"][0]
            logs = httpx.get(f"{address}/logs", trust_env=False).text
            assert output in logs
        process.terminate()
        assert process.wait(30) == 1
    printed = (tmp_path / "locust.log").read_text()
    assert printed.count("clean: ") == 1
    assert "developer.mozilla.org" not in printed
