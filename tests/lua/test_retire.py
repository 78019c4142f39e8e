"""retire.lua: each result word."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from reservation.adapters.redis.scripts import load
from reservation.domain.events import chain_of
from tests.support.lua_sale import EPOCH, LuaSale

PREFIX = "retiring:"


async def retire(sale: LuaSale, *, late: int = 0, **given: Any) -> list[Any]:
    """Run the script with the sale's own head, except for what is given."""
    seq, chain = sale.mark
    args = {"epoch": EPOCH, "seq": seq, "chain": chain, "ended_ms": 0} | given
    keys = sale.keys
    return await sale.connections.call(
        load("retire"),
        [keys.sale, keys.deadlines, keys.confirming, keys.deposits, keys.outbox],
        [
            sale.connections.server_now_ms() + 5_000 - late * 10_000,
            args["epoch"],
            args["seq"],
            args["chain"],
            args["ended_ms"],
            PREFIX,
        ],
    )


async def test_a_closed_sale_is_fenced_off_once(sale: LuaSale) -> None:
    await sale.switch("closed")
    assert await retire(sale) == ["done"]
    async with sale.unchanged():
        assert await retire(sale) == ["done"]
        assert await sale.switch("closed") == ["recovering"]
        assert await sale.prepare(sale.basket()) == [["recovering"]]
    epoch = await sale.connections.command("HGET", sale.keys.sale, "epoch")
    assert epoch == PREFIX + EPOCH


async def test_a_sale_that_is_not_closed_stays(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await retire(sale) == ["not_ended"]
    await sale.switch("paused")
    async with sale.unchanged():
        assert await retire(sale) == ["not_ended"]


async def test_the_wait_after_the_end_goes_by_the_server_clock(sale: LuaSale) -> None:
    now_ms = sale.connections.server_now_ms()
    await sale.connections.command("HSET", sale.keys.sale, "closes_at", now_ms - 10_000)
    async with sale.unchanged():
        assert await retire(sale, ended_ms=60_000) == ["not_ended"]
    await rewrite_last_event(sale, at_ms=now_ms - 10_000)
    assert await retire(sale, ended_ms=5_000) == ["done"]


async def test_the_last_change_of_an_ended_sale_begins_the_wait_again(sale: LuaSale) -> None:
    await sale.connections.command("HSET", sale.keys.sale, "closes_at", 1)
    async with sale.unchanged():
        assert await retire(sale, ended_ms=60_000) == ["not_ended"]
    await rewrite_last_event(sale, at_ms=sale.connections.server_now_ms() - 61_000)
    assert await retire(sale, ended_ms=60_000) == ["done"]


async def rewrite_last_event(sale: LuaSale, *, at_ms: int) -> None:
    """Date the sale's only event back."""
    [(entry_id, flat)] = await sale.connections.command(
        "XREVRANGE", sale.keys.outbox, "+", "-", "COUNT", 1
    )
    fields = dict(zip(flat[::2], flat[1::2], strict=True)) | {"at": str(at_ms)}
    chain = chain_of(
        "", seq=1, event=fields["event"], order_id="", at_ms=at_ms, data=fields["data"]
    )
    flat = [part for pair in (fields | {"chain": chain}).items() for part in pair]
    await sale.connections.command("DEL", sale.keys.outbox)
    await sale.connections.command("XADD", sale.keys.outbox, entry_id, *flat)
    await sale.connections.command("HSET", sale.keys.sale, "chain", chain)
    sale.mark = (1, chain)


async def test_a_closed_sale_waits_too_unless_an_operator_requests_it(sale: LuaSale) -> None:
    await sale.switch("closed")
    async with sale.unchanged():
        assert await retire(sale, ended_ms=60_000) == ["not_ended"]
    assert await retire(sale) == ["done"]


async def _hold(sale: LuaSale) -> None:
    assert (await sale.prepare(sale.basket()))[0][0] == "held"


async def _payment(sale: LuaSale) -> None:
    basket = sale.basket()
    await sale.prepare(basket)
    assert (await sale.claim(basket))[0] == "claimed"


async def _deposit(sale: LuaSale) -> None:
    basket = sale.basket()
    await sale.prepare(basket)
    await sale.claim(basket)
    due_ms = sale.connections.server_now_ms() + 60_000
    assert (await sale.finish(basket, 1, "awaiting_deposit", due_ms=due_ms))[0] == "done"


@pytest.mark.parametrize("begin", [_hold, _payment, _deposit])
async def test_a_sale_with_an_order_in_progress_stays(
    sale: LuaSale, begin: Callable[[LuaSale], Awaitable[None]]
) -> None:
    await begin(sale)
    await sale.switch("closed")
    async with sale.unchanged():
        assert await retire(sale) == ["open", "1"]


async def test_a_sale_of_which_sql_lacks_events_stays(sale: LuaSale) -> None:
    await sale.switch("closed")
    seq, chain = sale.mark
    async with sale.unchanged():
        assert await retire(sale, seq=seq - 1) == ["behind", str(seq)]
        assert await retire(sale, seq=seq + 1) == ["behind", str(seq)]
        assert await retire(sale, chain="0" * 40) == ["behind", str(seq)]
    assert await retire(sale, chain=chain) == ["done"]


async def test_an_outdated_or_late_call_changes_nothing(sale: LuaSale) -> None:
    await sale.switch("closed")
    async with sale.unchanged():
        assert await retire(sale, epoch="other") == ["recovering"]
        assert await retire(sale, late=1) == ["too_late"]
    await retire(sale)
    async with sale.unchanged():
        assert await retire(sale, seq=sale.mark[0] + 1) == ["recovering"]
