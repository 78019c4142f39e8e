"""Service with a PostgreSQL that is away, unfit, or behind a pooler."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.databases import PostgresServer, running_postgres
from tests.support.pgbouncer import running_pgbouncer
from tests.support.service import Served, eventually, free_port, running_service

pytestmark = pytest.mark.e2e

#: A start on a busy machine.
PATIENCE_SECONDS = 40.0
#: Far fewer than the 1,000 lines in 20 s of a crash loop.
LINES_MAX = 120
PURCHASES = 20


@pytest.fixture
def sql() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


def api_pids(served: Served) -> set[int]:
    children = psutil.Process(served.process.pid).children()
    return {child.pid for child in children if "api" in child.cmdline()}


def ready(served: Served) -> dict[str, Any]:
    return served.http.get("/health/ready").json()


def lines(served: Served) -> list[str]:
    return served.log.read_text(errors="replace").splitlines()


@pytest.mark.slow
def test_an_api_killed_without_sql_restarts_and_sells(tmp_path: Path, sql: PostgresServer) -> None:
    given: dict[str, Any] = {"RESERVATION_DATABASE_URL": sql.url(), "RESERVATION_WORKERS": "1"}
    with running_service(tmp_path / "data", **given) as served:
        sale_id, buyer = served.sale(), served.buyer()
        first = served.hold(sale_id, buyer)
        assert served.audit(sale_id)["lag"] == 0
        # A check of the API has found the sale whole.
        with served.redis() as client:
            eventually(lambda: str(client.get("rsv:vouched")), lambda found: sale_id in found)
        sql.stop()
        logged = len(lines(served))
        for pid in api_pids(served):
            os.kill(pid, signal.SIGKILL)
        served.http.close()
        served.http = httpx.Client(base_url=served.url, timeout=30, trust_env=False)

        def hold() -> int:
            try:
                return served.prepare(sale_id, buyer).status_code
            except httpx.TransportError:
                return 0

        eventually(hold, lambda status: status == 201, within=PATIENCE_SECONDS)
        assert served.http.get("/health/live").status_code == 200
        assert ready(served)["missing"] == ["sql"]
        assert served.http.get("/v1/admin/orders", headers=served.admin).status_code == 503
        assert served.open_success_url(first, served.pay(first)).status_code in {202, 503}
        until = time.monotonic() + 10
        while time.monotonic() < until:
            assert hold() in {201, 409}
            time.sleep(0.5)
        found = lines(served)[logged:]
        assert not any("Traceback" in line or "ExceptionGroup" in line for line in found), found
        assert len(found) < LINES_MAX, found
        sql.start()
        eventually(lambda: ready(served), lambda found: found["status"] == "ok", within=30)
        report = eventually(
            lambda: served.audit(sale_id), lambda found: found.get("lag") == 0, within=30
        )
        assert report["ok"], report


@pytest.mark.slow
def test_a_service_started_before_its_database_waits_and_reports_it(
    tmp_path: Path, sql: PostgresServer
) -> None:
    sql.stop()
    given: dict[str, Any] = {"RESERVATION_DATABASE_URL": sql.url(), "RESERVATION_WORKERS": "1"}
    with running_service(tmp_path / "data", but_for=("sql",), **given) as served:
        pids = api_pids(served)
        assert served.http.get("/health/live").status_code == 200
        assert ready(served)["missing"] == ["sql"]
        metrics = served.http.get("/metrics").text
        assert 'reservation_prepare_closed{reason="sql"} 1.0' in metrics
        time.sleep(5)
        assert api_pids(served) == pids
        found = lines(served)
        assert not any("Traceback" in line for line in found), found
        assert len(found) < LINES_MAX, found
        sql.start()
        eventually(lambda: ready(served), lambda found: found["status"] == "ok", within=30)
        sale_id = served.sale()
        order = served.hold(sale_id, served.buyer())
        assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"


def refused_start(home: Path, database_url: str) -> tuple[int, list[str]]:
    """The exit status of `reservation serve`, and its output."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")}
    environ |= {
        "RESERVATION_DATA_DIR": str(home / "var"),
        "RESERVATION_PORT": str(free_port()),
        "RESERVATION_DATABASE_URL": database_url,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "api.cli", "serve"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return ended.returncode, ended.stderr.splitlines()


def test_a_database_in_another_encoding_stops_the_start_in_one_line(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    postgres.run("CREATE DATABASE korean ENCODING 'EUC_KR' TEMPLATE template0")
    try:
        status, found = refused_start(tmp_path, postgres.url("korean"))
    finally:
        postgres.run("DROP DATABASE korean")
    assert status == 78
    sentence = "the database's encoding is EUC_KR, it must be UTF8"
    assert found == [f"reservation: RESERVATION_DATABASE_URL: {sentence}"]


@pytest.mark.slow
def test_twenty_purchases_through_a_transaction_pooler_are_all_confirmed(
    tmp_path: Path, sql: PostgresServer
) -> None:
    with running_pgbouncer(sql) as query:
        url = sql.url().partition("?")[0] + query
        given: dict[str, Any] = {"RESERVATION_DATABASE_URL": url, "RESERVATION_WORKERS": "2"}
        with running_service(tmp_path / "data", **given) as served:
            sale_id = served.sale()

            def buy(_: int) -> str:
                order = served.hold(sale_id, served.buyer())
                return served.open_success_url(order, served.pay(order)).json()["status"]

            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(buy, range(PURCHASES))) == ["CONFIRMED"] * PURCHASES
            assert served.audit(sale_id)["ok"]
            orders = served.http.get(
                "/v1/admin/orders", params={"saleId": sale_id}, headers=served.admin
            ).json()["orders"]
            assert [order["status"] for order in orders] == ["CONFIRMED"] * PURCHASES
            log = served.log.read_text()
            assert "DuplicatePreparedStatement" not in log
            assert "InvalidSQLStatementName" not in log


@pytest.mark.slow
def test_readiness_reports_a_database_in_another_encoding(
    tmp_path: Path, sql: PostgresServer
) -> None:
    sql.run("CREATE DATABASE in_latin1 ENCODING 'LATIN1' TEMPLATE template0")
    given: dict[str, Any] = {
        "RESERVATION_DATABASE_URL": sql.url("in_latin1"),
        "RESERVATION_WORKERS": "1",
    }
    sql.stop()
    with running_service(tmp_path / "data", but_for=("sql",), **given) as served:
        assert ready(served)["missing"] == ["sql"]
        sql.start()
        eventually(
            lambda: ready(served)["missing"],
            lambda missing: missing == ["sql-encoding"],
            within=30,
        )
