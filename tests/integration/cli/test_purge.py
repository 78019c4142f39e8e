"""`reservation purge` needs its setting, previews, and exits with 1 for a refused sale."""

import json
from typing import Any

import pytest
from sqlalchemy import update

from reservation.adapters.sql.tables import sales
from reservation.application.retention import retirement
from reservation.domain.payment import Cause, Reason
from reservation.domain.states import SaleStatus
from tests.support.in_process import Bench
from tests.support.restores import RestoredShop

REASON = ("--reason", "older than a year")
DAYS = 31


async def retire(here: Bench) -> str:
    """A sale with one ended order, retired long ago."""
    service, sale_id = here.service, await here.sale()
    order = await here.hold(sale_id)
    await service.releases.release(order, reason=Reason(Cause.BUYER))
    await service.sales.switch(sale_id, SaleStatus.CLOSED, reason="over", operator="op")
    await here.flush(sale_id)
    await service.retirement.archive(sale_id, reason="r", operator="op")
    await service.retirement.run_once()
    async with service.sql.database.write() as connection:
        await connection.execute(
            update(sales).where(sales.c.sale_id == sale_id).values(retired_at_ms=1)
        )
    return sale_id


@pytest.fixture
def sale_id(restored_shop: RestoredShop, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(retirement, "REMOVE_AFTER_MS", -60_000)
    return restored_shop.run(retire)


def lines(shop: RestoredShop, *words: str, status: int = 0) -> list[dict[str, Any]]:
    printed = shop.command("purge", *words, *REASON, "--json", status=status).stdout
    return [json.loads(line) for line in printed.splitlines()]


def test_without_the_setting_every_sale_keeps_its_rows(
    restored_shop: RestoredShop, sale_id: str
) -> None:
    refused = restored_shop.command("purge", sale_id, *REASON, status=78)
    assert "RESERVATION_RETENTION_DAYS" in str(refused.exception)
    short = restored_shop.environ | {"RESERVATION_RETENTION_DAYS": "30"}
    restored_shop.use(short)
    restored_shop.command("purge", sale_id, *REASON, status=78)


def test_a_preview_names_the_rows_that_the_purge_removes(
    restored_shop: RestoredShop, sale_id: str
) -> None:
    shop = restored_shop
    shop.use(shop.environ | {"RESERVATION_RETENTION_DAYS": str(DAYS)})
    live = shop.run(lambda here: here.sale())
    (preview,) = lines(shop, "--dry-run")
    assert (preview["saleId"], preview["orders"], preview["events"]) == (sale_id, 1, 2)
    assert lines(shop, "--dry-run") == [preview]
    assert lines(shop) == [preview]
    assert lines(shop) == []
    assert lines(shop, sale_id) == [preview]
    (refused,) = lines(shop, live, status=1)
    assert refused["refusal"] == "the sale is not retired"
    assert "0 of 1 sales" in shop.command("purge", live, *REASON, status=1).output
    shop.command("purge", "no-such-sale", *REASON, status=1)
