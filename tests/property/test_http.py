"""Random histories of one sale over HTTP; the history checker compares each answer with the events.

All requests are sequential and the head is read after each step, so every answer is checked
against the exact event number at which it was given.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from loadtests.recording import Call, Heads, operation_of
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.domain.ids import sale_of
from reservation.verification.export import recorded
from reservation.verification.model.checker import HistoryChecker
from reservation.verification.model.history_format import (
    End,
    Head,
    History,
    MoneyLine,
    Operation,
    Record,
)
from tests.support.service import Served, eventually, item

STEPS = 25
PRICES = {"a": 1000, "b": 500}
BUYERS = ("ann", "bob", "eve")

#: `z` is not on sale.
lines_of = st.dictionaries(
    st.sampled_from([*"aaaabbbb", "z"]), st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=2
)
rarely = st.sampled_from([False, False, False, False, True])


class Order(msgspec.Struct, frozen=True):
    """The order as its buyer has seen it."""

    buyer: str
    body: dict[str, Any]
    key: str
    wish: dict[str, Any]


class Sale(RuleBasedStateMachine):
    """One sale of a running service, with every answer about it."""

    orders = Bundle("orders")
    served: Served

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Operation | Head] = []
        #: Idempotency keys used, and orders created with them.
        self.keys = self.taken = 0

    @initialize(
        policy=st.sampled_from(["prepare", "prepare", "success"]),
        totals=st.tuples(st.integers(2, 6), st.integers(2, 6)),
        limit=st.integers(2, 4),
    )
    def open(self, policy: str, totals: tuple[int, int], limit: int) -> None:
        items = [
            item(sku, total=total, price=PRICES[sku], limitPerBuyer=limit)
            for sku, total in zip(PRICES, totals, strict=True)
        ]
        self.sale_id = self.served.sale(holdPolicy=policy, items=items)
        redis_url = f"unix://{self.served.settings.data_dir.absolute() / 'valkey.sock'}"
        self.settings = msgspec.structs.replace(self.served.settings, redis_url=redis_url)
        self.heads = Heads(self.settings, self.sale_id, PRICES)
        self.buyers = {name: self.served.named_buyer() for name in BUYERS}

    @invariant()
    def observe(self) -> None:
        if hasattr(self, "heads"):
            self.calls.append(self.heads.observe())

    @rule(target=orders, name=st.sampled_from(BUYERS), lines=lines_of, cheap=rarely)
    def prepare(self, name: str, lines: dict[str, int], cheap: bool) -> Any:
        self.keys += 1
        items = [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]
        amount = sum(PRICES.get(sku, 1000) * quantity for sku, quantity in lines.items())
        wish = {"items": items, "amount": amount - cheap}
        answer = self.prepared(name, f"key-{self.keys}", wish)
        if "token" not in answer:
            return multiple()
        self.taken += 1
        return Order(name, answer, f"key-{self.keys}", wish)

    @rule(order=orders)
    def prepare_again(self, order: Order) -> None:
        again = self.prepared(order.buyer, order.key, order.wish)
        assert again.get("orderId", order.body["orderId"]) == order.body["orderId"]

    @rule(order=orders)
    def release(self, order: Order) -> None:
        path = f"/v1/reservations/{order.body['orderId']}/release"
        self.ask(order.buyer, "POST", path, {"X-Reservation-Token": order.body["token"]})

    @rule(order=orders)
    def fail(self, order: Order) -> None:
        url = urlsplit(order.body["payment"]["failUrl"])
        self.ask(order.buyer, "GET", f"{url.path}?{url.query}&code=PAY_PROCESS_CANCELED", {})

    @rule(order=orders)
    def read(self, order: Order) -> None:
        path = f"/v1/reservations/{order.body['orderId']}"
        self.ask(order.buyer, "GET", path, {"X-Reservation-Token": order.body["token"]})

    @rule(order=orders, declined=rarely, tampered=rarely, times=st.sampled_from([1, 1, 2]))
    def pay(self, order: Order, declined: bool, tampered: bool, times: int) -> None:
        wish = {"decline": "REJECT_CARD_COMPANY"} if declined else {}
        key = self.served.pay(order.body, **wish)
        changes = {"amount": "1"} if tampered else {}
        url = urlsplit(self.served.success_url(order.body, key, **changes))
        for _ in range(times):
            self.ask(order.buyer, "GET", f"{url.path}?{url.query}", {"Accept": "application/json"})

    @rule(order=orders, restock=st.booleans())
    def refund(self, order: Order, restock: bool) -> None:
        path = f"/v1/admin/orders/{order.body['orderId']}/refund"
        self.operate(path, {"reason": "broken", "restock": restock}, {200, 404, 409})

    @rule(sku=st.sampled_from("ab"), delta=st.sampled_from([-3, -1, 1, 2]))
    def restock(self, sku: str, delta: int) -> None:
        body = {"sku": sku, "delta": delta, "reason": "counted"}
        self.operate(f"/v1/admin/sales/{self.sale_id}/stock", body, {200, 409})

    @precondition(lambda self: self.keys > 3)
    @rule(word=st.sampled_from(["pause", "resume", "resume"]))
    def switch(self, word: str) -> None:
        path = f"/v1/admin/sales/{self.sale_id}/{word}"
        self.operate(path, {"reason": "a look"}, {200, 409})

    def operate(self, path: str, body: dict[str, Any], may: set[int]) -> None:
        self.keys += 1
        headers = self.served.admin | {"Idempotency-Key": f"op-{self.sale_id}-{self.keys}"}
        answer = self.served.http.post(path, json=body, headers=headers)
        assert answer.status_code in may, answer.text

    def prepared(self, name: str, key: str, wish: dict[str, Any]) -> dict[str, Any]:
        path = f"/v1/sales/{self.sale_id}/reservations"
        headers = self.buyers[name][1] | {"Idempotency-Key": key}
        return self.ask(name, "POST", path, headers, wish)

    def ask(
        self,
        name: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One call, recorded for the checker; no fault is injected, so none may fail."""
        invoked_ns = time.monotonic_ns()
        answer = self.served.http.request(method, path, headers=dict(headers), json=body)
        answered_ns = time.monotonic_ns()
        json = answer.headers.get("content-type", "").partition(";")[0].endswith("json")
        members = answer.json() if json else {}
        assert answer.status_code < 500 or members.get("code") == "sale_paused", answer.text
        call = Call(
            sale=self.sale_id,
            client=name,
            buyer=self.buyers[name][0],
            method=method,
            url=path,
            body=body,
            invoked_ns=invoked_ns,
            answered_ns=answered_ns,
            status=answer.status_code,
            answer=members,
            replayed="Idempotent-Replayed" in answer.headers,
        )
        operation = operation_of(call)
        assert operation is not None
        self.calls.append(operation)
        return members

    def teardown(self) -> None:
        if not hasattr(self, "heads"):
            return
        self.heads.close()
        eventually(lambda: self.served.audit(self.sale_id), lambda report: not report["lag"])
        checker = HistoryChecker()
        for line, record in enumerate(self.history(), 1):
            checker.add(line, record)
        judgement = checker.finish()
        assert judgement.ok, judgement.violations
        assert judgement.orders_compared == self.taken

    def history(self) -> list[Record]:
        """The history of the sale: calls first, then events, then the PG's ledger."""
        past = asyncio.run(past_of(self.settings, self.sale_id))
        first, events = past[0], past[1:]
        assert isinstance(first, History)
        (end,) = (one for one in events if isinstance(one, End))
        end.money = True
        entries = [e for e in self.ledger() if sale_of(e["orderId"]) == self.sale_id]
        money: list[Record] = [
            MoneyLine(sale=self.sale_id, order=e["orderId"], entry=e["kind"], amount=e["amount"])
            for e in entries
        ]
        return [first, *self.calls, *events[:-1], *money, end]

    def ledger(self) -> list[dict[str, Any]]:
        """The ledger of the whole sandbox; a hold gives its URL."""
        order = self.served.hold(self.served.sale(), self.served.buyer())
        self.served.release(order)
        pg = order["payment"]["checkoutUrl"].removesuffix("/checkout")
        return self.served.http.get(f"{pg}/_ledger").raise_for_status().json()["entries"]


async def past_of(settings: Settings, sale_id: str) -> list[Record]:
    """The events of the sale in the service."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(opened(settings))
        return [
            record
            async for record in recorded(
                sale_id,
                sales=service.sale_store,
                sql=service.sql,
                outbox=service.outbox,
                clock=service.clock,
            )
        ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_random_histories_over_http_match_the_events(served: Served, examples: int) -> None:
    class Here(Sale):
        pass

    Here.served = served
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
