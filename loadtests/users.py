"""Buyers: each life is a new buyer of one kind, from first request to last."""

# Locust types its own members in part: the values are narrowed where they enter.
# pyright: reportUnknownMemberType=false

import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import urlencode

import gevent
import msgspec
from gevent.pool import Group
from locust import FastHttpUser, task

from api.http.auth.guests import Guests
from loadtests.buyer_outcomes import Answers, ends_of
from loadtests.recording import Call, operation_of
from loadtests.response_fields import Answer, members_of, new_key

__all__ = ["KINDS", "Buyer", "Plan"]

#: Tries of a request that was deferred, and the longest wait of a buyer for one.
TRIES_MAX: Final = 5
WAIT_SECONDS_MAX: Final = 5.0
#: Polls of an order during its payment, each of up to ten seconds.
STATUS_READS_MAX: Final = 8
REFRESHES: Final = 5
#: Other buyers' orders that an intruder knows of.
STRANGERS_MAX: Final = 1000

#: Expected refusals, and their names in the statistics; any other non-2xx is a failure there.
EXPECTED: Final = {
    "sold_out": "sold out",
    "buyer_limit_exceeded": "limit reached",
    "rate_limited": "rate limited",
    "sale_closed": "sale closed",
    "payment_declined": "declined",
    "reservation_expired": "came too late",
    "hold_lost": "hold lost",
}

