"""Random histories of one sale on a real server, step by step against a model of its rules.

`Shop` is the rules once more, in plain Python and without Redis: for each call it says what the
script must answer and what every counter must be afterwards. After each step the whole sale is
read and compared, so a shrunken failure ends with the very call that did something else.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from reservation.domain.states import HOLDING, TRANSITIONS, Status
from reservation.redis.connection import Connections
from reservation.redis.records import as_mapping
from tests.fixtures.lua_sale import NOW, LuaSale

EXAMPLES, STEPS = 40, 30
#: The attempts that an order may make here: few, so that they come to an end.
ATTEMPTS_MAX = 3
#: The largest total of an item, as the fixture's restock gives it.
TOTAL_MAX = 1000
BUYERS = ("ann", "bob", "eve")
#: No deadline passes by itself.
HOLD_SECONDS = 3600
#: A clock that is far behind: by it nothing has ever run out.
LONG_AGO_MS = 1

#: Where each outcome leads; `voided` is worked out.
EDGES: dict[str, dict[str, str]] = {
    "confirmed": {"CONFIRMING": "CONFIRMED", "AWAITING_DEPOSIT": "CONFIRMED"},
    "awaiting_deposit": {"CONFIRMING": "AWAITING_DEPOSIT", "CONFIRMED": "AWAITING_DEPOSIT"},
    "declined": {"CONFIRMING": "RELEASED", "AWAITING_DEPOSIT": "RELEASED"},
    "voided": {"CONFIRMING": "HELD"},
    "expired": {"AWAITING_DEPOSIT": "EXPIRED", "CONFIRMING": "EXPIRED"},
    "refunded": {"CONFIRMING": "REFUNDED", "RELEASED": "REFUNDED", "EXPIRED": "REFUNDED"},
}


class Item:
    """One item's counters."""

    def __init__(self, total: int, price: int, limit: int) -> None:
        self.total, self.price, self.limit = total, price, limit
        self.available, self.held, self.sold = total, 0, 0

    @property
    def row(self) -> tuple[int, int, int, int]:
        return self.total, self.available, self.held, self.sold


class Order:
    """One order as the model knows it."""

    def __init__(self, basket: dict[str, Any], status: str) -> None:
        self.id, self.buyer = str(basket["order"]), str(basket["buyer"])
        self.digest, self.lines = str(basket["digest"]), dict[str, int](basket["lines"])
        self.status = status
        self.fence = self.attempts = 0
        self.key = self.claim_id = self.finished = ""
        self.outcomes: dict[str, str] = {}
        #: Whether its deadline has passed, and whether the lease on its payment has.
        self.past = self.lease_over = False


def counter_of(status: str) -> str:
    """Which counter the units of an order in this status are in."""
    if status in HOLDING:
        return "held"
    return "sold" if status == Status.CONFIRMED else "available"


