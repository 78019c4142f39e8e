"""The sandbox's journal: a killed sandbox keeps each answered change."""

import json
from pathlib import Path

import httpx
import pytest

from reservation.sandbox.journal import Journal, JournalDamagedError
from tests.integration.toss.sandbox_steps import (
    AMOUNT,
    MINUTE,
    paid,
    status_of,
)
from tests.support.sandbox import running_sandbox, sandbox_process


def test_a_killed_sandbox_keeps_each_answered_change(tmp_path: Path, order_id: str) -> None:
    """Killed between any two answers: payments, money, first answers and the clock are there."""
    with sandbox_process(tmp_path) as process:
        sandbox = process.sandbox
        sandbox.turn_clock(90)
        account = sandbox.put_payment(f"{order_id}-va", AMOUNT, method="virtual_account")
        sandbox.confirm(account, f"{order_id}-va", AMOUNT)
        waiting = sandbox.put_payment(f"{order_id}-waiting", AMOUNT)
        answers: list[tuple[str, str, httpx.Response]] = []
        for number in range(3):
            order = f"{order_id}-{number}"
            payment_key = sandbox.put_payment(order, AMOUNT)
            amount = AMOUNT if number else 1  # The first one is refused, and stays so.
            answer = sandbox.confirm(payment_key, order, amount, key=f"key-{number}")
            answers.append((payment_key, order, answer))
            before = sandbox.ledger()
            process.kill()
            process.start()
            assert sandbox.ledger() == before
        assert [answer.status_code for _, _, answer in answers] == [400, 200, 200]

        for number, (payment_key, order, answer) in enumerate(answers):
            again = sandbox.confirm(payment_key, order, AMOUNT, key=f"key-{number}")
            assert (again.status_code, again.content) == (answer.status_code, answer.content)
        assert sandbox.http.get("/_clock").json()["offsetSeconds"] == 90
        assert sandbox.deposit(account)["status"] == "DONE"
        sandbox.turn_clock(10 * MINUTE)
        assert status_of(sandbox, waiting) == "EXPIRED"
        assert sandbox.ledger()["charged"] == 3 * AMOUNT


def test_a_torn_last_line_is_truncated_and_the_journal_continues(
    tmp_path: Path, order_id: str
) -> None:
    with running_sandbox(tmp_path) as first:
        paid(first, order_id)
    journal = tmp_path / "sandbox" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"number":3,"payment":{"payme')
    with running_sandbox(tmp_path) as second:
        assert second.ledger()["charged"] == AMOUNT
        paid(second, f"{order_id}-2")
        assert second.ledger()["charged"] == 2 * AMOUNT
    assert journal.read_bytes().startswith(whole)
    for line in journal.read_bytes().splitlines():
        json.loads(line)


@pytest.mark.parametrize("damage", ["a line that is none", "a line that is missing"])
def test_a_damaged_journal_stops_the_start(tmp_path: Path, damage: str, order_id: str) -> None:
    with running_sandbox(tmp_path) as sandbox:
        paid(sandbox, order_id)
        paid(sandbox, f"{order_id}-2")
    path = tmp_path / "sandbox" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:2] = [b"nonsense\n"] if damage == "a line that is none" else []
    path.write_bytes(b"".join(lines))
    journal = Journal(tmp_path / "sandbox")
    try:
        with pytest.raises(JournalDamagedError, match="line 2"):
            journal.replay()
    finally:
        journal.close()


def test_a_journal_belongs_to_one_sandbox(tmp_path: Path) -> None:
    with running_sandbox(tmp_path), pytest.raises(BlockingIOError):
        Journal(tmp_path / "sandbox")


def test_the_journal_holds_no_secret_key(tmp_path: Path, order_id: str) -> None:
    with running_sandbox(tmp_path) as sandbox:
        payment_key = sandbox.put_payment(order_id, AMOUNT)
        sandbox.confirm(payment_key, order_id, AMOUNT, key="k")
        secret_key = sandbox.secret_key
    assert secret_key not in (tmp_path / "sandbox" / "journal.jsonl").read_text()
