"""prepare.lua in a partition: its own stock is not all, so it is dry and never sold out."""

from tests.support.lua_partition import LuaPartition


async def test_a_partition_that_is_short_is_dry(partition: LuaPartition) -> None:
    await partition.sold("ann", lines={"b": 5})
    wish = partition.basket("bob", lines={"a": 1, "b": 1})
    assert await partition.prepare(wish) == [["dry", "", "a", "10", "b", "0"]]
    assert await partition.refills() == 0


async def test_a_repeated_dry_reply_is_its_number(partition: LuaPartition) -> None:
    await partition.sold("ann", lines={"b": 5})
    wishes = [partition.basket(name, lines={"b": 1}) for name in ("bob", "eve", "kim")]
    assert await partition.replies(*wishes) == [["dry", "", "b", "0"], -1, -1]


async def test_overdue_holds_end_before_a_partition_is_dry(partition: LuaPartition) -> None:
    """They may complete a basket whose other units come from other partitions."""
    await partition.sold("ann", lines={"b": 4})
    old = await partition.hold("old", lines={"b": 1})
    await partition.run_out(old)
    wish = partition.basket("bob", lines={"b": 3})
    assert await partition.prepare(wish) == [["due", old["order"]]]
    assert await partition.expire(old) == ["expired"]
    assert await partition.prepare(wish) == [["dry", "", "b", "1"]]


async def test_a_limit_is_final_in_a_partition(partition: LuaPartition) -> None:
    await partition.hold("ann", lines={"a": 3})
    reply = await partition.prepare(partition.basket("ann"))
    assert reply == [["limit_exceeded", "a", "3", "3"]]
