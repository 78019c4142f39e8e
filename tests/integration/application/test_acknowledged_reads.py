"""Answers that report an earlier change: only once replicas have it, or SQL has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reservation.adapters.redis import replica_acks
from reservation.adapters.redis.errors import NotAcknowledged, StoreUncertain, TooFewReplicas
from reservation.adapters.redis.script_results import ClaimWord
from reservation.domain.errors import SoldOut, Unavailable
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from tests.support.acknowledgement import acknowledged_bench, reopened
from tests.support.in_process import Bench
from tests.support.replication import Pair, client_of, pair

pytestmark = pytest.mark.system

BY_BUYER = Reason(Cause.BUYER)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path / "servers") as started:
        yield started


async def current(here: Bench, order: Reservation) -> Reservation:
    """The order as the master has it, as each request reads it first."""
    return await here.service.queries.of_buyer(order.order_id, order.buyer_id)


async def release_without_replica(here: Bench, order: Reservation) -> None:
    """The master has the release; its answer is an error."""
    with pytest.raises(NotAcknowledged):
        await here.service.releases.release(order, reason=BY_BUYER)
    assert (await current(here, order)).status is Status.RELEASED


async def test_a_repeated_release_is_answered_once_replicas_have_it(
    servers: Pair, tmp_path: Path
) -> None:
    """A failover would take the first release back: its repetition must not confirm it."""
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        with servers.frozen_replica():
            await release_without_replica(here, order)
            # Unsent: a WAIT of each buyer would keep the probes from opening the server.
            with pytest.raises(TooFewReplicas):
                await here.service.releases.release(await current(here, order), reason=BY_BUYER)
        await reopened(here.service.connections)
        found = await here.service.releases.release(await current(here, order), reason=BY_BUYER)
        assert found.status is Status.RELEASED


async def test_the_fail_page_of_an_ended_hold_waits_for_replicas(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        with servers.frozen_replica():
            await release_without_replica(here, order)
            with pytest.raises(TooFewReplicas):
                await here.service.releases.if_held(await current(here, order), reason=BY_BUYER)


async def test_a_buyer_reads_an_order_and_a_list_once_replicas_have_them(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        queries = here.service.queries
        with servers.frozen_replica():
            await release_without_replica(here, order)
            with pytest.raises(Unavailable):
                await queries.acknowledged(await current(here, order))
            with pytest.raises(Unavailable):
                await queries.all_of_buyer(order.sale_id, order.buyer_id)
        await reopened(here.service.connections)
        found = await queries.acknowledged(await current(here, order))
        assert found.status is Status.RELEASED
        assert await queries.all_of_buyer(order.sale_id, order.buyer_id) == [found]


async def test_a_state_that_sql_has_needs_no_replica(
    servers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        queries = here.service.queries
        with servers.frozen_replica():
            with pytest.raises(Unavailable):
                await queries.acknowledged(order)
            # The flusher waits for the replica no longer.
            monkeypatch.setattr(replica_acks, "OVERDUE_SECONDS", 0.0)
            await here.flush(order.sale_id)
            assert await queries.acknowledged(await current(here, order)) == order
            assert await queries.all_of_buyer(order.sale_id, order.buyer_id) == [order]


async def test_a_refusal_is_answered_only_if_replicas_have_the_changes_it_reports(
    servers: Pair, tmp_path: Path
) -> None:
    """Another process took the last unit; a failover would give it back."""
    hasty = acknowledged_bench(servers, tmp_path / "data", RESERVATION_REDIS_ACK_REPLICAS="0")
    async with acknowledged_bench(servers, tmp_path / "data") as here, hasty as other:
        one = Item(sku="a", name="A", price=1000, total=1, limit_per_buyer=1)
        sale_id = await here.sale(items=(one,))
        with servers.frozen_replica():
            await other.hold(sale_id, "ann")
            with pytest.raises(Unavailable):
                await here.hold(sale_id, "bob")
        await reopened(here.service.connections)
        with pytest.raises(SoldOut):
            await here.hold(sale_id, "bob")


async def test_a_payment_is_refused_only_if_replicas_have_the_changes_it_reports(
    servers: Pair, tmp_path: Path
) -> None:
    """Another process gave the unit of an overdue hold away; a failover would take that back."""
    hasty = acknowledged_bench(servers, tmp_path / "data", RESERVATION_REDIS_ACK_REPLICAS="0")
    async with acknowledged_bench(servers, tmp_path / "data") as here, hasty as other:
        one = Item(sku="a", name="A", price=1000, total=1, limit_per_buyer=1)
        # The other hold must last until the claim, on a busy machine.
        sale_id = await here.sale(items=(one,), hold_seconds=4)
        order = await here.hold(sale_id, "eve")
        with servers.frozen_replica():
            await other.eventually_hold(sale_id, refused=SoldOut)
            with pytest.raises(NotAcknowledged) as refused:
                await here.claim(order)
            assert refused.value.reply[0] in (ClaimWord.SOLD_OUT, ClaimWord.EXPIRED)


async def test_an_order_that_has_left_redis_since_it_was_read_is_not_shown(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        with client_of(servers.master) as master:
            master.delete(here.service.keys.of(order.sale_id).order(order.order_id))
        with pytest.raises(StoreUncertain, match="has left Redis"):
            await here.service.releases._reads.state(order)


async def test_without_the_setting_no_read_waits(servers: Pair, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with acknowledged_bench(servers, data, RESERVATION_REDIS_ACK_REPLICAS="0") as here:
        order = await here.hold(await here.sale())
        with servers.frozen_replica():
            await here.service.releases.release(order, reason=BY_BUYER)
            found = await here.service.queries.acknowledged(await current(here, order))
            assert found.status is Status.RELEASED
