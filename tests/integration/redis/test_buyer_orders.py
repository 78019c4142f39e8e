"""A buyer at the limit sees the holds that bind, even behind many ended orders."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.adapters.redis import reservation_store
from reservation.domain.errors import BuyerLimitExceeded
from reservation.domain.payment import Cause, Reason
from reservation.domain.sale import Item
from tests.support.in_process import Bench, bench


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    off = {"RESERVATION_PREPARE_RATE": "0", "RESERVATION_UNPAID_ORDERS": "0"}
    async with bench(tmp_path, valkey_url, **off) as made:
        yield made


@pytest.mark.parametrize("at_once", [1_000, 7])
async def test_an_unpaid_hold_is_listed_behind_many_ended_orders(
    here: Bench, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(reservation_store, "ORDERS_AT_ONCE", at_once)
    item = Item(sku="a", name="A", price=1000, total=100, limit_per_buyer=3)
    sale_id = await here.sale(items=(item,))
    forgotten = await here.hold(sale_id)
    paying = await here.hold(sale_id)
    await here.claim(paying)
    for _ in range(25):
        await here.service.releases.release(await here.hold(sale_id), reason=Reason(Cause.BUYER))
    last = await here.hold(sale_id)
    with pytest.raises(BuyerLimitExceeded) as refused:
        await here.hold(sale_id)
    named = {last.order_id, paying.order_id, forgotten.order_id}
    order_ids = refused.value.facts["orderIds"]
    assert isinstance(order_ids, list)
    assert (len(order_ids), set(order_ids)) == (3, named)
