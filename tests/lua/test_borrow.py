"""borrow.lua: each result word; units are received once, and with the hold that waits for them."""

from typing import Any

import pytest

from reservation.adapters.redis.errors import UnexpectedReply
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import LOST, NOW, LuaSale


async def take_all(partition: LuaPartition, sku: str = "a", units: int = 10) -> None:
    """Let other buyers hold every unit."""
    for number in range(units):
        await partition.hold(f"other-{sku}-{number}", lines={sku: 1})


async def test_a_borrow_receives_the_units(partition: LuaPartition) -> None:
    assert await partition.borrow(up_to=4) == ["borrowed", "4", []]
    assert await partition.stock() == (14, 14, 0, 0)
    assert await partition.transfers() == {"received:1:a": "1 4"}
    assert await partition.refills() == 1


async def test_a_transfer_is_received_once(partition: LuaPartition) -> None:
    await partition.borrow(number=2, up_to=4)
    async with partition.unchanged():
        for number in (1, 2):
            assert await partition.borrow(number=number, up_to=4) == ["done"]


async def test_a_borrow_takes_the_difference_to_all_units_received(
    partition: LuaPartition,
) -> None:
    """After a restore, one repeated lend of the donor stands for several numbers."""
    await partition.borrow(number=1, up_to=2)
    assert await partition.borrow(number=4, up_to=7) == ["borrowed", "5", []]
    assert await partition.transfers() == {"received:1:a": "4 7"}
    assert await partition.stock() == (17, 17, 0, 0)


async def test_the_transfers_of_each_donor_and_sku_count_alone(partition: LuaPartition) -> None:
    await partition.borrow(1, up_to=2)
    await partition.borrow(2, up_to=3)
    await partition.borrow(1, "b", up_to=4)
    assert await partition.transfers() == {
        "received:1:a": "1 2",
        "received:2:a": "1 3",
        "received:1:b": "1 4",
    }


async def test_a_borrow_takes_the_hold_that_waits_for_it(partition: LuaPartition) -> None:
    await take_all(partition)
    waiting = partition.basket("ann", lines={"a": 2})
    word, units, expires_at, created_at, seq, items = await partition.borrow(
        up_to=3, waiting=waiting
    )
    assert (word, units, items) == ("held", "3", '[["a",2,1000]]')
    assert int(expires_at) == int(created_at) + 300_000
    order = await partition.order(waiting)
    assert (order["status"], order["seq"], order["buyer"]) == ("HELD", seq, "ann")
    assert await partition.stock() == (13, 1, 12, 0)
    assert await partition.bought("ann") == {"a": "2"}
    assert (await partition.last_event())[0] == "prepared"
    assert (await partition.last_event(back=1))[0] == "borrowed"
    assert await partition.expire(waiting) == ["not_due"]
    assert (await partition.claim(waiting))[0] == "claimed"


async def test_a_hold_takes_borrowed_and_own_units(partition: LuaPartition) -> None:
    await take_all(partition, units=9)
    waiting = partition.basket("ann", lines={"b": 2, "a": 3})
    assert (await partition.borrow(up_to=2, waiting=waiting))[0] == "held"
    assert await partition.stock("a") == (12, 0, 12, 0)
    assert await partition.stock("b") == (5, 3, 2, 0)


async def test_a_sale_that_holds_later_prepares_the_order(partition: LuaPartition) -> None:
    later = LuaPartition(partition.connections)
    await later.put(hold_policy="success", items=[("a", "A", 1000, 0, 3)])
    waiting = later.basket()
    reply = await later.borrow(up_to=1, waiting=waiting)
    assert reply[:2] == ["prepared", "1"]
    assert await later.stock() == (1, 1, 0, 0)


#: The refusal of the waiting order, by the state of the partition.
async def refused(partition: LuaPartition, why: str) -> tuple[dict[str, Any], dict[str, Any]]:
    waiting, how = partition.basket("ann", lines={"a": 1}), {}
    match why:
        case "replayed":
            await partition.prepare(waiting)
        case "key_reused":
            await partition.prepare(waiting)
            waiting["digest"] = "1" * 32
        case "limit_exceeded":
            await partition.hold("ann", lines={"a": 3})
        case "too_many_orders":
            await partition.release(await partition.hold("ann"))
            how = {"unpaid_max": 1}
        case "rate_limited":
            await partition.hold("ann")
            how = {"rate": (60_000, 1)}
        case "sku_not_found":
            waiting["lines"]["z"] = 1
        case "amount_mismatch":
            waiting["amount"] += 1
        case "not_admitted":
            await partition.put(version=1, digest="e", require_admission=1)
        case "not_open":
            await partition.put(version=1, digest="e", opens_at=NOW.now_ms() + 60_000)
        case "closed" | "paused":
            await partition.switch(why)
        case _:
            waiting["lines"] = {"a": 1, "b": 6}
            waiting["amount"] = 4000
    return waiting, how


