"""Partition replay: the partitions of a model's world on a real server, one script per step.

A step of the model runs one of its pure scripts; the replay runs the Lua script of the same name
on the partition that the step names, compares the words, and then the whole partition.
"""

import itertools
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.redis.partitions.readings import PartitionReader
from reservation.domain.certificate import Certificate, Doubt, Reading, judge, sku_short
from reservation.domain.errors import SaleRecovering
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import NOW, PRICES
from tests.unit.partitions.sale import CONFIRMING, HELD, SOLD, Lot, Order, Partition, Reply
from tests.unit.partitions.world import Buyer, Scenario, World

__all__ = ["Replay", "is_replayed"]

#: The model numbers the SKUs.
SKUS = "ab"
STATUS = {HELD: "HELD", CONFIRMING: "CONFIRMING", SOLD: "CONFIRMED"}
#: The model does not keep these orders.
ENDED = {None, "RELEASED", "EXPIRED"}
ACTIONS = frozenset({"take", "release", "claim", "decline", "sell"})


def is_replayed(label: Sequence[Any], world: World, scenario: Scenario) -> bool:
    """Whether the scripts have this step; they do not remake an order after its payment."""
    if len(label) < 2 or label[1] != "sell":
        return True
    order = _order_of(scenario, world, _buyer_of(label, world).order)
    return order is not None and order.status == CONFIRMING


def _buyer_of(label: Sequence[Any], world: World) -> Buyer:
    actor = world.actors[int(str(label[0]).split()[1])]
    assert isinstance(actor, Buyer)
    return actor


def _order_of(scenario: Scenario, world: World, number: int) -> Order | None:
    partition = world.partitions[scenario.sale.baskets[number].home]
    return next((order for order in partition.orders if order.number == number), None)


