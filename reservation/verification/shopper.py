"""Shopper: one buyer's actions as scenarios, which accuse the service of wrong answers."""

import random
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

import msgspec

from reservation.verification import buyer_requests as requests
from reservation.verification.buyer_requests import Order
from reservation.verification.scenario_steps import (
    Answer,
    Pause,
    Request,
    Scenario,
    ask_once,
    at_once,
)

__all__ = ["ENDS", "NO_SANDBOX", "OVER", "Basket", "Crowd", "Habits", "Shopper"]

#: Outcome of a prepare that was answered late, as a replay of a hold that is over by then.
OVER: Final = "answered too late"
#: Outcome of a prepare whose order names no sandbox.
NO_SANDBOX: Final = "no sandbox to pay at"

#: Refusals that end a payment, and the word for each.
_REFUSED_ENDS: Final = {
    "payment_declined": "declined",
    "reservation_expired": "reservation_expired",
    "sold_out": "sold_out",
    "buyer_limit_exceeded": "buyer_limit_exceeded",
    "sale_closed": "sale_closed",
    "hold_lost": "hold_lost",
}
#: States after which a buyer has paid, or is about to.
_PAID: Final = frozenset({"confirmed", "awaiting_deposit"})
#: Words that report the final state of an order to its buyer.
ENDS: Final = _PAID | {"released", "expired", "refunded"} | set(_REFUSED_ENDS.values())

#: Other buyers' orders whose ids an intruder has.
_ORDERS_MAX: Final = 1000


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """The behaviour that all buyers of a crowd have in common."""

    #: Tries of a request that was deferred or had no answer, and the range of the pauses.
    tries_max: int = 1
    pause_seconds: tuple[float, float] = (0.0, 0.0)
    #: The buyers wait as long as a deferral says, up to this; 0 ignores it.
    retry_after_seconds_max: float = 0.0
    #: Loads of the success page, drawn for each payment; empty: as the tries of any request.
    loads: tuple[int, ...] = ()
    #: Reads of an order whose payment is undecided, and the wait of each. Buyers without reads
    #: load the success page again.
    status_reads_max: int = 0
    status_wait_seconds: int = 0
    #: A late buyer comes back so long after the end of the hold.
    late_seconds: tuple[float, float] = (0.5, 2.5)
    #: Numbers of items in a basket, and of units of each: drawn.
    items: tuple[int, ...] = (1,)
    quantities: tuple[int, ...] = (1,)
    #: Shares of prepares with a wrong amount, and of those whose buyer first cuts one off.
    mispriced: float = 0.0
    cut_off: float = 0.0
    cut_off_seconds: tuple[float, float] = (0.0005, 0.02)
    #: Share of buyers who read their order once more in the end.
    reads: float = 0.0

    def pause_after(self, answer: Answer, draw: random.Random) -> Pause:
        """The pause before a repeat."""
        if not self.retry_after_seconds_max:
            return Pause(draw.uniform(*self.pause_seconds))
        asked = float(answer.body.get("retryAfter") or 1)
        return Pause(min(asked, self.retry_after_seconds_max) * draw.uniform(0.5, 1))


class Basket(msgspec.Struct, frozen=True, kw_only=True):
    """The wish of a buyer."""

    #: Quantity of each SKU.
    lines: Mapping[str, int]
    amount: int
    #: Whether the amount is the price of the lines.
    is_fair: bool = True


class Crowd(msgspec.Struct, kw_only=True):
    """The buyers of one sale: their common knowledge, and the receivers of their findings."""

    sale_id: str
    habits: Habits
    #: Called with each answer that is wrong whatever happened before it.
    accuse: Callable[[str], None]
    #: Called with the last word about an order: `held`, `asked` while an answer is pending, or its
    #: end.
    say: Callable[[Order, str], None] = lambda _order, _word: None
    #: Price of each SKU.
    prices: dict[str, int] = {}
    hold_seconds: float = 0.0
    #: The sandbox's address; empty: as each order names it.
    sandbox_url: str = ""
    #: Ids of the crowd's orders, for a buyer who tries another's.
    orders: deque[str] = msgspec.field(default_factory=lambda: deque(maxlen=_ORDERS_MAX))
    #: Payment keys of virtual accounts, some without a deposit yet.
    accounts: list[str] = []


