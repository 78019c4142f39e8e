"""Locust users: each lives one buyer's life after the other."""

# Locust types its own members in part: the values are narrowed where they enter.
# pyright: reportUnknownMemberType=false

import random
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar, cast

import gevent
import msgspec
from gevent.pool import Group
from locust import FastHttpUser, task

from api.http.auth.guests import Guests
from loadtests.buyer_outcomes import Answers
from loadtests.recording import Call, operation_of
from reservation.verification import scenarios
from reservation.verification.buyer_requests import Order, sandbox_of
from reservation.verification.scenario_steps import (
    Answer,
    Pause,
    Request,
    Scenario,
    members_of,
)
from reservation.verification.scenarios import LEFT
from reservation.verification.shopper import ENDS, Crowd, Habits, Shopper

__all__ = ["KINDS", "Buyer", "Plan"]

T = TypeVar("T")

HABITS: Final = Habits(
    tries_max=5,
    retry_after_seconds_max=5.0,
    status_reads_max=8,
    status_wait_seconds=10,
)

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

#: Kinds of buyers, and the life of each with its hold.
KINDS: Final = {
    "pay": "pay",
    "leave": "release_or_leave",
    "decline": "decline",
    "refresh": "refresh",
    # Clicks twice: two prepares with one key.
    "double": "pay",
    "late": "late",
    # Changes the price in the prepare as well.
    "tamper": "tamper",
    "intrude": "intrude",
}
#: Outcomes with a name; any other is unknown.
_NAMED: Final = ENDS | {LEFT, "confirming", "amount_mismatch"}


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
    crowd: Crowd
    answers: Answers
    guests: Guests

    @classmethod
    def begin(cls, plan: Plan) -> None:
        """Form a new crowd in this process."""
        cls.plan = plan
        cls.crowd = Crowd(
            sale_id=plan.sale_id,
            habits=HABITS,
            accuse=cls._accuse,
            say=cls._say,
        )

    @classmethod
    def _accuse(cls, accusation: str) -> None:
        cls.answers.accuse(accusation)

    @classmethod
    def _say(cls, order: Order, word: str) -> None:
        cls.answers.say(order, word)
        if word == "held" and "payment" in order:
            sandbox_url = sandbox_of(order)
            if sandbox_url is None:
                raise RuntimeError("a load test needs the sandbox: this service has no checkoutUrl")
            cls.answers.sandbox_url = sandbox_url

    @task
    def live(self) -> None:
        """One life, and a pause."""
        plan = self.plan
        kind = random.choices(list(plan.mix), weights=list(plan.mix.values()))[0]
        self._buyer_id, token = self.guests.new("")
        headers = {"Authorization": f"Bearer {token}"}
        shopper = Shopper(self.crowd, headers=headers, draw=random.Random())
        self.answers.lives[f"{kind}: {self._perform(self._life(shopper, kind))}"] += 1
        gevent.sleep(random.uniform(0, 2 * plan.think_seconds))

    def _life(self, shopper: Shopper, kind: str) -> Scenario[str]:
        """Read the sale, prepare, and the rest of this kind's life."""
        if not (yield from shopper.read_sale()):
            return "no sale"
        basket = shopper.basket(first_only=self.plan.one_item)
        if kind == "tamper":
            yield from shopper.prepare(shopper.mispriced(basket))
        order = yield from shopper.prepare(basket, clicks=2 if kind == "double" else 1)
        if isinstance(order, str):
            return order
        ends = yield from scenarios.live(shopper, KINDS[kind], order)
        return ", then ".join(word if word in _NAMED else "unknown" for word in ends)

    def _perform(self, scenario: Scenario[T]) -> T:
        """Perform each step; the outcome of the scenario."""
        result: Any = None
        try:
            while True:
                step = scenario.send(result)
                if isinstance(step, Request):
                    result = self._ask(step)
                elif isinstance(step, Pause):
                    result = gevent.sleep(step.seconds)
                else:
                    result = self._at_once(step.scenarios)
        except StopIteration as end:
            return cast("T", end.value)
        finally:
            scenario.close()

    def _at_once(self, side_by_side: Sequence[Scenario[Any]]) -> list[Any]:
        """All of these at once; none of them outlives the buyer."""
        group = Group()
        try:
            running = [group.spawn(self._perform, one) for one in side_by_side]
            gevent.joinall(running, raise_error=True)
            return [one.value for one in running]
        finally:
            group.kill(block=False)

    def _ask(self, request: Request) -> Answer:
        invoked_ns = time.monotonic_ns()
        with self.client.request(
            request.method,
            request.url,
            name=request.name,
            headers=dict(request.headers),
            json=request.body,
            catch_response=True,
        ) as response:
            status = int(response.status_code or 0)
            answer = Answer(status, members_of(response.content))
            if self.plan.recorded:
                replayed = "Idempotent-Replayed" in (response.headers or {})
                self._record(request, answer, invoked_ns, replayed=replayed)
            if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
                response.success()
            elif answer.code in EXPECTED or answer.code in request.known:
                # An expected refusal gets its own name: failures count real failures only.
                word = EXPECTED.get(answer.code, answer.code.replace("_", " "))
                response.request_meta["name"] = f"{request.name}: {word}"
                response.success()
            else:
                response.failure(f"{status} {answer.code}".strip())
            return answer

    def _record(self, request: Request, answer: Answer, invoked_ns: int, *, replayed: bool) -> None:
        operation = operation_of(
            Call(
                sale=self.plan.sale_id,
                client=self._buyer_id,
                buyer=self._buyer_id,
                method=request.method,
                url=request.url,
                body=request.body,
                invoked_ns=invoked_ns,
                answered_ns=time.monotonic_ns(),
                status=answer.status,
                answer=answer.body,
                replayed=replayed,
            )
        )
        if operation is not None:
            self.answers.record(operation)