class Shop:
    """The rules of one sale."""

    def __init__(self, policy: str, items: dict[str, Item]) -> None:
        self.policy, self.items = policy, items
        self.orders: dict[str, Order] = {}
        self.operations: dict[str, str] = {}
        self.status, self.version, self.seq = "open", 1, 1

    def due(self, *, behind: bool) -> list[str]:
        waiting = ("HELD", "PREPARED")
        found = [one.id for one in self.orders.values() if one.past and one.status in waiting]
        return [] if behind else found

    def bought(self, buyer: str, sku: str) -> int:
        """What counts against the buyer's limit: whatever is held or sold under their orders."""
        return sum(
            order.lines.get(sku, 0)
            for order in self.orders.values()
            if order.buyer == buyer and counter_of(order.status) != "available"
        )

    def move(self, order: Order, to: str) -> None:
        """Take an order along an edge, its units with it; one event."""
        assert to in TRANSITIONS[Status(order.status)] | {order.status}
        origin, target = counter_of(order.status), counter_of(to)
        for sku, quantity in order.lines.items():
            if origin != target:
                item = self.items[sku]
                setattr(item, origin, getattr(item, origin) - quantity)
                setattr(item, target, getattr(item, target) + quantity)
        order.status = to
        self.seq += 1

    def shortage(self, buyer: str, lines: dict[str, int]) -> list[Any] | None:
        for sku, quantity in lines.items():
            taken, limit = self.bought(buyer, sku), self.items[sku].limit
            if taken + quantity > limit:
                return ["limit_exceeded", sku, str(limit), str(taken)]
        if any(self.items[sku].available < quantity for sku, quantity in lines.items()):
            left = [(sku, str(self.items[sku].available)) for sku in lines]
            return ["sold_out", *itertools.chain.from_iterable(left)]
        return None

    def prepare(self, baskets: list[dict[str, Any]], *, behind: bool) -> list[list[Any]]:
        replies: list[list[Any]] = []
        for basket in baskets:
            waits = any(reply[0] == "due" for reply in replies)
            replies.append(["again"] if waits else self._decide(basket, behind=behind))
        return replies

    def _decide(self, basket: dict[str, Any], *, behind: bool) -> list[Any]:
        standing = self.orders.get(basket["order"])
        lines: dict[str, int] = basket["lines"]
        if standing and standing.digest == basket["digest"]:
            return ["replayed"]
        unknown = [sku for sku in lines if sku not in self.items]
        if unknown:
            return ["sku_not_found", unknown[0]]
        if standing:
            return ["key_reused"]
        if self.status != "open":
            return [self.status]
        amount = sum(self.items[sku].price * quantity for sku, quantity in lines.items())
        if amount != basket["amount"]:
            return ["amount_mismatch", str(amount)]
        refusal = self.shortage(basket["buyer"], lines)
        if refusal:
            due = self.due(behind=behind) if self.policy == "prepare" else []
            return ["due", sorted(due)] if due else refusal
        order = self.orders[basket["order"]] = Order(basket, "PREPARED")
        if self.policy == "prepare":
            self._take(order)
        self.seq += 1
        return ["held" if self.policy == "prepare" else "prepared"]

    def _take(self, order: Order) -> None:
        for sku, quantity in order.lines.items():
            self.items[sku].available -= quantity
            self.items[sku].held += quantity
        order.status = "HELD"

    def claim(
        self, order: Order, key: str, claim_id: str, *, over: bool, behind: bool
    ) -> list[Any]:
        if order.status == "CONFIRMING" and (order.key, order.claim_id) == (key, claim_id):
            return ["claimed", str(order.fence)]
        if key in order.outcomes:
            return ["present", order.status, order.outcomes[key]]
        if order.status not in ("HELD", "PREPARED", "RELEASED", "EXPIRED"):
            return ["present", order.status, ""]
        if order.attempts >= ATTEMPTS_MAX:
            return ["attempts_exhausted"]
        ended = order.status in ("RELEASED", "EXPIRED")
        gone = any(sku not in self.items for sku in order.lines)
        if gone or (ended and self.status != "open"):
            return ["expired"]
        if order.status != "HELD":
            refusal = self.shortage(order.buyer, order.lines)
            if refusal:
                due = self.due(behind=behind) if self.policy == "prepare" else []
                if due:
                    return ["due", sorted(due)]
                return ["expired"] if ended and refusal[0] == "sold_out" else refusal
        self.move(order, "CONFIRMING")
        order.fence, order.attempts = order.fence + 1, order.attempts + 1
        order.key, order.claim_id, order.lease_over = key, claim_id, over
        return ["claimed", str(order.fence)]

    def lease(self, order: Order, fence: int, mode: str, claim_id: str, *, over: bool) -> list[Any]:
        confirming = order.status == "CONFIRMING"
        if confirming and order.claim_id == claim_id and order.fence == fence + 1:
            return ["taken", str(order.fence)]
        if not confirming or order.fence != fence:
            return ["stale", order.status, str(order.fence)]
        if mode == "move":
            order.lease_over = over
            return ["moved"]
        if not order.lease_over:
            return ["leased"]
        order.fence, order.claim_id, order.lease_over = fence + 1, claim_id, over
        self.seq += 1
        return ["taken", str(order.fence)]

    def finish(
        self, order: Order, fence: int, outcome: str, attempt: str, *, behind: bool
    ) -> list[Any]:
        to, finished = EDGES[outcome].get(order.status), f"{outcome}:{fence}"
        if order.finished == finished and not to:
            return ["done", order.status]
        if order.fence != fence or not to:
            return ["stale", order.status, str(order.fence)]
        if outcome == "voided":
            to = "PREPARED" if self.policy == "success" else "HELD"
            to = "EXPIRED" if order.past and not behind else to
        self.move(order, to)
        order.finished = finished
        if order.key and attempt:
            order.outcomes[order.key] = attempt
        elif order.key:
            order.outcomes.pop(order.key, None)
            order.key, order.claim_id, order.attempts = "", "", order.attempts - 1
        return ["done", to]

    def release(self, order: Order) -> list[Any]:
        if order.status not in ("HELD", "PREPARED"):
            return ["present", order.status]
        self.move(order, "RELEASED")
        return ["released"]

    def expire(self, order: Order, *, behind: bool) -> str:
        if order.status not in ("HELD", "PREPARED"):
            return "settled"
        if not order.past or behind:
            return "not_due"
        self.move(order, "EXPIRED")
        return "expired"

    def refund(self, order: Order, *, restock: bool) -> list[Any]:
        if order.status == "REFUNDED":
            return ["refunded"]
        if order.status != "CONFIRMED":
            return ["present", order.status]
        self.move(order, "REFUNDED")
        if not restock:
            for sku, quantity in order.lines.items():
                self.items[sku].available -= quantity
                self.items[sku].total -= quantity
        return ["refunded"]

    def restock(self, sku: str, delta: int, operation: str, digest: str) -> list[Any]:
        standing = self.operations.get(operation)
        if standing:
            return ["done"] if standing == digest else ["key_reused"]
        item = self.items.get(sku)
        if item is None:
            return ["sku_not_found"]
        if item.available + delta < 0:
            return ["insufficient", str(item.available)]
        if item.total + delta > TOTAL_MAX:
            return ["too_many", str(item.total)]
        item.available, item.total = item.available + delta, item.total + delta
        self.operations[operation] = digest
        self.seq += 1
        return ["done"]

    def switch(self, status: str) -> list[Any]:
        if self.status == status:
            return ["done"]
        if self.status == "closed":
            return ["closed"]
        self.status = status
        self.seq += 1
        return ["done"]

    def put(self, version: int, rows: dict[str, Item]) -> list[Any]:
        if version != self.version:
            return ["changed", str(self.version)]
        for sku, row in rows.items():
            standing = self.items.get(sku)
            in_use = standing.held + standing.sold if standing else 0
            if row.total < in_use:
                return ["total_too_low", sku, str(in_use)]
        for sku, item in self.items.items():
            if sku not in rows and item.held + item.sold:
                return ["item_in_use", sku]
        for sku, row in rows.items():
            if sku in self.items:
                row.held, row.sold = self.items[sku].held, self.items[sku].sold
                row.available = row.total - row.held - row.sold
        self.items = rows
        self.version += 1
        self.seq += 1
        return ["done", str(self.version)]