class Shopper:
    """One buyer.

    Args:
        crowd: the buyer's crowd.
        headers: the buyer's credentials.
        draw: the source of the buyer's decisions.
    """

    def __init__(self, crowd: Crowd, *, headers: Mapping[str, str], draw: random.Random) -> None:
        self.crowd = crowd
        self.headers = headers
        self.draw = draw

    def ask(self, request: Request) -> Scenario[Answer]:
        """One request, repeated while it is deferred; every request may be repeated."""
        answer = yield from ask_once(request)
        for _ in range(self.crowd.habits.tries_max - 1):
            if not answer.is_deferred:
                break
            yield self.crowd.habits.pause_after(answer, self.draw)
            answer = yield from ask_once(request)
        return answer

    def read_sale(self) -> Scenario[bool]:
        """Learn the prices and the hold time; whether there are any."""
        answer = yield from self.ask(requests.read_sale(self.crowd.sale_id, self.headers))
        items = answer.body.get("items", [])
        if not items:
            return False
        self.crowd.prices = {item["sku"]: item["price"] for item in items}
        self.crowd.hold_seconds = answer.body["holdSeconds"]
        return True

    def basket(self, *, first_only: bool = False) -> Basket:
        """Some of the items, or the first one; at their price or not."""
        habits, prices, draw = self.crowd.habits, self.crowd.prices, self.draw
        count = min(draw.choice(habits.items), len(prices))
        skus = list(prices)[:1] if first_only else draw.sample(sorted(prices), count)
        lines = {sku: draw.choice(habits.quantities) for sku in skus}
        price = sum(prices[sku] * quantity for sku, quantity in lines.items())
        basket = Basket(lines=lines, amount=price)
        return self.mispriced(basket) if draw.random() < habits.mispriced else basket

    @staticmethod
    def mispriced(basket: Basket) -> Basket:
        """The same basket for one less."""
        return msgspec.structs.replace(basket, amount=basket.amount - 1, is_fair=False)

    def new_key(self) -> str:
        """An idempotency key."""
        return f"key-{self.draw.getrandbits(64):x}"

    def prepare(self, basket: Basket, *, key: str = "", clicks: int = 1) -> Scenario[Order | str]:
        """Take a hold; the order, or the reason for none."""
        key = key or self.new_key()
        if self.draw.random() < self.crowd.habits.cut_off:
            seconds = self.draw.uniform(*self.crowd.habits.cut_off_seconds)
            yield self._prepare_request(basket, key, cut_after_seconds=seconds)
        request = self._prepare_request(basket, key)
        answers = yield from at_once([self.ask(request) for _ in range(clicks)])
        orders = [answer.body for answer in answers if answer.is_success]
        ids = {order["orderId"] for order in orders}
        if len(ids) > 1:
            self.crowd.accuse(f"one key, two orders: {sorted(ids)}")
        if not orders:
            return self._refused(basket, answers[0])
        if not basket.is_fair:
            self.crowd.accuse(f"{min(ids)}: prepared at a price that is not its own")
        return self._held(orders[0])

    def _prepare_request(
        self, basket: Basket, key: str, *, cut_after_seconds: float | None = None
    ) -> Request:
        return requests.prepare(
            self.crowd.sale_id,
            basket.lines,
            amount=basket.amount,
            key=key,
            headers=self.headers,
            cut_after_seconds=cut_after_seconds,
        )

    def _refused(self, basket: Basket, answer: Answer) -> str:
        available = answer.body.get("available", {})
        enough = all(available.get(sku, 0) >= wanted for sku, wanted in basket.lines.items())
        if answer.code == "sold_out" and enough:
            self.crowd.accuse(f"sold out, and {available} available, in one answer")
        return answer.code or str(answer.status)

    def _held(self, order: Order) -> Order | str:
        self.crowd.say(order, "held")
        if not order.get("payment"):
            return OVER
        if not self._sandbox_of(order):
            return NO_SANDBOX
        self.crowd.orders.append(order["orderId"])
        return order

    def payment_key(
        self,
        order: Order,
        *,
        amount: int | None = None,
        method: str = "card",
        decline: str | None = None,
    ) -> Scenario[str]:
        """The payment key of an authentication; an unknown one where the PG is away."""
        request = requests.authenticate_payment(
            self._sandbox_of(order), order, amount=amount, method=method, decline=decline
        )
        answer = yield from self.ask(request)
        return str(answer.body.get("paymentKey", f"no-payment-of-{order['orderId']}"))

    def deposit(self, order: Order, payment_key: str) -> Scenario[Answer]:
        """Pay into a virtual account."""
        return self.ask(requests.deposit(self._sandbox_of(order), payment_key))

    def _sandbox_of(self, order: Order) -> str:
        return self.crowd.sandbox_url or requests.sandbox_of(order) or ""

    def release(self, order: Order) -> Scenario[str]:
        """Give the hold back; the end of the order."""
        self.crowd.say(order, "asked")
        request = requests.release(order["orderId"], requests.proof_of(order))
        word = yield from self._end(order, (yield from self.ask(request)))
        return self.ended(order, word)

    def come_back(self, order: Order, payment_key: str, *, never: str = "") -> Scenario[str]:
        """Return from the PG; `never` names a payment that must not succeed."""
        self.crowd.say(order, "asked")
        url = requests.success_url(order, payment_key)
        word = yield from self.open_success_url(order, url)
        if never and word in _PAID:
            self.crowd.accuse(f"{order['orderId']}: {never} ended as {word}")
        return self.ended(order, word)

    def open_success_url(self, order: Order, url: str) -> Scenario[str]:
        """Load the success page until the payment has an outcome, or the buyer gives up."""
        habits = self.crowd.habits
        loads = self.draw.choice(habits.loads) if habits.loads else habits.tries_max
        reads_status = habits.status_reads_max > 0
        answer = yield from ask_once(requests.come_back(url))
        for _ in range(loads - 1):
            is_pending = answer.status == HTTPStatus.ACCEPTED and not reads_status
            if not (answer.is_deferred or is_pending):
                break
            yield habits.pause_after(answer, self.draw)
            answer = yield from ask_once(requests.come_back(url))
        return (yield from self._end(order, answer))

    def _end(self, order: Order, answer: Answer) -> Scenario[str]:
        """The word for an answer about an order: one of `ENDS`, or a code or status that is none.

        A payment that is still undecided after all reads is `confirming`.
        """
        if answer.status == HTTPStatus.ACCEPTED:
            return (yield from self._wait_until_settled(order))
        if answer.status == HTTPStatus.OK:
            return str(answer.body.get("status", HTTPStatus.OK)).lower()
        return _REFUSED_ENDS.get(answer.code, answer.code) or str(answer.status)

    def _wait_until_settled(self, order: Order) -> Scenario[str]:
        habits = self.crowd.habits
        request = requests.read(
            order["orderId"],
            requests.proof_of(order),
            wait_seconds=habits.status_wait_seconds,
            name="wait until settled",
        )
        for _ in range(habits.status_reads_max):
            answer = yield from self.ask(request)
            status = str(answer.body.get("status", "")).lower()
            if answer.status == HTTPStatus.OK and status != "confirming":
                return "declined" if status == "released" else status
        return "confirming"

    def ended(self, order: Order, word: str) -> str:
        """Report the end; a word that is none leaves the order's end unknown."""
        self.crowd.say(order, word if word in ENDS or word == "confirming" else "asked")
        return word
