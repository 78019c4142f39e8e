"""claim.lua in a partition: a basket that is short there is dry, and never sold out or expired."""

from tests.support.lua_partition import LuaPartition

DRY = ["dry", "", "b", "0"]


async def test_a_claim_that_takes_stock_later_is_dry(partition: LuaPartition) -> None:
    later = LuaPartition(partition.connections)
    await later.put(hold_policy="success")
    waiting = await later.hold("bob", lines={"b": 1})
    await later.sold("ann", lines={"b": 5})
    async with later.unchanged():
        assert await later.claim(waiting) == DRY
    await later.borrow(sku="b")
    assert (await later.claim(waiting))[0] == "claimed"
    await later.check()


async def test_a_claim_after_the_deadline_is_dry(partition: LuaPartition) -> None:
    late = await partition.hold("bob", lines={"b": 1})
    await partition.run_out(late)
    await partition.expire(late)
    await partition.sold("ann", lines={"b": 5})
    async with partition.unchanged():
        assert await partition.claim(late) == DRY
    await partition.borrow(sku="b")
    assert (await partition.claim(late))[0] == "claimed"


async def test_a_claim_in_an_ended_sale_is_expired_and_not_dry(partition: LuaPartition) -> None:
    late = await partition.hold("bob", lines={"b": 1})
    await partition.release(late)
    await partition.sold("ann", lines={"b": 5})
    await partition.switch("closed")
    assert await partition.claim(late) == ["expired"]


async def test_overdue_holds_end_before_a_claim_is_dry(partition: LuaPartition) -> None:
    """They may complete a basket whose other units come from other partitions."""
    late = await partition.hold("bob", lines={"b": 3})
    await partition.release(late)
    await partition.sold("ann", lines={"b": 4})
    old = await partition.hold("old", lines={"b": 1})
    await partition.run_out(old)
    async with partition.unchanged():
        assert await partition.claim(late) == ["due", old["order"]]
    await partition.expire(old)
    async with partition.unchanged():
        assert await partition.claim(late) == ["dry", "", "b", "1"]


async def test_the_limit_of_the_buyer_is_final_for_a_claim(partition: LuaPartition) -> None:
    late = await partition.hold("bob", lines={"a": 1})
    await partition.release(late)
    await partition.hold("bob", lines={"a": 3})
    async with partition.unchanged():
        assert await partition.claim(late) == ["limit_exceeded", "a", "3", "3"]
