"""The list of transactions is read page by page, and a failure is never an empty list."""

from datetime import UTC, datetime, timedelta

import pytest

from reservation.adapters.toss import client
from reservation.adapters.toss.circuit_breaker import GuardedListingGateway
from reservation.adapters.toss.client import TossGateway
from reservation.domain.payment_gateway import (
    Misconfigured,
    Transaction,
    TransactionList,
    TransactionPage,
    TryAgain,
)
from tests.support.sandbox import RunningSandbox


async def read_all(gateway: TransactionList, since: datetime) -> list[Transaction]:
    found: list[Transaction] = []
    until = datetime.now(UTC) + timedelta(seconds=1)
    while True:
        after = found[-1].transaction_key if found else ""
        page = await gateway.list_transactions(since=since, until=until, after=after)
        assert isinstance(page, TransactionPage)
        if not page.transactions:
            return found
        found += page.transactions


async def test_pages_together_have_each_transaction_once(
    own: RunningSandbox, order_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PAGE_ENTRIES", 2)
    began = datetime.now(UTC)
    keys = [own.put_payment(f"{order_id}-{number}", 1000) for number in range(5)]
    for number, key in enumerate(keys):
        assert own.confirm(key, f"{order_id}-{number}", 1000).is_success
    own.http.post(f"/v1/payments/{keys[0]}/cancel", json={"cancelReason": "r"}).raise_for_status()
    toss = TossGateway(base_url=own.url, secret_key=own.secret_key)
    gateway = GuardedListingGateway(toss, toss)

    found = await read_all(gateway, began)

    assert [(one.payment_key, one.status) for one in found] == [
        *((key, "DONE") for key in keys),
        (keys[0], "CANCELED"),
    ]
    assert found[1].order_id == f"{order_id}-1"
    assert await read_all(gateway, datetime.now(UTC) + timedelta(seconds=-0.5, days=-1)) == found
    assert await read_all(gateway, datetime.now(UTC) + timedelta(hours=1)) == []
    await gateway.aclose()


async def test_a_list_that_was_not_read_is_no_page(own: RunningSandbox) -> None:
    now = datetime.now(UTC)
    refused = TossGateway(base_url=own.url, secret_key="test_another")
    answer = await refused.list_transactions(since=now, until=now, after="")
    assert isinstance(answer, Misconfigured)
    assert answer.key_refused
    await refused.aclose()
    closed = TossGateway(base_url="http://127.0.0.1:9", secret_key=own.secret_key)
    assert isinstance(await closed.list_transactions(since=now, until=now, after=""), TryAgain)
    await closed.aclose()
