"""The example receivers: each effect once, although webhooks repeat and the receiver is killed."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from reservation.domain.webhooks import new_secret, signatures
from tests.support.pages import ROOT
from tests.support.programs import find
from tests.support.service import free_port

FOLDER = ROOT / "examples" / "receivers"
ORDERS = 20
START_SECONDS = 60.0
SECRET = new_secret()

Shipped = Callable[[Path], list[tuple[str, str]]]


def in_sqlite(path: Path) -> list[tuple[str, str]]:
    return sqlite3.connect(path).execute("SELECT order_id, state FROM shipments").fetchall()


def in_lines(path: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["orderId"], line["state"]) for line in lines if "state" in line]


@pytest.fixture(params=["python", "node"])
def command(request: pytest.FixtureRequest) -> tuple[list[str], Shipped]:
    if request.param == "python":
        return [sys.executable, str(FOLDER / "receiver.py")], in_sqlite
    return [str(find("node")), str(FOLDER / "receiver.mjs")], in_lines


@contextmanager
def running(command: list[str], port: int, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {**os.environ, "WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, str(port), str(path)], env=environ)
    give_up_at = time.monotonic() + START_SECONDS
    try:
        while not accepts(port):
            assert process.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def post(
    session: aiohttp.ClientSession, port: int, number: int, *, secret: str = SECRET, age: int = 0
) -> int:
    kind = "order.confirmed" if number % 2 == 0 else "order.refunded"
    order_id = f"s-{number // 2}"
    body = json.dumps({"type": kind, "data": {"reservation": {"orderId": order_id}}}).encode()
    timestamp, message_id = int(time.time()) - age, f"evt_{number}"
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signatures(
            (new_secret(), secret), message_id=message_id, timestamp=timestamp, body=body
        ),
    }
    async with session.post(f"http://127.0.0.1:{port}/", data=body, headers=headers) as response:
        return response.status


async def test_each_effect_happens_once(command: tuple[list[str], Shipped], tmp_path: Path) -> None:
    arguments, shipped = command
    port, path = free_port(), tmp_path / "shop"
    for life in range(3):
        with running(arguments, port, path) as process:
            async with aiohttp.ClientSession() as session:
                for number in range(2 * ORDERS):
                    assert await post(session, port, number) == 204
                    if life < 2 and number == ORDERS + life:
                        process.kill()
                        break
    expected = [(f"s-{n}", state) for n in range(ORDERS) for state in ("ship", "recall")]
    assert sorted(shipped(path)) == sorted(expected)


async def test_a_foreign_or_an_old_webhook_is_refused(
    command: tuple[list[str], Shipped], tmp_path: Path
) -> None:
    arguments, shipped = command
    port, path = free_port(), tmp_path / "shop"
    with running(arguments, port, path):
        async with aiohttp.ClientSession() as session:
            assert await post(session, port, 0, secret=new_secret()) == 400
            assert await post(session, port, 0, age=301) == 400
            assert await post(session, port, 0, age=-301) == 400
            assert await post(session, port, 0) == 204
    assert shipped(path) == [("s-0", "ship")]


@pytest.mark.parametrize("name", ["receiver.py", "receiver.mjs"])
def test_an_example_is_short(name: str) -> None:
    assert len((FOLDER / name).read_text().splitlines()) <= 70