#: A prepare that was answered late, as a replay of a hold that is over by then.
OVER: Final = "answered too late"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that the buyers of one run share."""

    sale_id: str
    mix: dict[str, int]
    #: Seconds between two lives of one Locust user, on average.
    think_seconds: float
    #: Every buyer wants the first item.
    one_item: bool
    #: Each call is kept for the history checker.
    recorded: bool


class Buyer(FastHttpUser):
    """One Locust user: lives one buyer's life after the other."""

    network_timeout = 30.0
    connection_timeout = 10.0
    #: Set by the locustfile at the start of a run.
    plan: Plan
    answers: Answers
    guests: Guests
    #: Orders of this process's buyers, for buyers who try another's.
    strangers: deque[str] = deque(maxlen=STRANGERS_MAX)

    @task
    def live(self) -> None:
        """One life, and a pause."""
        plan = self.plan
        kind = random.choices(list(plan.mix), weights=list(plan.mix.values()))[0]
        self._buyer_id, token = self.guests.new("")
        self._headers = {"Authorization": f"Bearer {token}"}
        self.answers.lives[f"{kind}: {KINDS[kind](self)}"] += 1
        gevent.sleep(random.uniform(0, 2 * plan.think_seconds))

    def pay(self) -> str:
        """Read the sale, prepare, pay, come back."""
        order = self._take()
        return order if isinstance(order, str) else self._pay(order)

    def leave(self) -> str:
        """Take a piece and leave, with or without a release."""
        order = self._take()
        if isinstance(order, str):
            return order
        if random.random() < 0.5:
            return "without a word"
        return self._release(order)

    def decline(self) -> str:
        """A card that is refused, then one that is not."""
        order = self._take()
        if isinstance(order, str):
            return order
        first = self._pay(order, decline="REJECT_CARD_COMPANY")
        if first == "confirmed":
            self.answers.accuse(f"{order['orderId']}: a refused card ended as confirmed")
        return f"{first}, then {self._pay(order)}" if first == "declined" else first

    def refresh(self) -> str:
        """Load the success page again and again, at once and afterwards."""
        order = self._take()
        if isinstance(order, str):
            return order
        url = self._success_url(order, self._payment_key(order))
        self.answers.say(order, "asked")
        calls: list[Callable[[], Answer]] = [lambda: self._open_success_url(url)] * REFRESHES
        words = [self._end(order, answer) for answer in self._at_once(calls)]
        words.append(self._end(order, self._open_success_url(url)))
        ends = ends_of(words)
        if len(ends) > 1:
            self.answers.accuse(f"{order['orderId']}: one payment ended as {sorted(ends)}")
        return self._ended(order, ends.pop() if len(ends) == 1 else "unknown")

    def double(self) -> str:
        """Click twice: two prepares with one key."""
        item = self._read_sale()
        if item is None:
            return "no sale"
        key = new_key()
        first, second = self._at_once([lambda: self._prepare(item, key)] * 2)
        orders = [answer.body for answer in (first, second) if answer.status == HTTPStatus.CREATED]
        if len({order["orderId"] for order in orders}) > 1:
            self.answers.accuse(f"one key, two orders: {[order['orderId'] for order in orders]}")
        if orders:
            return self._pay(orders[0]) if self._hold(orders[0]) else OVER
        return self._refused(item, first)

    def late(self) -> str:
        """Come back from the PG after the hold has ended."""
        order = self._take()
        if isinstance(order, str):
            return order
        url = self._success_url(order, self._payment_key(order))
        gevent.sleep(self._hold_seconds + random.uniform(0.5, 2.5))
        self.answers.say(order, "asked")
        return self._ended(order, self._end(order, self._open_success_url(url)))

    def tamper(self) -> str:
        """Change the price: in the prepare, then on the way back from the PG."""
        item = self._read_sale()
        if item is None:
            return "no sale"
        cheap = self._prepare({**item, "price": max(1, item["price"] - 1)}, new_key())
        if cheap.status == HTTPStatus.CREATED and item["price"] > 1:
            self.answers.accuse(f"{cheap.body['orderId']}: prepared at a price that is not ours")
        order = self._take()
        if isinstance(order, str):
            return order
        key = self._payment_key({**order, "amount": 1})
        self.answers.say(order, "asked")
        answer = self._open_success_url(
            self._success_url(order, key, amount="1"), at_most="amount_mismatch"
        )
        if answer.status < HTTPStatus.BAD_REQUEST and order["amount"] > 1:
            self.answers.accuse(f"{order['orderId']}: paid with an amount that is not its own")
        return f"{answer.code or answer.status}, then {self._release(order)}"

    def intrude(self) -> str:
        """Read, release and pay for another buyer's order."""
        order = self._take(known=False)
        if isinstance(order, str) or not self.strangers:
            return order if isinstance(order, str) else self._release(order)
        other = random.choice(self.strangers)
        path = f"/v1/reservations/{other}"
        not_found = ("reservation_not_found",)
        tries = {
            "read": self._ask("GET", path, "intrude: read", self._headers, known=not_found),
            "released": self._ask(
                "POST", f"{path}/release", "intrude: release", self._headers, known=not_found
            ),
        }
        stolen = self._success_url(order, self._payment_key(order), orderId=other)
        tries["paid"] = self._ask(
            "GET",
            stolen,
            "intrude: come back",
            {"Accept": "application/json"},
            known=("invalid_token", "reservation_not_found"),
        )
        for what, answer in tries.items():
            if 0 < answer.status < HTTPStatus.BAD_REQUEST:
                self.answers.accuse(f"{other}: {what} by another buyer, {answer.status}")
        return self._release(order)

    def _take(self, *, known: bool = True) -> dict[str, Any] | str:
        """Read the sale and prepare; the order, or the reason for none."""
        item = self._read_sale()
        if item is None:
            return "no sale"
        answer = self._prepare(item, new_key())
        if answer.status != HTTPStatus.CREATED:
            return self._refused(item, answer)
        return answer.body if self._hold(answer.body, known=known) else OVER

    def _read_sale(self) -> dict[str, Any] | None:
        answer = self._ask("GET", f"/v1/sales/{self.plan.sale_id}", "look", self._headers)
        items: list[dict[str, Any]] = answer.body.get("items", [])
        if not items:
            return None
        self._hold_seconds = int(answer.body["holdSeconds"])
        return items[0] if self.plan.one_item else random.choice(items)

    def _prepare(self, item: Mapping[str, Any], key: str) -> Answer:
        body = {"items": [{"sku": item["sku"], "quantity": 1}], "amount": item["price"]}
        return self._ask(
            "POST",
            f"/v1/sales/{self.plan.sale_id}/reservations",
            "prepare",
            {**self._headers, "Idempotency-Key": key},
            body,
            known=("amount_mismatch",),
        )

    def _refused(self, item: Mapping[str, Any], answer: Answer) -> str:
        left = answer.body.get("available", {}).get(item["sku"], 0)
        if answer.code == "sold_out" and left >= 1:
            self.answers.accuse(f"{item['sku']}: sold out, and {left} available in one answer")
        return answer.code or str(answer.status)

    def _hold(self, order: dict[str, Any], *, known: bool = True) -> bool:
        self.answers.say(order, "held")
        if "payment" not in order:
            return False
        checkout = order["payment"].get("checkoutUrl")
        if checkout is None:
            raise RuntimeError("a load test needs the sandbox: this service has no checkoutUrl")
        self.answers.sandbox_url = checkout.removesuffix("/checkout")
        if known:
            self.strangers.append(order["orderId"])
        return True

    def _pay(self, order: dict[str, Any], decline: str | None = None) -> str:
        url = self._success_url(order, self._payment_key(order, decline))
        self.answers.say(order, "asked")
        return self._ended(order, self._end(order, self._open_success_url(url)))

    def _payment_key(self, order: dict[str, Any], decline: str | None = None) -> str:
        """The PG's payment key; an unknown key where the PG is away."""
        wish = {"orderId": order["orderId"], "amount": order["amount"], "method": "card"}
        answer = self._ask(
            "POST",
            f"{self.answers.sandbox_url}/_payments",
            "pay at the PG",
            {},
            wish | ({"decline": decline} if decline else {}),
        )
        return str(answer.body.get("paymentKey", "no-payment-was-made"))

    @staticmethod
    def _success_url(order: dict[str, Any], payment_key: str, **changes: str) -> str:
        query = {
            "paymentType": "NORMAL",
            "orderId": order["orderId"],
            "paymentKey": payment_key,
            "amount": str(order["amount"]),
        } | changes
        return f"{order['payment']['successUrl']}&{urlencode(query)}"

    def _open_success_url(self, url: str, at_most: str = "") -> Answer:
        headers = {"Accept": "application/json"}
        return self._ask("GET", url, "come back", headers, known=(at_most,))

    def _end(self, order: dict[str, Any], answer: Answer) -> str:
        """The word for a return's end."""
        if answer.status == HTTPStatus.ACCEPTED:
            return self._wait_until_settled(order)
        if answer.status == HTTPStatus.OK:
            return str(answer.body["status"]).lower()
        final = {"payment_declined": "declined"}.get(answer.code, answer.code)
        return final if answer.code in EXPECTED and answer.status != 429 else "unknown"

    def _wait_until_settled(self, order: dict[str, Any]) -> str:
        headers = {"X-Reservation-Token": order["token"]}
        path = f"/v1/reservations/{order['orderId']}?wait=10"
        for _ in range(STATUS_READS_MAX):
            answer = self._ask("GET", path, "wait until settled", headers)
            status = str(answer.body.get("status", "")).lower()
            if answer.status == HTTPStatus.OK and status != "confirming":
                return "declined" if status == "released" else status
        return "confirming"

    def _ended(self, order: dict[str, Any], word: str) -> str:
        self.answers.say(order, "asked" if word == "unknown" else word)
        return word

    def _release(self, order: dict[str, Any]) -> str:
        self.answers.say(order, "asked")
        headers = {"X-Reservation-Token": order["token"]}
        path = f"/v1/reservations/{order['orderId']}/release"
        answer = self._ask("POST", path, "release", headers)
        return self._ended(order, self._end(order, answer))

    @staticmethod
    def _at_once(calls: list[Callable[[], Answer]]) -> list[Answer]:
        """All of these at once; none of them outlives the buyer."""
        group = Group()
        try:
            running = [group.spawn(call) for call in calls]
            gevent.joinall(running, raise_error=True)
            return [cast("Answer", one.value) for one in running]
        finally:
            group.kill(block=False)

    def _ask(
        self,
        method: str,
        url: str,
        name: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        *,
        known: tuple[str, ...] = (),
    ) -> Answer:
        """One request, retried while it is deferred; all of them may be repeated."""
        for attempt in range(1, TRIES_MAX + 1):
            answer = self._ask_once(method, url, name, headers, body, known)
            if answer.status not in {0, 429, 503} or attempt == TRIES_MAX:
                return answer
            wait = float(answer.body.get("retryAfter") or 1)
            gevent.sleep(min(wait, WAIT_SECONDS_MAX) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _ask_once(
        self,
        method: str,
        url: str,
        name: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any] | None,
        known: tuple[str, ...],
    ) -> Answer:
        invoked_ns = time.monotonic_ns()
        with self.client.request(
            method, url, name=name, headers=dict(headers), json=body, catch_response=True
        ) as response:
            status = int(response.status_code or 0)
            answer = Answer(status, members_of(response.content))
            if self.plan.recorded:
                replayed = "Idempotent-Replayed" in (response.headers or {})
                self._record(method, url, body, answer, invoked_ns, replayed=replayed)
            if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
                response.success()
            elif answer.code in EXPECTED or answer.code in known:
                # An expected refusal gets its own name: failures count real failures only.
                word = EXPECTED.get(answer.code, answer.code.replace("_", " "))
                response.request_meta["name"] = f"{name}: {word}"
                response.success()
            else:
                response.failure(f"{status} {answer.code}".strip())
            return answer

    def _record(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        answer: Answer,
        invoked_ns: int,
        *,
        replayed: bool,
    ) -> None:
        operation = operation_of(
            Call(
                sale=self.plan.sale_id,
                client=self._buyer_id,
                buyer=self._buyer_id,
                method=method,
                url=url,
                body=body,
                invoked_ns=invoked_ns,
                answered_ns=time.monotonic_ns(),
                status=answer.status,
                answer=answer.body,
                replayed=replayed,
            )
        )
        if operation is not None:
            self.answers.record(operation)


KINDS: Final[dict[str, Callable[[Buyer], str]]] = {
    "pay": Buyer.pay,
    "leave": Buyer.leave,
    "decline": Buyer.decline,
    "refresh": Buyer.refresh,
    "double": Buyer.double,
    "late": Buyer.late,
    "tamper": Buyer.tamper,
    "intrude": Buyer.intrude,
}
