"""Threads that run whole SQLite transactions: their end, and a cancelled caller."""

import asyncio
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from reservation.adapters.sql import sqlite
from reservation.adapters.sql.engine import Database


async def test_a_transaction_after_the_end_is_an_error_of_the_database(sqlite_url: str) -> None:
    database = await Database.open(sqlite_url)
    await database.aclose()
    for run in (database.run_read, database.run_write):
        with pytest.raises(OSError, match="closed"):
            await run(lambda _: None)


async def test_a_stuck_transaction_does_not_hold_up_the_end(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CLOSE_SECONDS_MAX", 0.2)
    database = await Database.open(sqlite_url)
    begun, goes_on = threading.Event(), threading.Event()

    def stuck(_: Connection) -> None:
        begun.set()
        goes_on.wait(60)

    call = asyncio.create_task(database.run_write(stuck))
    await asyncio.to_thread(begun.wait, 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    began = time.monotonic()
    await database.aclose()
    assert time.monotonic() - began < 30
    goes_on.set()


async def test_a_cancelled_caller_lets_the_next_writer_in(sqlite_url: str, tmp_path: Path) -> None:
    database = await Database.open(sqlite_url)
    begun, goes_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        connection.execute(text("INSERT INTO probes (name, at_ms) VALUES ('slow', 1)"))
        begun.set()
        goes_on.wait(60)

    def read(connection: Connection) -> list[str]:
        return list(connection.execute(text("SELECT name FROM probes ORDER BY name")).scalars())

    call = asyncio.create_task(database.run_write(slow))
    await asyncio.to_thread(begun.wait, 60)
    call.cancel()
    threading.Timer(0.2, goes_on.set).start()
    async with database.write() as connection:
        await connection.execute(text("INSERT INTO probes (name, at_ms) VALUES ('after', 1)"))
    # The cancelled transaction was running, and has committed.
    assert await database.run_read(read) == ["after", "slow"]
    await database.aclose()
