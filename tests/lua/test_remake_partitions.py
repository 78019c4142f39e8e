"""remake.lua in a partition: a lost order that is short there is dry, and never sold out."""

from tests.lua.test_remake import remake
from tests.support.lua_partition import LuaPartition


async def test_a_lost_order_is_dry(partition: LuaPartition) -> None:
    await partition.sold("ann", lines={"b": 5})
    lost = partition.basket("bob", lines={"b": 1})
    async with partition.unchanged():
        assert await remake(partition, lost) == ["dry", "", "b", "0"]
    await partition.borrow(sku="b")
    assert await remake(partition, lost) == ["done"]


async def test_overdue_holds_end_before_a_lost_order_is_dry(partition: LuaPartition) -> None:
    """They may complete a basket whose other units come from other partitions."""
    await partition.sold("ann", lines={"b": 4})
    old = await partition.hold("old", lines={"b": 1})
    await partition.run_out(old)
    lost = partition.basket("eve", lines={"b": 3})
    async with partition.unchanged():
        assert await remake(partition, lost) == ["due", old["order"]]
    await partition.expire(old)
    async with partition.unchanged():
        assert await remake(partition, lost) == ["dry", "", "b", "1"]


async def test_the_limit_of_the_buyer_is_final_for_a_lost_order(partition: LuaPartition) -> None:
    await partition.hold("bob", lines={"a": 3})
    lost = partition.basket("bob", lines={"a": 1})
    async with partition.unchanged():
        assert await remake(partition, lost) == ["limit_exceeded", "a", "3", "3"]
