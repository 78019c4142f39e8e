"""Corrupt data: an error reply leaves no write behind; a sale without its outbox is not touched.

Redis rolls nothing back when a script fails half-way, so each script must find every cause of a
later failure before its first write. Each test here takes the ordinary call of every mutating
script, damages one value that the call reads or writes, and compares the whole sale afterwards.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.exceptions import ResponseError

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import UnexpectedReply, unwrap
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import EPOCH, NOW, LuaSale

#: Buyers of the scene, each with one order in the state of that name.
HELD, DUE, PAYING, FROZEN, SOLD, ENDED, NEW = (
    "held",
    "due",
    "paying",
    "frozen",
    "sold",
    "ended",
    "new",
)
LINES = {"a": 1, "b": 1}
ROW_A, ROW_B = ("a", "A", 1000, 10, 3), ("b", "B", 500, 9, 5)


class Scene:
    """A sale with an order in each initial state of a script; it can be restored."""

    def __init__(self, sale: LuaSale) -> None:
        self.sale = sale
        self.baskets: dict[str, dict[str, Any]] = {}
        self.keys: list[str] = []

    async def set_up(self) -> None:
        await self.sale.put(items=[ROW_A, ROW_B])
        for name in (HELD, DUE, PAYING, FROZEN, SOLD, ENDED):
            self.baskets[name] = await self.sale.hold(name, lines=LINES)
        for name in (PAYING, FROZEN, SOLD):
            await self.sale.claim(self.baskets[name], f"pk-{name}")
        await self.sale.finish(self.baskets[SOLD], 1, "confirmed")
        await self.sale.release(self.baskets[ENDED])
        await self.sale.restock(operation="earlier")
        if isinstance(self.sale, LuaPartition):
            await self.sale.lend(operation="earlier")
            await self.sale.borrow()
        await self.sale.run_out(self.baskets[DUE])
        command = self.sale.connections.command
        over = str(NOW.now_ms() - 1)
        await command("ZADD", self.sale.keys.confirming, over, self.baskets[FROZEN]["order"])
        self.baskets[NEW] = self.sale.basket(NEW, lines=LINES)
        self.keys = await self.all_keys()
        await self.pipeline(*(("COPY", key, self.aside(key)) for key in self.keys))

    def aside(self, key: str) -> str:
        return f"aside:{key}"

    async def all_keys(self) -> list[str]:
        return sorted(await self.sale.connections.command("KEYS", f"{self.sale.keys.all}*"))

    async def pipeline(self, *commands: tuple[str, ...]) -> list[Any]:
        return [unwrap(reply) for reply in await self.sale.connections.pipeline(commands)]

    async def restore(self) -> None:
        """Restore the sale to the snapshot of `set_up`."""
        await self.pipeline(
            ("DEL", *await self.all_keys()),
            *(("COPY", self.aside(key), key) for key in self.keys),
        )

    async def forget(self) -> None:
        await self.pipeline(("DEL", *map(self.aside, self.keys)))

    async def digest(self) -> list[str]:
        """One value per key of the sale, for every Redis type."""
        keys = await self.all_keys()
        return [*keys, *await self.sale.connections.command("DEBUG", "DIGEST-VALUE", *keys)]

    async def keys_of(self, call: "Call", kind: str | None = None) -> list[str]:
        """The keys that an ordinary call passes; `kind` filters them by type."""
        handed: list[str] = []
        run = self.sale.connections.call

        async def note(script: Any, keys: Any, args: Any, **how: Any) -> Any:
            handed.extend(keys)
            return await run(script, keys, args, **how)

        self.sale.connections.call = note
        try:
            await call(self)
        finally:
            self.sale.connections.call = run
        await self.restore()
        if kind is None:
            return handed
        types = await self.pipeline(*(("TYPE", key) for key in handed))
        return [key for key, found in zip(handed, types, strict=True) if found == kind]


Call = Callable[[Scene], Awaitable[Any]]


def put(scene: Scene) -> Awaitable[Any]:
    return scene.sale.put(version=2, digest="d2", name="New", items=[ROW_A, ROW_B])


#: An ordinary call of each script; it succeeds in the undamaged scene.
CALLS: dict[str, Call] = {
    "prepare": lambda scene: scene.sale.prepare(scene.baskets[NEW], rate=(50, 20)),
    "claim": lambda scene: scene.sale.claim(scene.baskets[HELD]),
    "claim again": lambda scene: scene.sale.claim(scene.baskets[ENDED]),
    "lease": lambda scene: scene.sale.lease(scene.baskets[FROZEN], 1),
    "lease move": lambda scene: scene.sale.lease(scene.baskets[PAYING], 1, "move"),
    "finish confirmed": lambda scene: scene.sale.finish(scene.baskets[PAYING], 1, "confirmed"),
    "finish withdrawn": lambda scene: scene.sale.finish(
        scene.baskets[PAYING], 1, "refunded", restock=0
    ),
    "finish declined": lambda scene: scene.sale.finish(scene.baskets[PAYING], 1, "declined"),
    "finish voided": lambda scene: scene.sale.finish(
        scene.baskets[PAYING], 1, "voided", attempt=""
    ),
    "release": lambda scene: scene.sale.release(scene.baskets[HELD]),
    "expire": lambda scene: scene.sale.expire(scene.baskets[DUE]),
    "refund": lambda scene: scene.sale.refund(scene.baskets[SOLD]),
    "refund without restock": lambda scene: scene.sale.refund(scene.baskets[SOLD], restock=0),
    "put_sale": put,
    "restock": lambda scene: scene.sale.restock(),
    "switch": lambda scene: scene.sale.switch("paused"),
}

#: Likewise in a partition, for the scripts that only partitions have, and for refills.
CALLS_IN_PARTITIONS: dict[str, Call] = {
    "lend": lambda scene: partition_of(scene).lend(after=1),
    "borrow": lambda scene: partition_of(scene).borrow(number=2, up_to=3),
    "borrow and hold": lambda scene: partition_of(scene).borrow(
        number=2, up_to=3, waiting=scene.baskets[NEW], rate=(50, 20)
    ),
    "release in a partition": lambda scene: scene.sale.release(scene.baskets[HELD]),
    "claim late": lambda scene: scene.sale.claim(scene.baskets[DUE]),
}


def partition_of(scene: Scene) -> LuaPartition:
    assert isinstance(scene.sale, LuaPartition)
    return scene.sale


async def scene_at(url: str, call: Call) -> AsyncIterator[Scene]:
    connections = RedisClient(url, clock=NOW)
    await connections.measure_offset()
    in_partition = call in CALLS_IN_PARTITIONS.values()
    made = Scene(LuaPartition(connections) if in_partition else LuaSale(connections))
    await made.set_up()
    yield made
    await made.restore()
    await made.sale.check()
    await made.forget()
    await connections.aclose()


@pytest.fixture
async def each_scene(each_server_url: str, call: Call) -> AsyncIterator[Scene]:
    async for scene in scene_at(each_server_url, call):
        yield scene


@pytest.fixture
async def scene(valkey_url: str, call: Call) -> AsyncIterator[Scene]:
    async for made in scene_at(valkey_url, call):
        yield made


@pytest.fixture(params=[*CALLS, *CALLS_IN_PARTITIONS])
def call(request: pytest.FixtureRequest) -> Call:
    return (CALLS | CALLS_IN_PARTITIONS)[request.param]


async def test_each_tested_call_succeeds_in_an_undamaged_sale(scene: Scene, call: Call) -> None:
    """A precondition of the tests below."""
    before = await scene.digest()
    await call(scene)
    assert await scene.digest() != before
    await scene.sale.check()


async def test_a_key_of_the_wrong_type_leaves_no_partial_write(
    each_scene: Scene, call: Call
) -> None:
    half_written: list[str] = []
    for key in await each_scene.keys_of(call):
        await each_scene.pipeline(("DEL", key), ("RPUSH", key, "not what it should be"))
        before = await each_scene.digest()
        refused = await refusal_of(each_scene, call)
        # A key that this call does not use may hold anything.
        if refused and await each_scene.digest() != before:
            half_written.append(key)
        if key in {each_scene.sale.keys.sale, each_scene.sale.keys.outbox}:
            assert refused, key
        await each_scene.restore()
    assert half_written == []


@pytest.mark.parametrize("garbage", ["x", "1.5", "99999999999999999999", None])
async def test_an_error_reply_implies_no_write(
    scene: Scene, call: Call, garbage: str | None
) -> None:
    """Each field of each hash in turn is edited by hand, or lost."""
    half_written: list[tuple[str, str]] = []
    for key in await scene.keys_of(call, "hash"):
        for field in await scene.sale.connections.command("HKEYS", key):
            edit = ("HDEL", key, field) if garbage is None else ("HSET", key, field, garbage)
            await scene.pipeline(edit)
            before = await scene.digest()
            if await refusal_of(scene, call) and await scene.digest() != before:
                half_written.append((key, field))
            await scene.restore()
    assert half_written == []


async def refusal_of(scene: Scene, call: Call) -> str:
    """The error or the `recovering` of a call; empty if the call succeeded."""
    try:
        [answer, *_] = await call(scene)
    except UnexpectedReply as error:
        return str(error)
    # In a batch each order has its own reply.
    if isinstance(answer, ResponseError):
        return str(answer)
    return "recovering" if "recovering" in (answer, answer[0]) else ""


#: Damage to one buyer's data, or to an item that only this buyer requests.
DAMAGE = {
    "count": ("HSET", "buyer", "b", "x"),
    "paid": ("HSET", "buyer", ":paid", "x"),
    "buyer": ("SET", "buyer", "x"),
    "list": ("SET", "buyer_orders", "x"),
    "rate": ("RPUSH", "rate", "x"),
    "order": ("SET", "order", "x"),
    "stock": ("HSET", "stock", "available", "-1"),
    "price": ("HDEL", "stock", "price"),
    "item": ("SET", "stock", "x"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_an_error_in_a_batch_is_the_reply_of_its_basket_only(
    sale: LuaSale, damage: tuple[str, ...]
) -> None:
    """The other baskets of the batch are held or refused as if it were absent."""
    for _ in range(2):
        await sale.hold("damaged")
    first, damaged, greedy, last = (
        sale.basket("first", lines={"a": 2}),
        sale.basket("damaged", lines={"b": 1}),
        sale.basket("greedy", lines={"a": 4}),
        sale.basket("last", lines={"a": 1}),
    )
    keys = dict(
        zip(
            ("order", "buyer", "buyer_orders", "rate"),
            sale.keys.of_basket(damaged["order"], "damaged"),
            strict=True,
        ),
        stock=sale.keys.stock("b"),
    )
    command, key, *edit = damage
    await sale.connections.command("COPY", keys[key], f"aside:{keys[key]}")
    if command in ("SET", "RPUSH"):
        await sale.connections.command("DEL", keys[key])
    await sale.connections.command(command, keys[key], *edit)
    replies = await sale.prepare(
        first, damaged, greedy, last, rate=(50, 20), sustained=(20, 60_000), unpaid_max=1
    )
    assert [reply[0] for reply in (replies[0], *replies[2:])] == ["held", "limit_exceeded", "held"]
    assert isinstance(replies[1], ResponseError)
    assert await sale.stock("a") == (10, 5, 5, 0)
    if key != "order":
        assert await sale.order(damaged) == {}
    # Restore the key, so that the sale can be checked.
    await sale.connections.command("DEL", keys[key])
    if await sale.connections.command("EXISTS", f"aside:{keys[key]}"):
        await sale.connections.command("RENAME", f"aside:{keys[key]}", keys[key])


@pytest.mark.parametrize("damage", ["gone", "tail cut", "tail forged", "emptied", "another epoch"])
async def test_a_sale_without_its_outbox_or_epoch_is_left_unchanged(
    scene: Scene, call: Call, damage: str
) -> None:
    names = scene.sale.keys
    [[last, *_]] = await scene.sale.connections.command(
        "XREVRANGE", names.outbox, "+", "-", "COUNT", 1
    )
    seq = int(last.partition("-")[0])
    damages = {
        "gone": ("DEL", names.outbox),
        "tail cut": ("XDEL", names.outbox, last),
        "tail forged": ("XADD", names.outbox, f"{seq + 1}-0", "event", "forged"),
        "emptied": ("XTRIM", names.outbox, "MAXLEN", "0"),
        "another epoch": ("HSET", names.sale, "epoch", f"{EPOCH}-restored"),
    }
    await scene.pipeline(damages[damage])
    before = await scene.digest()
    assert await refusal_of(scene, call) == "recovering"
    assert await scene.digest() == before