buyers = st.sampled_from(BUYERS)
#: `z` is never on sale, `c` only after a change of the sale.
skus = st.sampled_from([*"aaaaabbbbb", "c", "z"])
lines_of = st.dictionaries(skus, st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=2)
payment_keys = st.sampled_from(["pk-1", "pk-2", "pk-3", "pk-4"])
outcomes = st.sampled_from(sorted(EDGES))
rarely = st.sampled_from([False, False, False, True])
numbers_of_item = st.fixed_dictionaries(
    {"total": st.integers(2, 8), "price": st.sampled_from([500, 1000]), "limit": st.integers(2, 5)}
)
restocks = st.tuples(
    st.just("restock"),
    skus,
    st.integers(-4, 4) | st.just(TOTAL_MAX),
    st.sampled_from(["one", "two", "three", "four", "five", "six"]),
    st.sampled_from(["d", "d", "other"]),
)
#: A closed sale stays closed, so most histories must not close theirs.
switches = st.tuples(st.just("switch"), st.sampled_from([*["open"] * 5, "paused", "closed"]))
changes = st.tuples(
    st.just("change"),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), numbers_of_item, min_size=2),
    rarely,
)


class Sale(RuleBasedStateMachine):
    """One sale on the server, and the model beside it."""

    orders = Bundle("orders")
    #: Where the server is.
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.connections = Connections(self.url, clock=NOW)
        self.sale = LuaSale(self.connections)
        self.shop = Shop("prepare", {})
        self.claims = itertools.count(1)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.loop.close()

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run(call)

    @initialize(
        target=orders,
        policy=st.sampled_from(["prepare", "prepare", "success"]),
        a=numbers_of_item,
        b=numbers_of_item,
    )
    def open(self, policy: str, a: dict[str, int], b: dict[str, int]) -> Any:
        """A sale, and each buyer with a first order."""
        self.shop = Shop(policy, {"a": Item(**a), "b": Item(**b)})
        reply = self.run(
            self.sale.put(
                hold_policy=policy, hold_seconds=HOLD_SECONDS, items=self.rows(self.shop.items)
            )
        )
        assert reply == ["done", "1"]
        return self.prepare_each([(buyer, {"a": 1}, False) for buyer in BUYERS], behind=False)

    def rows(self, items: dict[str, Item]) -> list[tuple[str, str, int, int, int]]:
        return [(sku, sku, item.price, item.total, item.limit) for sku, item in items.items()]

    @rule(
        target=orders,
        wishes=st.lists(st.tuples(buyers, lines_of, rarely), min_size=1, max_size=3),
        behind=rarely,
    )
    def prepare(self, wishes: list[tuple[str, dict[str, int], bool]], behind: bool) -> Any:
        return self.prepare_each(wishes, behind=behind)

    def prepare_each(self, wishes: list[tuple[str, dict[str, int], bool]], *, behind: bool) -> Any:
        baskets = [self.basket(*wish) for wish in wishes]
        self.ask(baskets, behind=behind)
        return multiple(*(basket for basket in baskets if basket["order"] in self.shop.orders))

    @rule(basket=orders, another_body=st.booleans())
    def prepare_again(self, basket: dict[str, Any], another_body: bool) -> None:
        digest = "1" * 32 if another_body else basket["digest"]
        self.ask([{**basket, "digest": digest}], behind=False)

    def basket(self, buyer: str, lines: dict[str, int], wrong_amount: bool) -> dict[str, Any]:
        items = self.shop.items
        amount = sum(items[sku].price * lines[sku] for sku in lines if sku in items)
        return self.sale.basket(buyer, lines=lines, amount=amount + wrong_amount)

    def ask(self, baskets: list[dict[str, Any]], *, behind: bool) -> None:
        expected = self.shop.prepare(baskets, behind=behind)
        found = self.run(self.sale.prepare(*baskets, caller_ms=self.caller_ms(behind)))
        for want, (word, *facts) in zip(expected, found, strict=True):
            match word:
                case "held" | "prepared":
                    assert want == [word]
                case "due":
                    assert want == [word, sorted(facts)]
                case "sold_out":
                    assert want == [word, *facts[1:]]
                case _:
                    assert want == [word, *facts]

    def caller_ms(self, behind: bool) -> int:
        return LONG_AGO_MS if behind else NOW.now_ms()

    @rule(basket=orders)
    def deadline_passes(self, basket: dict[str, Any]) -> None:
        order = self.shop.orders[basket["order"]]
        order.past = True
        if order.status in ("HELD", "PREPARED"):
            self.run(self.sale.run_out(basket))
        else:
            key = self.sale.keys.order(order.id)
            past = str(NOW.now_ms() - 10_000)
            self.run(self.connections.command("HSET", key, "expires_at", past))

    @rule(basket=orders, key=payment_keys, again=rarely, over=st.booleans(), behind=rarely)
    def claim(
        self, basket: dict[str, Any], key: str, again: bool, over: bool, behind: bool
    ) -> None:
        order = self.shop.orders[basket["order"]]
        if again and order.claim_id:
            self.claim_with(basket, order.key, order.claim_id, over=over, behind=behind)
        else:
            self.claim_with(basket, key, f"c{next(self.claims)}", over=over, behind=behind)

    def claim_with(
        self, basket: dict[str, Any], key: str, claim_id: str, *, over: bool, behind: bool
    ) -> None:
        order = self.shop.orders[basket["order"]]
        expected = self.shop.claim(order, key, claim_id, over=over, behind=behind)
        word, *facts = self.run(
            self.sale.claim(
                basket,
                key,
                claim_id=claim_id,
                lease_ms=-1 if over else 3_600_000,
                attempts_max=ATTEMPTS_MAX,
                caller_ms=self.caller_ms(behind),
            )
        )
        match word:
            case "claimed":
                assert expected == [word, facts[0]]
            case "due":
                assert expected == [word, sorted(facts)]
            case "sold_out":
                assert expected == [word, *facts[1:]]
            case _:
                assert expected == [word, *facts]

    @rule(basket=orders, behind_by=st.integers(0, 1), mode=st.sampled_from(["take", "move"]))
    def lease(self, basket: dict[str, Any], behind_by: int, mode: str) -> None:
        order = self.shop.orders[basket["order"]]
        fence = order.fence - behind_by
        claim_id = order.claim_id if behind_by else f"l{next(self.claims)}"
        expected = self.shop.lease(order, fence, mode, claim_id, over=True)
        word, *facts = self.run(
            self.sale.lease(basket, fence, mode, claim_id=claim_id, lease_ms=-1)
        )
        kept = {"taken": 1, "stale": 2}.get(word, 0)
        assert expected == [word, *facts[:kept]]

    @rule(basket=orders, outcome=outcomes, old=rarely, forget=rarely, behind=rarely)
    def finish(
        self, basket: dict[str, Any], outcome: str, old: bool, forget: bool, behind: bool
    ) -> None:
        fence = self.shop.orders[basket["order"]].fence - old
        attempt = "" if forget else outcome
        self.finish_with(basket, fence, outcome, attempt, behind=behind)

    def finish_with(
        self, basket: dict[str, Any], fence: int, outcome: str, attempt: str, *, behind: bool
    ) -> None:
        order = self.shop.orders[basket["order"]]
        expected = self.shop.finish(order, fence, outcome, attempt, behind=behind)
        found = self.run(
            self.sale.finish(
                basket,
                fence,
                outcome,
                attempt=attempt,
                due_ms=NOW.now_ms(),
                caller_ms=self.caller_ms(behind),
            )
        )
        assert found == expected

    @rule(basket=orders, outcome=outcomes)
    def pay(self, basket: dict[str, Any], outcome: str) -> None:
        """A claim and its end, as they mostly come."""
        order = self.shop.orders[basket["order"]]
        claim_id = f"c{next(self.claims)}"
        self.claim_with(basket, f"pk-of-{order.fence}", claim_id, over=False, behind=False)
        self.finish_with(basket, order.fence, outcome, outcome, behind=False)

    @rule(basket=orders)
    def release(self, basket: dict[str, Any]) -> None:
        expected = self.shop.release(self.shop.orders[basket["order"]])
        assert self.run(self.sale.release(basket)) == expected

    @rule(baskets=st.lists(orders, min_size=1, max_size=4), behind=rarely)
    def expire(self, baskets: list[dict[str, Any]], behind: bool) -> None:
        expected = [
            self.shop.expire(self.shop.orders[basket["order"]], behind=behind) for basket in baskets
        ]
        found = self.run(self.sale.expire(*baskets, caller_ms=self.caller_ms(behind)))
        assert found == expected

    @rule(basket=orders, restock=st.booleans())
    def refund(self, basket: dict[str, Any], restock: bool) -> None:
        expected = self.shop.refund(self.shop.orders[basket["order"]], restock=restock)
        assert self.run(self.sale.refund(basket, restock=int(restock))) == expected

    # One rule for all of an operator's doings: buyers are to have most of the turns.
    @rule(act=restocks | switches | changes)
    def operate(self, act: tuple[Any, ...]) -> None:
        match act:
            case "restock", sku, delta, operation, digest:
                expected = self.shop.restock(sku, delta, operation, digest)
                found = self.run(self.sale.restock(sku, delta, operation=operation, digest=digest))
                assert found == expected
            case "switch", status:
                assert self.run(self.sale.switch(status)) == self.shop.switch(status)
            case _, items, stale:
                self.change({sku: Item(**row) for sku, row in items.items()}, stale=stale)

    def change(self, wanted: dict[str, Item], *, stale: bool) -> None:
        version = self.shop.version - stale or self.shop.version
        change: dict[str, Any] = {
            "version": version,
            "digest": f"d{next(self.claims)}",
            "leaving": [sku for sku in self.shop.items if sku not in wanted],
            "items": self.rows(wanted),
            "hold_policy": self.shop.policy,
            "hold_seconds": HOLD_SECONDS,
        }
        expected = self.shop.put(version, wanted)
        for _ in range(2):
            assert self.run(self.sale.put(**change)) == expected

    @invariant()
    def the_sale_is_as_the_model_says(self) -> None:
        if self.shop.items:
            self.run(self.compare())

    async def compare(self) -> None:
        names, shop = self.sale.keys, self.shop
        await self.sale.check()
        for sku, item in shop.items.items():
            assert await self.sale.stock(sku) == item.row
            assert min(item.row) >= 0
            assert item.total == item.available + item.held + item.sold
        assert await self.members(names.deadlines) == self.orders_in("HELD", "PREPARED")
        assert await self.members(names.confirming) == self.orders_in("CONFIRMING")
        assert await self.members(names.deposits) == self.orders_in("AWAITING_DEPOSIT")
        for order in shop.orders.values():
            fields = as_mapping(await self.connections.command("HGETALL", names.order(order.id)))
            standing = (fields["status"], fields["fence"], fields["attempts"])
            assert standing == (order.status, str(order.fence), str(order.attempts))
        for buyer in BUYERS:
            counts = {sku: shop.bought(buyer, sku) for sku in shop.items}
            bought = {sku: str(count) for sku, count in counts.items() if count}
            assert await self.sale.bought(buyer) == bought
        entries = await self.connections.command("XRANGE", names.outbox, "-", "+")
        assert len(entries) == shop.seq
        self.follow([as_mapping(flat) for _, flat in entries])

    async def members(self, key: str) -> set[str]:
        return set(await self.connections.command("ZRANGE", key, 0, -1))

    def orders_in(self, *statuses: str) -> set[str]:
        return {order.id for order in self.shop.orders.values() if order.status in statuses}

    def follow(self, events: list[dict[str, str]]) -> None:
        """Each event begins where the one before it left its order; the last one is the truth."""
        seen: dict[str, str] = {}
        for event in events:
            if event["order"]:
                data = msgspec.json.decode(event["data"])
                assert data["from"] == seen.get(event["order"], "")
                seen[event["order"]] = data["to"]
        assert seen == {order.id: order.status for order in self.shop.orders.values()}


def test_random_histories_are_what_the_rules_say(valkey_url: str) -> None:
    class Here(Sale):
        url = valkey_url

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            # A busy machine is slow at everything: that is no fault of the data.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