@pytest.mark.parametrize(
    "why",
    [
        "replayed",
        "key_reused",
        "limit_exceeded",
        "too_many_orders",
        "rate_limited",
        "sku_not_found",
        "amount_mismatch",
        "not_admitted",
        "not_open",
        "closed",
        "paused",
    ],
)
async def test_units_are_received_although_the_order_is_refused(
    partition: LuaPartition, why: str
) -> None:
    waiting, how = await refused(partition, why)
    before = await partition.stock()
    word, units, refusal = await partition.borrow(up_to=2, waiting=waiting, **how)
    assert (word, units, refusal[0]) == ("borrowed", "2", why)
    total, available, *taken = before
    assert await partition.stock() == (total + 2, available + 2, *taken)
    assert await partition.transfers() == {"received:1:a": "1 2"}


async def test_an_order_that_lacks_other_units_still_waits(partition: LuaPartition) -> None:
    await take_all(partition, "b", 5)
    waiting = partition.basket("ann", lines={"a": 1, "b": 2})
    word, units, refusal = await partition.borrow(up_to=1, waiting=waiting)
    assert (word, units, refusal[0], refusal[2:]) == (
        "borrowed",
        "1",
        "dry",
        ["a", "11", "b", "0"],
    )
    assert await partition.order(waiting) == {}
    assert (await partition.borrow(1, "b", up_to=2, waiting=waiting))[0] == "held"


async def test_overdue_holds_that_may_help_are_reported(partition: LuaPartition) -> None:
    await take_all(partition, "b", 4)
    old = await partition.hold("old", lines={"b": 1})
    await partition.run_out(old)
    waiting = partition.basket("ann", lines={"a": 1, "b": 1})
    assert await partition.borrow(waiting=waiting) == ["borrowed", "1", ["due", old["order"]]]


async def test_an_item_that_the_partition_lacks_leaves_the_transfer_open(
    partition: LuaPartition,
) -> None:
    async with partition.unchanged():
        assert await partition.borrow(1, "z") == ["sku_not_found", "z"]


async def test_a_partition_with_tombstones_needs_the_bucket(partition: LuaPartition) -> None:
    old = await partition.hold("ann")
    await partition.release(old)
    assert await partition.add_tombstones(old, up_to=3) == ["done", "1", "0"]
    waiting = partition.basket("ann")
    async with partition.unchanged():
        assert await partition.borrow(waiting=waiting) == ["tombstones"]
    repeat = {**waiting, "order": old["order"]}
    reply = await partition.borrow(waiting=repeat, bucket=True)
    assert reply == ["borrowed", "1", ["replayed"]]
    reply = await partition.borrow(number=2, up_to=2, waiting=waiting, bucket=True)
    assert reply[0] == "held"
    assert await partition.borrow(number=3, up_to=3) == ["borrowed", "1", []]


async def test_a_hold_by_a_borrow_counts_against_the_buyers_rate(
    partition: LuaPartition,
) -> None:
    rate = (60_000, 2)
    waiting = [partition.basket("ann") for _ in range(3)]
    replies = [
        await partition.borrow(number=n + 1, up_to=n + 1, waiting=waiting[n], rate=rate)
        for n in range(3)
    ]
    assert [reply[0] for reply in replies] == ["held", "held", "borrowed"]
    assert replies[2][2][0] == "rate_limited"


async def test_the_event_of_a_borrow_has_the_transfer(partition: LuaPartition) -> None:
    await partition.borrow(2, number=3, up_to=4)
    assert await partition.last_event() == (
        "borrowed",
        {
            "peer": 2,
            "sku": "a",
            "number": 3,
            "units": 4,
            "upTo": 4,
            "total": 14,
            "version": 2,
        },
    )