class Replay:
    """One history on the server.

    Args:
        seen: counts the words that the scripts replied, for all histories of a test.
    """

    def __init__(self, connections: RedisClient, scenario: Scenario, seen: Counter[str]) -> None:
        self._scenario, self._sale = scenario, scenario.sale
        self._id = f"replay-{secrets.token_hex(4)}"
        self._partitions = [
            LuaPartition(connections, self._id, place) for place in range(self._sale.partitions)
        ]
        self._reader = PartitionReader(connections, Keys())
        self._connections = connections
        self._seen = seen
        #: The current order of each number; a number that is taken again is another order.
        self._baskets: dict[int, dict[str, Any]] = {}
        self._fences: dict[int, str] = {}
        self._numbers = itertools.count()
        #: The last lend of each donor, receiver and SKU: its `after` and its operation.
        self._lends: dict[tuple[int, int, str], tuple[int, str]] = {}
        #: The readings of each buyer's certificate.
        self._readings: dict[int, list[Reading]] = {}

    @property
    def _skus(self) -> str:
        return SKUS[: self._sale.skus]

    async def open(self) -> None:
        """Bring the server to the first state of the scenario."""
        for place, start in enumerate(self._scenario.partitions):
            rows = self._rows(start.total)
            assert await self._partitions[place].put(items=rows) == ["done", "1"]
            for order in start.orders:
                basket = self._new_basket(order.number)
                assert (await self._partitions[place].prepare(basket))[0][0] == "held"
                if order.is_due:
                    await self._partitions[place].run_out(basket)
            await self.compare(place, start)

    def _rows(self, totals: Sequence[int]) -> list[tuple[str, str, int, int, int]]:
        limit = self._sale.limit
        return [(s, s, PRICES[s], t, limit) for s, t in zip(self._skus, totals, strict=True)]

    def _new_basket(self, number: int) -> dict[str, Any]:
        wanted = self._sale.baskets[number]
        lines = {s: units for s, units in zip(self._skus, wanted.wants, strict=True) if units}
        basket = self._partitions[wanted.home].basket(f"buyer-{wanted.buyer}", lines=lines)
        self._baskets[number] = basket
        return basket

    def _basket(self, world: World, number: int) -> dict[str, Any]:
        """Return the order as the server has it, or a new one where the model has none."""
        if _order_of(self._scenario, world, number):
            return self._baskets[number]
        return self._new_basket(number)

    async def step(self, label: Sequence[Any], before: World, after: World) -> None:
        """Run the script of a step, and compare its reply and its partition."""
        place = await self._run(label, before)
        if place is not None:
            await self.compare(place, after.partitions[place])

    async def end(self, world: World) -> None:
        """Compare every partition, and the chain of each outbox."""
        for place, partition in enumerate(self._partitions):
            await self.compare(place, world.partitions[place])
            await partition.check()

    async def _run(self, label: Sequence[Any], before: World) -> int | None:
        match label:
            case ("time", _, number):
                await self._partitions[self._sale.baskets[number].home].run_out(
                    self._baskets[number]
                )
                return self._sale.baskets[number].home
            case ("worker", "expire", place):
                return await self._expire(before, place)
            case ("worker", "borrow", receiver, donor, sku, number, _, word):
                up_to = self._up_to(before, donor, receiver, sku, number)
                assert word == await self._borrow(receiver, donor, sku, number, up_to, None, before)
                return receiver
            case ("operator" | "worker", "change", number, place):
                return await self._change(before, number, place)
            case (str() as who, *rest) if who.startswith("buyer"):
                return await self._run_buyer(rest, label, before)
            case _:
                return None

    async def _run_buyer(
        self, rest: Sequence[Any], label: Sequence[Any], before: World
    ) -> int | None:
        buyer = _buyer_of(label, before)
        match rest:
            case ("prepare" | "take", home, word):
                await self._prepare(before, buyer.order, home, word)
                return home
            case ("lend", donor, Reply() as reply):
                await self._lend(before, buyer, donor, reply)
                return donor
            case ("expire", place, _):
                return await self._expire(before, place)
            case ("borrow", home, donor, Reply() as given, word):
                found = await self._borrow(
                    home, donor, buyer.sku, given.number, given.up_to, buyer.order, before
                )
                assert word == found
                return home
            case ("read", place, _, *verdict):
                await self._read(before, label, place, verdict[0] if verdict else "")
                return place
            case (action, home, word) if action in ACTIONS:
                await self._act(before, buyer.order, home, action, word)
                return home
            case _:
                return None

    def _up_to(self, world: World, donor: int, receiver: int, sku: int, number: int) -> int:
        [row] = [
            row
            for row in world.rows
            if (row.donor, row.receiver, row.sku, row.number) == (donor, receiver, sku, number)
        ]
        return row.up_to

    async def _prepare(self, world: World, number: int, home: int, word: str) -> None:
        [[found, *facts]] = await self._partitions[home].prepare(self._basket(world, number))
        self._note("prepare", found)
        assert word == self._word_of_hold(world, number, [found, *facts])

    def _word_of_hold(self, world: World, number: int, reply: Sequence[Any]) -> str:
        """Return the model's word for a reply about a hold."""
        match reply[0]:
            case "held" | "replayed":
                return "held"
            case "limit_exceeded":
                return "limit"
            case "due" if self._waits_for_own(world, number, reply[1:]):
                # The model has no hold that may end to make room under the limit.
                return "limit"
            case word:
                return word

    def _waits_for_own(self, world: World, number: int, orders: Sequence[str]) -> bool:
        """Whether a `due` is about the buyer's limit: the buyer has too much with these orders."""
        basket = self._sale.baskets[number]
        owned = [0] * self._sale.skus
        own = set()
        for order in world.partitions[basket.home].orders:
            other = self._sale.baskets[order.number]
            if other.buyer == basket.buyer:
                owned = [a + b for a, b in zip(owned, other.wants, strict=True)]
                own.add(self._baskets[order.number]["order"])
        wants = zip(owned, basket.wants, strict=True)
        return any(w and has + w > self._sale.limit for has, w in wants) and set(orders) <= own

    async def _expire(self, world: World, place: int) -> int:
        due = [order for order in world.partitions[place].orders if order.is_due]
        if due:
            words = await self._partitions[place].expire(
                *(self._baskets[order.number] for order in due)
            )
            if world.partitions[place].recovery is not None:
                assert words == ["recovering"]
                return place
            assert words == ["expired"] * len(due)
            self._note("expire", "expired")
        return place

    async def _lend(self, world: World, buyer: Buyer, donor: int, reply: Reply) -> None:
        receiver = self._sale.baskets[buyer.order].home
        sku, units = SKUS[buyer.sku], buyer.missing[buyer.sku]
        key = (donor, receiver, sku)
        lot = world.partitions[donor].lent[self._sale.slot(receiver, buyer.sku)]
        last = self._lends.get(key)
        operation = f"op-{next(self._numbers)}"
        lender = self._partitions[donor]
        found = await lender.lend(receiver, sku, units, after=lot.number, operation=operation)
        self._note("lend", found[0])
        assert found[0] == reply.word
        if reply.word != "lent":
            return
        assert found[1:] == [str(reply.number), str(reply.units), str(reply.up_to)]
        # Two replies were lost: this lend's own, and that of the one before it.
        again = await lender.lend(receiver, sku, units, after=lot.number, operation=operation)
        assert again == found
        if last is not None:
            late = await lender.lend(receiver, sku, units, after=last[0], operation=last[1])
            assert late == ["overtaken", str(reply.number)]
        self._lends[key] = (lot.number, operation)

    async def _borrow(
        self,
        receiver: int,
        donor: int,
        sku: int,
        number: int,
        up_to: int,
        order: int | None,
        world: World,
    ) -> str:
        waiting = None if order is None else self._basket(world, order)
        found = await self._partitions[receiver].borrow(
            donor, SKUS[sku], number=number, up_to=up_to, waiting=waiting
        )
        self._note("borrow", found[0])
        if found[0] != "borrowed" or order is None or not found[2]:
            return found[0]
        self._note("refused borrow", found[2][0])
        word = self._word_of_hold(world, order, found[2])
        return word if word in {"held", "limit"} else "borrowed"

    async def _read(self, world: World, label: Sequence[Any], place: int, verdict: str) -> None:
        buyer, index = _buyer_of(label, world), int(str(label[0]).split()[1])
        wants = self._sale.baskets[buyer.order].wants
        lane = self._partitions[place]
        reading = self._reader.read(
            self._id, place, epoch=lane.epoch, partitions=self._sale.partitions, skus=[*self._skus]
        )
        if world.partitions[place].recovery is not None:
            with pytest.raises(SaleRecovering):
                await reading
            return
        found = await reading
        self._compare_reading(place, found, world.partitions[place])
        self._note("read", verdict)
        if verdict == "expire":
            assert found.due
            await self._expire(world, place)
            return
        if buyer.reads == 0:
            self._readings[index] = []
        readings = self._readings[index]
        readings.append(found)
        count = self._sale.partitions
        wanted = {s: units for s, units in zip(self._skus, wants, strict=True) if units}
        if verdict == "changed":
            first = readings[place]
            assert (first.epoch, first.refills) != (found.epoch, found.refills)
        elif len(readings) == 2 * count:
            judged = judge(readings[:count], readings[count:], wanted)
            assert isinstance(judged, Certificate) == (verdict == "sold_out")
            assert isinstance(judged, Certificate) or judged is Doubt.NOT_SHORT
        elif verdict == "no certificate":
            assert not any(sku_short(readings, sku, units) for sku, units in wanted.items())

    def _compare_reading(self, place: int, found: Reading, partition: Partition) -> None:
        assert [found.available[sku] for sku in self._skus] == list(partition.available)
        assert found.refills == self._refills(place, partition)
        assert bool(found.due) == any(order.is_due for order in partition.orders)
        for lots, expected in ((found.lent, partition.lent), (found.received, partition.received)):
            assert self._slots((key, Lot(lot.number, lot.units)) for key, lot in lots.items()) == (
                expected
            )

    def _slots(self, lots: Any) -> tuple[Lot, ...]:
        slots = [Lot(0, 0)] * (self._sale.partitions * self._sale.skus)
        for (peer, sku), lot in lots:
            slots[self._sale.slot(peer, SKUS.index(sku))] = lot
        return tuple(slots)

    async def _act(self, world: World, number: int, home: int, action: str, word: str) -> None:
        """Run a buyer's action; one on an order that the model has not kept changes nothing."""
        order, partition = _order_of(self._scenario, world, number), self._partitions[home]
        if order is None or (action == "decline" and order.status != CONFIRMING):
            assert word in {"not_found", "lost"}
            return
        basket = self._baskets[number]
        match action:
            case "release":
                assert word == (await partition.release(basket))[0]
            case "claim":
                reply = await partition.claim(basket, f"key-{next(self._numbers)}")
                assert word == reply[0]
                if word == "claimed":
                    self._fences[number] = reply[1]
                    self._note("claim", "late" if order.is_due else "claimed")
            case _:
                outcome = "confirmed" if action == "sell" else "declined"
                reply = await partition.finish(basket, int(self._fences[number]), outcome)
                assert (reply[0], word) in {("done", "sold"), ("done", "declined")}

    async def _change(self, world: World, number: int, place: int) -> int:
        """Send an operator's change as a PUT of the new totals."""
        partition = self._partitions[place]
        deltas = self._scenario.changes[number - 1][place]
        totals = [a + b for a, b in zip(world.partitions[place].total, deltas, strict=True)]
        key = partition.keys.sale
        version = int(await self._connections.command("HGET", key, "version"))
        digest = f"change-{next(self._numbers)}"
        reply = await partition.put(version=version, digest=digest, items=self._rows(totals))
        assert reply == ["done", str(version + 1)]
        return place

    def _refills(self, place: int, expected: Partition) -> int:
        """The refills that the server must have counted."""
        return expected.refills

    def _note(self, script: str, word: str) -> None:
        self._seen[f"{script}: {word}"] += 1

    async def compare(self, place: int, expected: Partition) -> None:
        """Compare a partition of the server with the model's."""
        partition = self._partitions[place]
        names = partition.keys
        known = {n: b for n, b in self._baskets.items() if self._sale.baskets[n].home == place}
        head, transfers, deadlines, *rest = await self._connections.pipeline(
            [
                ("HGET", names.sale, "refills"),
                ("HGETALL", names.transfers),
                ("ZRANGE", names.deadlines, 0, -1, "WITHSCORES"),
                *(("HMGET", names.stock(s), "total", "available") for s in self._skus),
                *(("HGET", names.order(basket["order"]), "status") for basket in known.values()),
            ]
        )
        assert int(head) == self._refills(place, expected), "refills"
        counters = rest[: self._sale.skus]
        assert [int(total) for total, _ in counters] == list(expected.total), "total"
        assert [int(units) for _, units in counters] == list(expected.available), "available"
        lots: dict[str, list[Any]] = {"lent": [], "received": []}
        for field, text in as_mapping(transfers).items():
            direction, peer, sku = field.split(":")
            number, units, *_ = text.split(" ")
            lots[direction].append(((int(peer), sku), Lot(int(number), int(units))))
        assert self._slots(lots["lent"]) == expected.lent, "lent"
        assert self._slots(lots["received"]) == expected.received, "received"
        scores = {deadlines[i]: float(deadlines[i + 1]) for i in range(0, len(deadlines), 2)}
        orders = {order.number: order for order in expected.orders}
        for (number, basket), status in zip(known.items(), rest[self._sale.skus :], strict=True):
            order = orders.pop(number, None)
            if order is None:
                assert status in ENDED, "status"
                continue
            assert status == STATUS[order.status], "status"
            is_due = scores.get(basket["order"], float("inf")) <= NOW.now_ms()
            assert is_due == order.is_due, "deadline"
        assert not orders, "an order is missing"
