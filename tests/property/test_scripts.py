"""Random histories of one sale on a real server, step by step against the model of the contract.

For each call the model's rules give the script's answer and the value of every counter
afterwards; the model's shop folds the events that the script has written. After each step the
whole sale is read and all three are compared, so a shrunken failure ends with the very call
that diverged.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

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

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import buyer_field, order_field
from reservation.adapters.redis.mapping import as_event, as_mapping
from reservation.domain.events import Event
from reservation.verification.model.rules import OUTCOMES, Rules
from reservation.verification.model.sale_state import Item, SaleState
from tests.support.lua_sale import NOW, LuaSale

EXAMPLES, STEPS = 40, 30
#: Attempts per order: few, so that a history reaches the limit.
ATTEMPTS_MAX = 3
#: Unpaid orders per buyer: enough to continue buying, few enough to reach the limit.
UNPAID_MAX = 8
#: The largest total of an item, as the fixture's restock gives it.
TOTAL_MAX = 1000
BUYERS = ("ann", "bob", "eve")
#: No deadline passes by itself.
HOLD_SECONDS = 3600
#: A clock that is far behind: no deadline has passed by it.
LONG_AGO_MS = 1

buyers = st.sampled_from(BUYERS)
#: `z` is never on sale, `c` only after a change of the sale.
skus = st.sampled_from([*"aaaaabbbbb", "c", "z"])
lines_of = st.dictionaries(skus, st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=2)
payment_keys = st.sampled_from(["pk-1", "pk-2", "pk-3", "pk-4"])
outcomes = st.sampled_from(sorted(OUTCOMES))
rarely = st.sampled_from([False, False, False, True])
lease_modes = st.sampled_from(["take", "take_now", "move", "pause"])
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
    """One sale on the server, and its model."""

    orders = Bundle("orders")
    #: The server's address.
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.connections = RedisClient(self.url, clock=NOW)
        self.sale = LuaSale(self.connections)
        self.shop = rules_of("prepare", {})
        self.claims = itertools.count(1)
        #: The fold of the events; the tests set deadlines by hand.
        self.folded = SaleState(deadlines=False)

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
        self.shop = rules_of(policy, {"a": Item(**a), "b": Item(**b)})
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
        found = self.run(
            self.sale.prepare(
                *baskets, caller_ms=self.caller_ms(behind), unpaid_max=self.shop.unpaid_max
            )
        )
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
            if key in self.sale.replaced:
                return
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

    @rule(basket=orders, behind_by=st.integers(0, 1), mode=lease_modes, running=rarely)
    def lease(self, basket: dict[str, Any], behind_by: int, mode: str, running: bool) -> None:
        order = self.shop.orders[basket["order"]]
        fence = order.fence - behind_by
        claim_id = order.claim_id if behind_by else f"l{next(self.claims)}"
        expected = self.shop.lease(order, fence, mode, claim_id, over=not running)
        word, *facts = self.run(
            self.sale.lease(
                basket, fence, mode, claim_id=claim_id, lease_ms=600_000 if running else -1
            )
        )
        kept = {"taken": 1, "stale": 2}.get(word, 0)
        assert expected == [word, *facts[:kept]]

    @rule(
        basket=orders,
        outcome=outcomes,
        old=rarely,
        forget=rarely,
        behind=rarely,
        restock=st.booleans(),
    )
    def finish(
        self,
        basket: dict[str, Any],
        outcome: str,
        old: bool,
        forget: bool,
        behind: bool,
        restock: bool,
    ) -> None:
        fence = self.shop.orders[basket["order"]].fence - old
        attempt = "" if forget else outcome
        self.finish_with(basket, fence, outcome, attempt, behind=behind, restock=restock)

    def finish_with(
        self,
        basket: dict[str, Any],
        fence: int,
        outcome: str,
        attempt: str,
        *,
        behind: bool,
        restock: bool = True,
    ) -> None:
        order = self.shop.orders[basket["order"]]
        expected = self.shop.finish(order, fence, outcome, attempt, behind=behind, restock=restock)
        found = self.run(
            self.sale.finish(
                basket,
                fence,
                outcome,
                attempt=attempt,
                due_ms=NOW.now_ms(),
                caller_ms=self.caller_ms(behind),
                restock=int(restock),
            )
        )
        assert found == expected

    @rule(basket=orders, outcome=outcomes)
    def pay(self, basket: dict[str, Any], outcome: str) -> None:
        """The usual sequence of a claim and its finish."""
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

    @rule(baskets=st.lists(orders, min_size=1, max_size=4))
    def replace(self, baskets: list[dict[str, Any]]) -> None:
        """Each order that ended without a claim becomes a tombstone, and nothing else changes."""
        due = {
            basket["order"]
            for basket in baskets
            if (order := self.shop.orders[basket["order"]]).status in ("RELEASED", "EXPIRED")
            and not order.fence
            and not order.finished
            and self.sale.keys.order(order.id) not in self.sale.replaced
        }
        reply = self.run(self.sale.add_tombstones(*baskets, up_to=self.shop.seq))
        assert reply == ["done", str(len(due)), "0"]

    @rule(basket=orders, restock=st.booleans())
    def refund(self, basket: dict[str, Any], restock: bool) -> None:
        expected = self.shop.refund(self.shop.orders[basket["order"]], restock=restock)
        assert self.run(self.sale.refund(basket, restock=int(restock))) == expected

    # One rule for all operator actions, so that buyers get most of the steps.
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
    def sale_matches_model(self) -> None:
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
            if replaced := self.sale.replaced.get(names.order(order.id)):
                assert fields == {}
                bucket, field = names.ended(replaced.basket["buyer"]), order_field(order.id)
                text = await self.connections.command("HGET", bucket, field)
                assert text == replaced.text
                fields = replaced.fields
            counts = [int(fields.get(name, 0)) for name in ("fence", "attempts")]
            assert (fields["status"], *counts) == (order.status, order.fence, order.attempts)
        for buyer in BUYERS:
            ended = [one for one in self.sale.replaced.values() if one.basket["buyer"] == buyer]
            count = await self.connections.command("HGET", names.ended(buyer), buyer_field(buyer))
            assert int(count or 0) == len(ended)
            counts = {sku: shop.bought(buyer, sku) for sku in shop.items}
            bought = {sku: str(count) for sku, count in counts.items() if count}
            assert await self.sale.bought(buyer) == bought
            assert await self.sale.paid(buyer) == shop.paid(buyer)
        entries = await self.connections.command("XRANGE", names.outbox, "-", "+")
        assert len(entries) == shop.seq
        self.follow([as_event(self.sale.id, entry_id, flat) for entry_id, flat in entries])

    async def members(self, key: str) -> set[str]:
        return set(await self.connections.command("ZRANGE", key, 0, -1))

    def orders_in(self, *statuses: str) -> set[str]:
        return {order.id for order in self.shop.orders.values() if order.status in statuses}

    def follow(self, events: list[Event]) -> None:
        """Folding the new events leads to the model's state without a violation."""
        folded, shop = self.folded, self.shop
        for new in events[folded.seq :]:
            folded.follow(new.seq, new.event, new.order_id, new.at_ms, new.data, new.chain)
            folded.apply(new.event, new.order_id, new.at_ms, new.data)
        assert {sku: item.row for sku, item in folded.items.items()} == {
            sku: item.row for sku, item in shop.items.items()
        }
        standing = {order_id: order.status for order_id, order in folded.orders.items()}
        assert standing == {order.id: order.status for order in shop.orders.values()}
        assert folded.status == shop.status
        for buyer in BUYERS:
            assert folded.unpaid(buyer) == shop.unpaid(buyer)
        for sku, buyers in folded.taken.items():
            assert buyers == {buyer: shop.bought(buyer, sku) for buyer in buyers}


def rules_of(policy: str, items: dict[str, Item]) -> Rules:
    return Rules(
        policy, items, attempts_max=ATTEMPTS_MAX, total_max=TOTAL_MAX, unpaid_max=UNPAID_MAX
    )


def test_random_script_calls_match_the_rules(valkey_url: str) -> None:
    class Here(Sale):
        url = valkey_url

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            # A busy machine is slow at everything; that is not a data error.
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
