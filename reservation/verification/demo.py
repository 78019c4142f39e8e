"""Demo: buyers compete for the units of a flash sale, then the books are reconciled.

The buyers come over HTTP like any others. Some leave, some are declined and try another card, some
load the success page again and again. The verdict does not trust the service: it compares the
audit, the orders in SQL and the PG's own money ledger, and lists every wrong answer to a buyer.
"""

import asyncio
import itertools
import random
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final

import httpx
import msgspec

from reservation.verification.balance_check import books_of, disagreements, unsettled
from reservation.verification.buyer_requests import Order, sandbox_of
from reservation.verification.scenario_steps import (
    Answer,
    Request,
    Scenario,
    members_of,
    perform,
)
from reservation.verification.scenarios import LEFT, live
from reservation.verification.shopper import NO_SANDBOX, Basket, Crowd, Habits, Shopper

__all__ = ["Demo", "DemoPlan", "Verdict"]

#: Concurrent requests: enough for contention, few enough for two cores.
AT_ONCE: Final = 200
#: Tries of one request while a part of the service is being restarted, and the pause between them.
TRIES_MAX: Final = 60
TRY_SECONDS: Final = 0.5
#: Limit of the drain: every payment decided, every hold released, SQL caught up. The longest is a
#: confirm that was cut off: its lease, and a few polls of the PG.
DRAIN_SECONDS: Final = 180.0
DRAIN_POLL_SECONDS: Final = 0.5
PRICE: Final = 19_000
SKU: Final = "piece"
#: Allowed ends of a declined card. The last two came too late: a part of the service was away for
#: as long as the hold.
_AFTER_DECLINE: Final = ("payment_declined", "reservation_expired", "expired")
#: A story of the plan as a life of a buyer.
_LIVES: Final = {"leave": "release_or_leave"}
#: The demo's words for the ends of a life.
_WORDS: Final = {"declined": "payment_declined", "confirming": "undecided"}
#: Every request is repeated by the demo itself until the service answers.
_HABITS: Final = Habits(status_reads_max=TRIES_MAX, status_wait_seconds=10)
#: Wrong answers that are kept.
ACCUSED_MAX: Final = 100
#: Orders that the verdict reads from SQL in one page.
PAGE: Final = 100
HTTP_SECONDS: Final = 30.0


class DemoPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The scenario of one demo."""

    buyers: int = 1000
    stock: int = 100
    hold_seconds: int = 20
    #: Shares of the buyers who hold a unit.
    leaving: float = 0.1
    declined: float = 0.1
    refreshing: float = 0.2
    seed: int = 1


class Verdict(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of the demo; `problems` is empty if all books agree."""

    ok: bool
    sale_id: str
    buyers: int
    stock: int
    sold: int
    charged: int
    cancelled: int
    confirmed_amount: int
    outcomes: dict[str, int]
    problems: list[str]


