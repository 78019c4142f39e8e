"""Payment intents: committed before the payment is requested, one per attempt, barred by a void."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from reservation.adapters.sql import group_commit as group
from reservation.adapters.sql import postgresql, sqlite
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.group_commit import BATCH_MAX
from reservation.adapters.sql.payment_intents import Intent, IntentOutcome, VoidOutcome
from reservation.adapters.sql.store import SqlStore
from reservation.domain.errors import BrokenInvariant


def intent(order_id: str = "o", fence: int = 1, **changes: Any) -> Intent:
    values: dict[str, Any] = {
        "order_id": order_id,
        "sale_id": "s",
        "fence": fence,
        "payment_key": f"key-{order_id}",
        "amount": 100,
        "currency": "KRW",
        "idempotency_key": f"confirm-{order_id}",
        "now_ms": 7,
        **changes,
    }
    return Intent(**values)


def void(order_id: str = "o", fence: int = 1) -> dict[str, Any]:
    return {"order_id": order_id, "sale_id": "s", "fence": fence, "now_ms": 8}


async def test_an_intent_is_written_once_and_a_repeat_is_recognised(sql: SqlStore) -> None:
    assert await sql.intents.add(intent()) is IntentOutcome.WRITTEN
    assert await sql.intents.add(intent()) is IntentOutcome.ALREADY_WRITTEN
    [row] = await sql.intents.list_by_order("o")
    assert (row.kind, row.fence, row.payment_key, row.amount) == ("intent", 1, "key-o", 100)
    assert await sql.intents.owner("key-o") == "o"


async def test_each_fence_has_its_own_intent(sql: SqlStore) -> None:
    await sql.intents.add(intent(fence=1))
    assert await sql.intents.add(intent(fence=2)) is IntentOutcome.WRITTEN
    assert [row.fence for row in await sql.intents.list_by_order("o")] == [1, 2]


async def test_a_payment_key_of_another_order_is_refused(sql: SqlStore) -> None:
    await sql.intents.add(intent("o"))
    outcome = await sql.intents.add(intent("thief", payment_key="key-o"))
    assert outcome is IntentOutcome.KEY_OF_ANOTHER_ORDER
    assert await sql.intents.list_by_order("thief") == []
    assert await sql.intents.owner("key-o") == "o"
    assert await sql.intents.owner("key-unknown") is None


async def test_intent_and_void_exclude_each_other(sql: SqlStore) -> None:
    assert await sql.intents.void(**void(fence=1)) is VoidOutcome.VOIDED
    assert await sql.intents.void(**void(fence=1)) is VoidOutcome.VOIDED
    assert await sql.intents.add(intent(fence=1)) is IntentOutcome.VOIDED
    assert await sql.intents.add(intent(fence=2)) is IntentOutcome.WRITTEN
    assert await sql.intents.void(**void(fence=2)) is VoidOutcome.INTENT_EXISTS
    kinds = [(row.fence, row.kind) for row in await sql.intents.list_by_order("o")]
    assert kinds == [(1, "void"), (2, "intent")]


async def test_only_one_of_a_concurrent_intent_and_void_succeeds(sql: SqlStore) -> None:
    for number in range(20):
        order_id = f"o-{number}"
        written, voided = await asyncio.gather(
            sql.intents.add(intent(order_id)), sql.intents.void(**void(order_id))
        )
        assert (written, voided) in (
            (IntentOutcome.WRITTEN, VoidOutcome.INTENT_EXISTS),
            (IntentOutcome.VOIDED, VoidOutcome.VOIDED),
        )


async def test_a_second_intent_under_one_fence_breaks_an_invariant(sql: SqlStore) -> None:
    await sql.intents.add(intent())
    with pytest.raises(BrokenInvariant):
        await sql.intents.add(intent(amount=1))


@asynccontextmanager
async def counted(sql: SqlStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """The number of intents of each transaction."""
    sizes: list[int] = []
    writes = sql.intents._group
    commit = writes._commit

    async def counting(batch: Any) -> Any:
        sizes.append(len(batch))
        return await commit(batch)

    monkeypatch.setattr(writes, "_commit", counting)
    yield sizes


async def test_concurrent_fence_reads_share_one_query(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sql.intents.add(intent("first", fence=1))
    await sql.intents.add(intent("again", fence=1, payment_key="key-1"))
    await sql.intents.add(intent("again", fence=3, payment_key="key-2"))
    await sql.intents.void(**void("voided", fence=2))
    sizes: list[int] = []
    fences = sql.intents._fences
    query = fences._commit

    async def counting(batch: Any) -> Any:
        sizes.append(len(batch))
        return await query(batch)

    monkeypatch.setattr(fences, "_commit", counting)
    order_ids = ["again", "none", "voided", "first", "again"]
    found = await asyncio.gather(*(sql.intents.known_fence(order_id) for order_id in order_ids))
    assert found == [3, 0, 2, 1, 3]
    assert len(sizes) <= 2


async def test_concurrent_intents_share_a_transaction_with_separate_results(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sql.intents.add(intent("taken"))
    await sql.intents.void(**void("voided"))
    async with counted(sql, monkeypatch) as sizes:
        wishes = [intent(f"o-{number}") for number in range(200)]
        wishes += [intent("thief", payment_key="key-taken"), intent("taken"), intent("voided")]
        wishes += [intent("twice"), intent("twice"), intent("p", payment_key="key-twice")]
        outcomes = await asyncio.gather(*(sql.intents.add(wish) for wish in wishes))
    assert outcomes == [
        *[IntentOutcome.WRITTEN] * 200,
        IntentOutcome.KEY_OF_ANOTHER_ORDER,
        IntentOutcome.ALREADY_WRITTEN,
        IntentOutcome.VOIDED,
        IntentOutcome.WRITTEN,
        IntentOutcome.ALREADY_WRITTEN,
        IntentOutcome.KEY_OF_ANOTHER_ORDER,
    ]
    assert max(sizes) == BATCH_MAX
    assert len(sizes) <= 5


async def test_an_error_in_one_intent_does_not_affect_others(sql: SqlStore) -> None:
    wishes = [intent("good-1"), intent("bad", amount=-1), intent("good-2")]
    outcomes = await asyncio.gather(
        *(sql.intents.add(wish) for wish in wishes), return_exceptions=True
    )
    assert outcomes[0] is IntentOutcome.WRITTEN
    assert isinstance(outcomes[1], IntegrityError)
    assert outcomes[2] is IntentOutcome.WRITTEN
    assert await sql.intents.owner("key-bad") is None


async def test_a_cancelled_caller_does_not_cancel_the_group_commit(sql: SqlStore) -> None:
    tasks = [asyncio.create_task(sql.intents.add(intent(f"o-{n}"))) for n in range(10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert set(outcomes[1::2]) == {IntentOutcome.WRITTEN}
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    # Those were in progress already: a retry gets their outcome.
    assert await sql.intents.add(intent("o-0")) is IntentOutcome.ALREADY_WRITTEN


async def test_intents_beyond_the_bound_are_refused_at_once(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "WAITING_MAX", 3)
    wishes = [sql.intents.add(intent(f"o-{number}")) for number in range(5)]
    outcomes = await asyncio.gather(*wishes, return_exceptions=True)
    assert outcomes[:3] == [IntentOutcome.WRITTEN] * 3
    assert all(isinstance(outcome, TimeoutError) for outcome in outcomes[3:])


async def test_closing_waits_for_pending_writes(database_url: str) -> None:
    sql = await SqlStore.open(database_url)
    writing = asyncio.create_task(sql.intents.add(intent()))
    await asyncio.sleep(0)
    await sql.aclose()
    assert await writing is IntentOutcome.WRITTEN


@asynccontextmanager
async def lock_holder(database_url: str) -> AsyncIterator[None]:
    """Another process in the middle of a transaction that does not end."""
    other = await Database.open(database_url)
    async with (await other.connect()).writing.connect() as connection:
        if not other.is_sqlite:
            await connection.exec_driver_sql("LOCK TABLE payment_attempts")
        else:
            await connection.exec_driver_sql("SELECT 1")
        yield
        await connection.rollback()
    await other.aclose()


async def test_a_database_time_out_is_an_error_and_recovers(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for a start and for a write on a busy machine.
    monkeypatch.setattr(postgresql, "COMMAND_SECONDS", 1.5)
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 1.5)
    sql = await SqlStore.open(database_url)
    async with lock_holder(database_url):
        outcomes = await asyncio.gather(
            *(sql.intents.add(intent(f"o-{number}")) for number in range(3)),
            return_exceptions=True,
        )
    assert all(isinstance(outcome, SQLAlchemyError | OSError) for outcome in outcomes)
    assert await sql.intents.add(intent("o-0")) in (
        IntentOutcome.WRITTEN,
        IntentOutcome.ALREADY_WRITTEN,
    )
    await sql.aclose()


class Flushing(threading.Thread):
    """One transaction after the other on the same file, with hardly a pause, as under load."""

    HELD_SECONDS, PAUSE_SECONDS = 0.12, 0.002

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.transactions = 0
        self._path = path
        self._over = threading.Event()

    def run(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=15)
        while not self._over.is_set():
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(self.HELD_SECONDS)
            connection.execute("COMMIT")
            self.transactions += 1
            time.sleep(self.PAUSE_SECONDS)
        connection.close()

    def end(self) -> None:
        self._over.set()
        self.join()


async def test_a_busy_flusher_does_not_starve_an_intent(tmp_path: Path) -> None:
    path = tmp_path / "orders.sqlite3"
    sql = await SqlStore.open(f"sqlite:///{path}")
    flushing = Flushing(path)
    flushing.start()
    for number in range(5):
        await asyncio.sleep(flushing.HELD_SECONDS / 2)
        assert await sql.intents.add(intent(f"o-{number}")) is IntentOutcome.WRITTEN
    flushing.end()
    await sql.aclose()
    # Polling ten times a second finds one pause in fifty, and waits for seconds each time.
    assert flushing.transactions < 30


def cancel(order_id: str = "o", fence: int = 1, **changes: Any) -> dict[str, Any]:
    wish = {"order_id": order_id, "sale_id": "s", "fence": fence, "now_ms": 9}
    return {**wish, "payment_key": f"key-{order_id}", **changes}


async def test_a_cancel_bars_later_intents_of_its_payment(sql: SqlStore) -> None:
    await sql.intents.add(intent(fence=1))
    assert not await sql.intents.is_cancel_intended("key-o")
    for _ in range(2):
        assert await sql.intents.intend_cancel(**cancel(fence=1))
    assert await sql.intents.is_cancel_intended("key-o")
    assert await sql.intents.add(intent(fence=2)) is IntentOutcome.VOIDED
    assert [row.fence for row in await sql.intents.list_by_order("o")] == [1]
    # Another card of the same order is another payment.
    other = intent(fence=3, payment_key="another", idempotency_key="confirm-another")
    assert await sql.intents.add(other) is IntentOutcome.WRITTEN


async def test_an_intent_under_a_later_fence_bars_the_cancel(sql: SqlStore) -> None:
    await sql.intents.add(intent(fence=2))
    assert not await sql.intents.intend_cancel(**cancel(fence=1))
    assert not await sql.intents.is_cancel_intended("key-o")
    assert await sql.intents.intend_cancel(**cancel(fence=2))


async def test_a_payment_without_an_intent_can_be_barred(sql: SqlStore) -> None:
    assert await sql.intents.intend_cancel(**cancel(fence=0))
    assert await sql.intents.add(intent(fence=1)) is IntentOutcome.VOIDED


async def test_a_payment_of_another_order_is_not_barred(sql: SqlStore) -> None:
    await sql.intents.add(intent("o"))
    assert not await sql.intents.intend_cancel(**cancel("thief", payment_key="key-o"))
    assert not await sql.intents.is_cancel_intended("key-o")


async def test_only_one_of_a_concurrent_intent_and_cancel_succeeds(sql: SqlStore) -> None:
    for number in range(20):
        order_id = f"o-{number}"
        written, barred = await asyncio.gather(
            sql.intents.add(intent(order_id, fence=2)),
            sql.intents.intend_cancel(**cancel(order_id, fence=1)),
        )
        assert (written, barred) in (
            (IntentOutcome.WRITTEN, False),
            (IntentOutcome.VOIDED, True),
        )
