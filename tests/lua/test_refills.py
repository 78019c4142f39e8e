"""Refills of a partition: every change that a certificate must detect is counted, in any script."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from reservation.adapters.redis.scripts import all_scripts, load
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import EPOCH, LuaSale

#: Scripts that run only while a rebuild has fenced the sale off: it then gets another epoch.
OF_A_REBUILD = {"reopen", "restore"}
#: Scripts that only read.
OF_READERS = {"audit", "reading"}

Act = Callable[[LuaPartition], Awaitable[Any]]


async def paying(partition: LuaPartition) -> tuple[dict[str, Any], int]:
    """Return a basket whose payment is in progress, and its fence."""
    basket = await partition.hold("payer", lines={"a": 2})
    return basket, int((await partition.claim(basket))[1])


async def release(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    return lambda one: one.release(basket)


async def expire(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    await partition.run_out(basket)
    return lambda one: one.expire(basket)


async def expire_two(partition: LuaPartition) -> Act:
    baskets = [await partition.hold(name) for name in ("ann", "bob")]
    await partition.run_out(*baskets)
    return lambda one: one.expire(*baskets)


def finish(outcome: str, **how: Any) -> Callable[[LuaPartition], Awaitable[Act]]:
    async def prepared(partition: LuaPartition) -> Act:
        basket, fence = await paying(partition)
        return lambda one: one.finish(basket, fence, outcome, **how)

    return prepared


async def void_late(partition: LuaPartition) -> Act:
    basket, fence = await paying(partition)
    past = str(1)
    key = partition.keys.order(basket["order"])
    await partition.connections.command("HSET", key, "expires_at", past)
    return lambda one: one.finish(basket, fence, "voided", attempt="")


def refund(restock: int) -> Callable[[LuaPartition], Awaitable[Act]]:
    async def prepared(partition: LuaPartition) -> Act:
        basket = await partition.sold()
        return lambda one: one.refund(basket, restock=restock)

    return prepared


async def claim_late(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    await partition.run_out(basket)
    return lambda one: one.claim(basket)


async def claim(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    return lambda one: one.claim(basket)


async def claim_again(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    await partition.release(basket)
    return lambda one: one.claim(basket)


async def lease(partition: LuaPartition) -> Act:
    basket, fence = await paying(partition)
    return lambda one: one.lease(basket, fence, "move")


async def replace(partition: LuaPartition) -> Act:
    basket = await partition.hold()
    await partition.release(basket)
    return lambda one: one.add_tombstones(basket)


async def put_back(partition: LuaPartition) -> Act:
    await (await replace(partition))(partition)
    [replaced] = partition.replaced.values()
    return lambda one: one.restore_order(replaced.basket)


async def remake(partition: LuaPartition) -> Act:
    basket, names = partition.basket(), partition.keys
    items = '[["a",1,1000]]'
    keys = [names.sale, names.deadlines, names.outbox, *names.of_basket(basket["order"], "b")[:3]]
    keys += [names.ended("b"), names.stock("a")]
    args = [partition.connections.server_now_ms() + 5_000, EPOCH, basket["order"], "b", items]
    args += [1000, "n", '"n"', "0" * 32]
    return lambda one: one.connections.call(load("remake"), keys, args)


async def retire(partition: LuaPartition) -> Act:
    await partition.switch("closed")
    names = partition.keys
    keys = [names.sale, names.deadlines, names.confirming, names.deposits, names.outbox]
    args = [partition.connections.server_now_ms() + 5_000, EPOCH, *partition.mark, 0, "retiring:"]
    return lambda one: one.connections.call(load("retire"), keys, args)


def plainly(act: Act) -> Callable[[LuaPartition], Awaitable[Act]]:
    async def prepared(_: LuaPartition) -> Act:
        return act

    return prepared


ITEMS = [("a", "A", 1000, 12, 3), ("b", "B", 500, 5, 5)]
#: Per script: a name, its call, and how many refills it counts.
CALLS: dict[str, list[tuple[str, Callable[[LuaPartition], Awaitable[Act]], int]]] = {
    "add_tombstones": [("", replace, 0)],
    "borrow": [
        ("", plainly(lambda one: one.borrow(up_to=3)), 1),
        ("and hold", plainly(lambda one: one.borrow(up_to=3, waiting=one.basket())), 1),
        ("again", plainly(lambda one: one.borrow(number=0)), 0),
    ],
    "claim": [("", claim, 0), ("late", claim_late, 1), ("again", claim_again, 0)],
    "expire": [("", expire, 1), ("two", expire_two, 2)],
    "finish": [
        ("confirmed", finish("confirmed"), 0),
        ("declined", finish("declined"), 1),
        ("expired", finish("expired"), 1),
        ("refunded", finish("refunded"), 1),
        ("refunded without restock", finish("refunded", restock=0), 0),
        ("voided", finish("voided", attempt=""), 0),
        ("voided late", void_late, 1),
    ],
    "lease": [("", lease, 0)],
    "lend": [("", plainly(lambda one: one.lend()), 0)],
    "lend_again": [("", plainly(lambda one: one.lend_again()), 0)],
    "prepare": [("", plainly(lambda one: one.hold()), 0)],
    "put_sale": [
        ("of the same totals", plainly(lambda one: one.put(version=1, digest="e")), 0),
        ("of other totals", plainly(lambda one: one.put(version=1, digest="e", items=ITEMS)), 1),
        (
            "of a new item",
            plainly(
                lambda one: one.put(
                    version=1, digest="e", items=[*ITEMS[1:], ("c", "C", 5, 1, 1)], leaving=["a"]
                )
            ),
            1,
        ),
    ],
    "refund": [("", refund(1), 1), ("without restock", refund(0), 0)],
    "release": [("", release, 1)],
    "remake": [("", remake, 0)],
    "restock": [("", plainly(lambda one: one.restock()), 1)],
    "restore_order": [("", put_back, 0)],
    "retire": [("", retire, 0)],
    "switch": [("", plainly(lambda one: one.switch("paused")), 0)],
    "touch": [
        ("", plainly(lambda one: one.connections.call(load("touch"), [one.keys.sale], [])), 0)
    ],
}
ACTS = {
    f"{script} {name}".strip(): (act, refills)
    for script, calls in CALLS.items()
    for name, act, refills in calls
}


async def available(partition: LuaPartition) -> dict[str, int]:
    found = {}
    for sku in "abc":
        text = await partition.connections.command("HGET", partition.keys.stock(sku), "available")
        found[sku] = int(text or 0)
    return found


def test_each_script_that_may_change_a_partition_is_tried() -> None:
    assert set(CALLS) == {script.name for script in all_scripts()} - OF_A_REBUILD - OF_READERS


@pytest.mark.parametrize("name", ACTS)
async def test_each_change_that_frees_units_counts_as_a_refill(
    partition: LuaPartition, name: str
) -> None:
    arranged, refills = ACTS[name]
    act = await arranged(partition)
    units, count = await available(partition), await partition.refills()
    await act(partition)
    after = await available(partition)
    assert await partition.refills() - count == refills
    rose = any(after[sku] > units[sku] for sku in units)
    # A late claim frees no units, and only lifts the deadline of an overdue hold.
    assert rose <= bool(refills)


@pytest.mark.parametrize("name", sorted({"release", "restock", "expire", "claim late", "refund"}))
async def test_a_sale_without_the_field_counts_no_refills(
    partition: LuaPartition, name: str
) -> None:
    names = partition.keys
    await partition.connections.command("HDEL", names.sale, "refills")
    arranged, _ = ACTS[name]
    await (await arranged(partition))(partition)
    assert await partition.connections.command("HEXISTS", names.sale, "refills") == 0


async def test_a_sale_cannot_become_a_partition(sale: LuaSale, partition: LuaPartition) -> None:
    assert await sale.put(version=1, digest="e", refills=0) == ["fixed", "refills"]
    reply = await partition.put(version=1, digest="e", refills=0)
    assert reply == ["fixed", "refills"]