async def test_more_units_received_than_lent_are_a_bug(partition: LuaPartition) -> None:
    await partition.borrow(up_to=4)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="more units"):
            await partition.borrow(number=2, up_to=3)


@pytest.mark.parametrize("text", ["x", "1", "1 2 3", "1 x"])
async def test_a_damaged_number_of_loans_stops_the_borrow(
    partition: LuaPartition, text: str
) -> None:
    await partition.connections.command("HSET", partition.keys.transfers, "received:1:a", text)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="damaged"):
            await partition.borrow(number=9, up_to=9)


async def test_an_outdated_or_late_borrow_changes_nothing(partition: LuaPartition) -> None:
    waiting = partition.basket()
    async with partition.unchanged():
        assert await partition.borrow(waiting=waiting, epoch="other") == ["recovering"]
        assert await partition.borrow(waiting=waiting, late=1) == ["too_late"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_receives_nothing(
    partition: LuaPartition, what: str
) -> None:
    await partition.hold()
    async with partition.unchanged():
        assert await partition.borrow(mark=partition.lost(what)) == ["went_back"]


async def test_a_sale_of_one_partition_borrows_nothing(sale: LuaSale) -> None:
    names = sale.keys
    keys = [*names.of_prepare[:3], names.confirming, names.deposits, names.transfers]
    args = [NOW.now_ms(), 0, 0, 0, 0, 0, 1, 1, 1, 1, "a"]
    async with sale.unchanged():
        with pytest.raises(UnexpectedReply, match="not a partition"):
            await sale.call("borrow", [*keys, names.stock("a")], *args)


@pytest.mark.parametrize(
    ("field", "waits"),
    [("version", False), ("total", False), ("currency", True), ("hold_seconds", True)],
)
async def test_a_missing_field_stops_the_borrow(
    partition: LuaPartition, field: str, waits: bool
) -> None:
    names, command = partition.keys, partition.connections.command
    key = names.stock("a") if field == "total" else names.sale
    before = await command("HGET", key, field)
    await command("HDEL", key, field)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="BUG borrow"):
            await partition.borrow(waiting=partition.basket() if waits else None)
    await command("HSET", key, field, before)


async def test_a_borrow_without_a_waiting_order_needs_no_hold_time(partition: LuaPartition) -> None:
    await partition.connections.command("HDEL", partition.keys.sale, "hold_seconds")
    assert await partition.borrow() == ["borrowed", "1", []]


async def test_a_caller_with_the_current_mark_is_served(partition: LuaPartition) -> None:
    await partition.hold()
    assert (await partition.borrow(mark=partition.mark))[0] == "borrowed"


async def test_damaged_data_of_the_buyer_stops_the_borrow(partition: LuaPartition) -> None:
    """A worker then finishes the transfer without the order."""
    waiting, buyer = partition.basket("ann"), partition.keys.buyer("ann")
    await partition.connections.command("HSET", buyer, "a", "x")
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="BUG borrow: the buyer's count of a"):
            await partition.borrow(waiting=waiting)
    await partition.connections.command("DEL", buyer)
    assert await partition.borrow() == ["borrowed", "1", []]


async def test_the_sustained_rate_applies_to_a_hold_by_a_borrow(partition: LuaPartition) -> None:
    for _ in range(2):
        await partition.hold("ann")
    waiting = partition.basket("ann")
    word, _, refusal = await partition.borrow(waiting=waiting, rate=(1, 20), sustained=(2, 60_000))
    assert (word, refusal[0]) == ("borrowed", "rate_limited")
    assert 30_000 < int(refusal[1]) <= 60_000


async def test_a_later_number_without_more_units_is_taken(partition: LuaPartition) -> None:
    await partition.borrow(number=1, up_to=2)
    assert await partition.borrow(number=2, up_to=2) == ["borrowed", "0", []]
    assert await partition.transfers() == {"received:1:a": "2 2"}


async def test_orders_with_a_hold_are_not_unpaid_ones(partition: LuaPartition) -> None:
    await partition.borrow()
    await partition.hold("ann")
    waiting = partition.basket("ann")
    reply = await partition.borrow(number=2, up_to=2, waiting=waiting, unpaid_max=1)
    assert reply[0] == "held"


async def test_a_put_from_before_a_borrow_removes_no_units(partition: LuaPartition) -> None:
    await partition.borrow(up_to=4)
    async with partition.unchanged():
        assert await partition.put(version=1) == ["changed", "2"]
