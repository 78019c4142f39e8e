"""SQL transactions of a payment: how many there are, and a row that SQL refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select

from reservation.adapters.sql.tables import payment_answers
from reservation.application.payments.resolve import AnswerKind
from reservation.bootstrap import Service
from reservation.domain.payment_gateway import Answered
from reservation.domain.states import Status
from tests.faults.payments.shop import current_status, shop
from tests.support.in_process import Bench


async def answers_of(service: Service, order_id: str) -> int:
    """The number of the PG's answers that SQL has of an order."""
    count = select(func.count()).select_from(payment_answers)
    async with service.sql.database.read() as connection:
        found = await connection.execute(count.where(payment_answers.c.order_id == order_id))
        return found.scalar_one()


async def test_a_payment_is_confirmed_with_two_transactions(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with its intent, before the PG is called; one with the PG's answer and the payment."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        transactions = 0

        def counting(begin: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                nonlocal transactions
                transactions += 1
                return begin(*args)

            return counted

        for name in ("write", "run_write"):
            begin = getattr(service.sql.database, name)
            monkeypatch.setattr(service.sql.database, name, counting(begin))
        await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        assert await current_status(service, order) is Status.CONFIRMED
        assert transactions == 2
        stored = await service.sql.payments.get(payment_key)
        assert stored is not None
        assert stored.status == "DONE"
        assert await answers_of(service, order.order_id) == 1


async def test_the_answer_is_stored_although_sql_refuses_its_payment(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, payment_key = await _approved(bench, sandbox)
        shown = await service.gateway.look_up(payment_key)
        assert isinstance(shown, Answered)
        refused = Answered(msgspec.structs.replace(shown.payment, total_amount=-1))
        resolver = service.refunds._resolver
        arguments = (order, payment_key, AnswerKind.LOOK_UP)
        assert not await resolver.remember_payment(*arguments, refused)
        assert await answers_of(service, order) == 1
        assert await resolver.remember_payment(*arguments, shown)
        assert await answers_of(service, order) == 2


async def _approved(bench: Bench, sandbox: Any) -> tuple[str, str]:
    order = await bench.hold(await bench.sale())
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    assert sandbox.confirm(payment_key, order.order_id, order.amount).is_success
    return order.order_id, payment_key