class Demo:
    """Runs one sale against a service and its sandbox."""

    def __init__(
        self,
        plan: DemoPlan,
        *,
        service_url: str,
        admin_key: str,
        new_token: Callable[[], str],
        progress: Callable[[str, int], None],
    ) -> None:
        self._plan = plan
        self._service_url = service_url
        #: Known from the first order: where its payment page is.
        self._sandbox_url = ""
        self._new_token = new_token
        self._admin = {"Authorization": f"Bearer {admin_key}", "X-Operator": "demo"}
        self._progress = progress
        self._random = random.Random(plan.seed)  # noqa: S311 - a story, not a secret
        self._outcomes: Counter[str] = Counter()
        self._accused: list[str] = []
        self.sale_id = f"demo-{secrets.token_hex(4)}"
        self._crowd = Crowd(
            sale_id=self.sale_id,
            habits=_HABITS,
            accuse=self._accuse,
            say=self._say,
            prices={SKU: PRICE},
            hold_seconds=plan.hold_seconds,
        )

    async def run(self) -> Verdict:
        """Open a sale, let the buyers in, drain, reconcile the books.

        Raises:
            TimeoutError: the service or its PG does not respond.
            httpx.HTTPError: the sale was refused.
        """
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
        async with httpx.AsyncClient(
            timeout=HTTP_SECONDS, limits=limits, trust_env=False
        ) as client:
            self._client = client
            await self._open_sale()
            await self._let_buyers_in()
            await self._drain()
            return await self._verdict()

    async def _let_buyers_in(self) -> None:
        slots = asyncio.Semaphore(AT_ONCE)
        stories = [self._story(number) for number in range(self._plan.buyers)]
        try:
            async with asyncio.TaskGroup() as group:
                for number, story in enumerate(stories):
                    group.create_task(self._buyer(number, story, slots))
        except ExceptionGroup as failed:
            # The first buyer who failed ended the others.
            raise failed.exceptions[0] from failed

    async def _open_sale(self) -> None:
        now = datetime.now(UTC)
        sale = {
            "name": "Demo",
            "currency": "KRW",
            "opensAt": (now - timedelta(minutes=1)).isoformat(),
            "closesAt": (now + timedelta(days=1)).isoformat(),
            "holdSeconds": self._plan.hold_seconds,
            "holdPolicy": "prepare",
            "items": [
                {
                    "sku": SKU,
                    "name": "Piece",
                    "price": PRICE,
                    "total": self._plan.stock,
                    "limitPerBuyer": 1,
                }
            ],
        }
        answer = await self._send(
            "PUT", f"{self._service_url}/v1/admin/sales/{self.sale_id}", sale, self._admin
        )
        answer.raise_for_status()

    def _story(self, _: int) -> str:
        plan = self._plan
        chance = self._random.random()
        for name, share in (
            ("leave", plan.leaving),
            ("decline", plan.declined),
            ("refresh", plan.refreshing),
        ):
            if chance < share:
                return name
            chance -= share
        return "pay"

    async def _buyer(self, number: int, story: str, slots: asyncio.Semaphore) -> None:
        async with slots:
            outcome = await self._buy(number, story)
            self._outcomes[outcome] += 1
            self._progress(outcome, 1)

    async def _buy(self, number: int, story: str) -> str:
        shopper = Shopper(
            self._crowd,
            headers={"Authorization": f"Bearer {self._new_token()}"},
            draw=random.Random(f"{self._plan.seed} {number}"),  # noqa: S311 - a story, not a secret
        )
        return await perform(_visit(shopper, f"demo-{number}", story), self._ask)

    async def _ask(self, request: Request) -> Answer:
        url = request.url if "://" in request.url else f"{self._service_url}{request.url}"
        answer = await self._send(request.method, url, request.body, request.headers)
        if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
            self._accuse(f"{request.method} {url} was answered 500")
        return Answer(answer.status_code, members_of(answer.content))

    def _accuse(self, accusation: str) -> None:
        if len(self._accused) < ACCUSED_MAX:
            self._accused.append(accusation)

    def _say(self, order: Order, word: str) -> None:
        if word == "held" and "payment" in order:
            self._sandbox_url = sandbox_of(order) or ""

    async def _send(
        self, method: str, url: str, body: Any, headers: Mapping[str, str]
    ) -> httpx.Response:
        """One request, retried while a part restarts; every call here is idempotent."""
        failure: Exception | None = None
        for attempt in itertools.count(1):
            try:
                answer = await self._client.request(method, url, json=body, headers=headers)
            except httpx.TransportError as error:
                failure = error
            else:
                waits = answer.status_code in (429, 503)
                if not waits or attempt >= TRIES_MAX:
                    return answer
            if attempt >= TRIES_MAX:
                raise TimeoutError(f"{url} does not answer") from failure
            await asyncio.sleep(TRY_SECONDS)
        raise AssertionError("unreachable")

    async def _drain(self) -> None:
        """Wait until every payment is decided, every abandoned hold is back and SQL has it all."""
        give_up_at = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while asyncio.get_running_loop().time() < give_up_at:
            audit = await self._audit()
            held = sum(row["held"] for row in audit.get("skus", ()))
            self._progress("waiting", 0)
            if audit.get("lag") == 0 and held == 0:
                return
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def _audit(self) -> dict[str, Any]:
        url = f"{self._service_url}/v1/admin/sales/{self.sale_id}/audit"
        return (await self._send("GET", url, None, self._admin)).json()

    async def _verdict(self) -> Verdict:
        books = books_of(
            self.sale_id,
            audit=await self._audit(),
            orders=await self._orders(),
            entries=await self._ledger(),
        )
        problems = [*disagreements(books), *unsettled(books)]
        sold = books.counted("sold")
        if sold > self._plan.stock:
            problems.append(f"{sold} of {self._plan.stock} sold")
        problems += self._accused
        problems += [
            f"{count} buyers: {outcome}"
            for outcome, count in self._outcomes.items()
            if outcome.startswith(("repeats differ", "a declined card", "leaving answered"))
            or outcome in ("undecided", "500", "internal_error", NO_SANDBOX)
        ]
        return Verdict(
            ok=not problems,
            sale_id=self.sale_id,
            buyers=self._plan.buyers,
            stock=self._plan.stock,
            sold=sold,
            charged=books.charged,
            cancelled=books.cancelled,
            confirmed_amount=books.confirmed_amount,
            outcomes=dict(self._outcomes.most_common()),
            problems=problems,
        )

    async def _orders(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            query = {"saleId": self.sale_id, "limit": str(PAGE)} | (
                {"cursor": cursor} if cursor else {}
            )
            url = httpx.URL(f"{self._service_url}/v1/admin/orders", params=query)
            page = (await self._send("GET", str(url), None, self._admin)).json()
            found += page["orders"]
            cursor = page["nextCursor"]
            if cursor is None:
                return found

    async def _ledger(self) -> list[dict[str, Any]]:
        """The PG's own books."""
        if not self._sandbox_url:
            return []
        return (await self._send("GET", f"{self._sandbox_url}/_ledger", None, {})).json()["entries"]


def _visit(shopper: Shopper, key: str, story: str) -> Scenario[str]:
    """Prepare, then live the story; its outcome."""
    order = yield from shopper.prepare(Basket(lines={SKU: 1}, amount=PRICE), key=key)
    if isinstance(order, str):
        return order
    ends = yield from live(shopper, _LIVES.get(story, story), order)
    first, last = (_WORDS.get(word, word) for word in (ends[0], ends[-1]))
    if story == "leave":
        return _left(last)
    if story == "decline" and first not in _AFTER_DECLINE:
        return f"a declined card ended as {first}"
    return last


def _left(word: str) -> str:
    if word == LEFT:
        return f"left {LEFT}"
    return "left" if word in ("released", "expired") else f"leaving answered {word}"
