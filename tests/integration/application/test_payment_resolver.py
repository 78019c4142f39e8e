"""Recording of a payment's outcome while SQL is down or recovers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from reservation.application.payments.attempt import PaymentAttempt
from reservation.application.payments.resolve import PaymentResolver
from reservation.application.payments.systems import PaymentSystems
from reservation.domain.payment_gateway import Answered, Payment
from reservation.domain.states import Status
from tests.support.in_process import CONFIRMED, Bench, bench


@pytest.fixture
async def made(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


async def test_a_payment_not_stored_in_sql_is_not_sold(
    made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order stays CONFIRMING; the settler confirms it with its payment when SQL is back."""
    service, sale_id = made.service, await made.sale()
    order = await made.hold(sale_id)
    claimed = await made.claim(order, payment_key="key-of-a-payment")
    case = PaymentAttempt(
        order, await service.catalog.get(sale_id), claimed.fence, "key-of-a-payment"
    )
    systems = PaymentSystems(
        catalog=service.catalog,
        store=service.store,
        sql=service.sql,
        gateway=service.gateway,
        clock=service.clock,
    )
    conclude = PaymentResolver(systems, service.data_loss, service.health)
    answer = Answered(
        Payment(
            payment_key="key-of-a-payment",
            order_id=order.order_id,
            status="DONE",
            total_amount=order.amount,
            balance_amount=order.amount,
            currency="KRW",
        )
    )

    async def away(*_: Any) -> None:
        raise OperationalError("INSERT", {}, OSError("SQL is away"))

    with monkeypatch.context() as patch:
        patch.setattr(service.sql.payments, "put", away)
        assert await conclude.finish(case, CONFIRMED, answer) is None
    await _is(made, order.order_id, Status.CONFIRMING)
    assert await conclude.finish(case, CONFIRMED, answer) is Status.CONFIRMED
    await made.flush(sale_id)
    assert await made.audited(sale_id) == ()


async def _is(made: Bench, order_id: str, status: Status) -> None:
    found = await made.service.store.read(order_id)
    assert found is not None
    assert found.status is status
