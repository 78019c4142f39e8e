"""Crowd of one sale: its buyers, in their own process, and the answers to each of them.

`python -m tests.faults.chaos.clients ORDERS` reads its `Orders` as JSON from the argument, writes
every call with its answer to a file, one line each, and a summary to its standard output.
"""

import asyncio
import random
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
import uvloop

from api.http.auth.guests import Guests
from loadtests.recording import Call, operation_of
from reservation.config.settings import Settings
from tests.faults.chaos.http_client import Answer, Wire

__all__ = ["Orders", "Summary"]

#: Tries of one prepare, with the same key.
TRIES_MAX = 6
#: Prepares of a buyer without a hold.
WISHES_MAX = 8
STATUS_READS_MAX = 3
#: Accusations that are kept in full.
ACCUSED_MAX = 50
#: Other buyers' orders that an intruder knows of.
STRANGERS_MAX = 500
#: One prepare in this many is cut off by its buyer.
CUT_OF = 150


class Orders(msgspec.Struct, kw_only=True, frozen=True):
    """The orders of one crowd."""

    url: str
    environ: dict[str, str]
    sale_id: str
    #: Price of each SKU.
    prices: dict[str, int]
    hold_seconds: int
    seconds: float
    buyers: int
    seed: int
    file: str


class Summary(msgspec.Struct, kw_only=True):
    """The result of one crowd."""

    calls: int = 0
    disconnects: int = 0
    lives: dict[str, int] = {}
    statuses: dict[str, int] = {}
    accused: list[str] = []


class Crowd:
    """All the buyers of one process."""

    def __init__(self, orders: Orders, file: Any) -> None:
        self._orders = orders
        self._chance = random.Random(orders.seed)
        settings = Settings.load(orders.environ, None)
        self._guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
        self._wire = Wire(orders.url)
        #: By the address that an order names: a restarted PG may have another.
        self._pgs: dict[str, Wire] = {}
        self._file = file
        self._encoder = msgspec.json.Encoder()
        self._strangers: deque[str] = deque(maxlen=STRANGERS_MAX)
        self._lives: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self.summary = Summary()

    async def run(self) -> Summary:
        """Live until the time is over; every buyer's life is completed."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._orders.seconds

        async def one_after_the_other() -> None:
            while loop.time() < until:
                try:
                    await self._live()
                except Exception as error:  # noqa: BLE001 - loop top: logged, the others live on
                    self._accuse(f"a buyer broke: {error!r}")

        async with asyncio.TaskGroup() as group:
            for _ in range(self._orders.buyers):
                group.create_task(one_after_the_other())
        self._wire.close()
        for pg in self._pgs.values():
            pg.close()
        self.summary.lives = dict(self._lives.most_common())
        self.summary.statuses = dict(self._statuses.most_common())
        return self.summary

    async def _live(self) -> None:
        buyer_id, token = self._guests.new("")
        buyer = _Buyer(buyer_id, {"Authorization": f"Bearer {token}"})
        for _ in range(self._chance.randint(1, WISHES_MAX)):
            order = await self._take(buyer)
            if order is None:
                continue
            kinds = list(LIVES)
            kind = self._chance.choices(kinds, weights=[LIVES[name][0] for name in kinds])[0]
            await LIVES[kind][1](self, buyer, order)
            self._lives[kind] += 1
            return
        self._lives["nothing to be had"] += 1

    async def _take(self, buyer: "_Buyer") -> dict[str, Any] | None:
        """A prepare, repeated with its key until there is an answer; the order, if there is one."""
        body = self._wish()
        headers = buyer.headers | {"Idempotency-Key": f"chaos-{self._chance.getrandbits(64):x}"}
        if self._chance.randrange(CUT_OF) == 0:
            self.summary.disconnects += 1
            cut_after = self._chance.uniform(0.0005, 0.02)
            await self._ask(buyer, "POST", self._prepare_path, headers, body, cut_after=cut_after)
        twice = self._chance.random() < 0.03
        for _ in range(TRIES_MAX):
            asked = [self._ask(buyer, "POST", self._prepare_path, headers, body)]
            if twice:
                asked.append(self._ask(buyer, "POST", self._prepare_path, headers, body))
            answers = await asyncio.gather(*asked)
            held = [one.body for one in answers if one.is_ours]
            if len({order["orderId"] for order in held}) > 1:
                self._accuse(f"one key, two orders: {held}")
            if held and "token" not in held[0]:
                # A late answer, as a replay: its hold is over by now.
                return None
            if held:
                self._strangers.append(held[0]["orderId"])
                return held[0]
            if answers[0].status not in {0, 429, 503}:
                return None
            await asyncio.sleep(self._chance.uniform(0.05, 0.4))
        return None

    @property
    def _prepare_path(self) -> str:
        return f"/v1/sales/{self._orders.sale_id}/reservations"

    def _wish(self) -> dict[str, Any]:
        skus = sorted(self._orders.prices)
        chosen = self._chance.sample(skus, min(len(skus), self._chance.choice([1, 1, 1, 2])))
        items = [{"sku": sku, "quantity": self._chance.choice([1, 1, 2])} for sku in chosen]
        amount = sum(self._orders.prices[one["sku"]] * one["quantity"] for one in items)
        if self._chance.random() < 0.01:
            amount -= 1
        return {"items": items, "amount": amount}

    async def release(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Give it back, once or twice."""
        for _ in range(self._chance.choice([1, 1, 2])):
            await self._repeat(
                buyer,
                "POST",
                f"/v1/reservations/{order['orderId']}/release",
                {"X-Reservation-Token": order["token"]},
            )

    async def leave(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Send nothing; perhaps read once more."""
        if self._chance.random() < 0.5:
            await self._read(buyer, order)

    async def fail(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """The PG sends the browser to the fail URL."""
        url = urlsplit(order["payment"]["failUrl"])
        await self._repeat(buyer, "GET", f"{url.path}?{url.query}&code=PAY_PROCESS_CANCELED", {})
        await self._read(buyer, order)

    async def pay(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Pay, come back once or more often, wait until it is settled."""
        path = self._success_path(order, await self._payment_key(order))
        times = self._chance.choice([1, 1, 2, 4])
        answers = await asyncio.gather(*(self._ask(buyer, "GET", path, {}) for _ in range(times)))
        if any(answer.status != 200 for answer in answers):
            await self._repeat(buyer, "GET", path, {})
            for _ in range(STATUS_READS_MAX):
                if await self._read(buyer, order, wait=2) != "CONFIRMING":
                    break

    async def decline(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """A card that is refused, then another one."""
        key = await self._payment_key(order, decline="REJECT_CARD_COMPANY")
        answer = await self._repeat(buyer, "GET", self._success_path(order, key), {})
        if answer.body.get("status") == "CONFIRMED":
            self._accuse(f"{order['orderId']}: a refused card was confirmed")
        if answer.code == "payment_declined":
            await self.pay(buyer, order)

    async def late(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Come back when the hold is over."""
        key = await self._payment_key(order)
        await asyncio.sleep(self._orders.hold_seconds + self._chance.uniform(0.2, 2))
        await self._repeat(buyer, "GET", self._success_path(order, key), {})
        await self._read(buyer, order)

    async def tamper(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Pay less, and say so to us."""
        key = await self._payment_key({**order, "amount": 1})
        answer = await self._repeat(buyer, "GET", self._success_path(order, key, amount="1"), {})
        if answer.is_ours and answer.body.get("status") == "CONFIRMED":
            self._accuse(f"{order['orderId']}: paid with an amount that is not its own")
        await self.release(buyer, order)

    async def intrude(self, buyer: "_Buyer", order: dict[str, Any]) -> None:
        """Read, release and pay for another buyer's order."""
        other = self._chance.choice(self._strangers)
        if other == order["orderId"]:
            return
        stolen = self._success_path(order, await self._payment_key(order), orderId=other)
        for method, path, headers in (
            ("GET", f"/v1/reservations/{other}", buyer.headers),
            ("POST", f"/v1/reservations/{other}/release", buyer.headers),
            ("GET", stolen, {}),
        ):
            answer = await self._wire.ask(method, path, headers)
            self._statuses[f"intruder {answer.status} {answer.code}"] += 1
            if answer.is_ours:
                self._accuse(f"{other}: {method} by another buyer was answered {answer.status}")
        await self.release(buyer, order)

    async def _read(self, buyer: "_Buyer", order: dict[str, Any], wait: int = 0) -> str:
        path = f"/v1/reservations/{order['orderId']}{f'?wait={wait}' if wait else ''}"
        answer = await self._ask(buyer, "GET", path, {"X-Reservation-Token": order["token"]})
        return str(answer.body.get("status", ""))

    async def _payment_key(self, order: dict[str, Any], decline: str = "") -> str:
        """The payment key of the PG's redirect; an unknown one where the PG is away."""
        checkout = urlsplit(order["payment"]["checkoutUrl"])
        address = f"{checkout.scheme}://{checkout.netloc}"
        pg = self._pgs.setdefault(address, Wire(address))
        path = f"{checkout.path.removesuffix('/checkout')}/_payments"
        wish: dict[str, Any] = {"orderId": order["orderId"], "amount": order["amount"]}
        if decline:
            wish["decline"] = decline
        for _ in range(TRIES_MAX):
            answer = await pg.ask("POST", path, {}, wish)
            if "paymentKey" in answer.body:
                return str(answer.body["paymentKey"])
            await asyncio.sleep(self._chance.uniform(0.1, 0.5))
        return f"nobodys-{order['orderId']}"

    @staticmethod
    def _success_path(order: dict[str, Any], payment_key: str, **changes: str) -> str:
        url = urlsplit(order["payment"]["successUrl"])
        query = {
            "paymentType": "NORMAL",
            "orderId": order["orderId"],
            "paymentKey": payment_key,
            "amount": str(order["amount"]),
        } | changes
        return f"{url.path}?{url.query}&{urlencode(query)}"

    async def _repeat(
        self, buyer: "_Buyer", method: str, path: str, headers: dict[str, str]
    ) -> Answer:
        """Retry until there is a conclusive answer."""
        answer = await self._ask(buyer, method, path, headers)
        for _ in range(TRIES_MAX):
            if answer.status not in {0, 429, 503}:
                break
            await asyncio.sleep(self._chance.uniform(0.05, 0.5))
            answer = await self._ask(buyer, method, path, headers)
        return answer

    async def _ask(
        self,
        buyer: "_Buyer",
        method: str,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any] | None = None,
        *,
        cut_after: float | None = None,
    ) -> Answer:
        answer = await self._wire.ask(method, path, headers, body, cut_after=cut_after)
        self.summary.calls += 1
        self._statuses[f"{answer.status} {answer.code}".strip()] += 1
        operation = operation_of(
            Call(
                sale=self._orders.sale_id,
                client=buyer.id,
                buyer=buyer.id,
                method=method,
                url=path,
                body=body,
                invoked_ns=answer.asked_ns,
                answered_ns=answer.read_ns,
                status=answer.status,
                answer=answer.body,
                replayed=answer.replayed,
            )
        )
        if operation is not None:
            self._file.write(self._encoder.encode(operation) + b"\n")
        return answer

    def _accuse(self, what: str) -> None:
        if len(self.summary.accused) < ACCUSED_MAX:
            self.summary.accused.append(what)


class _Buyer(msgspec.Struct, frozen=True):
    id: str
    headers: dict[str, str]


#: Lives of a buyer with a hold, and their weights.
LIVES: dict[str, tuple[int, Callable[[Crowd, _Buyer, dict[str, Any]], Awaitable[None]]]] = {
    "release": (40, Crowd.release),
    "leave": (20, Crowd.leave),
    "pay": (22, Crowd.pay),
    "fail": (6, Crowd.fail),
    "decline": (4, Crowd.decline),
    "late": (3, Crowd.late),
    "tamper": (3, Crowd.tamper),
    "intrude": (2, Crowd.intrude),
}


def main() -> int:
    """One crowd."""
    orders = msgspec.json.decode(sys.argv[1], type=Orders)
    with Path(orders.file).open("wb", buffering=1 << 20) as file, suppress(KeyboardInterrupt):
        summary = uvloop.run(Crowd(orders, file).run())
        sys.stdout.write(msgspec.json.encode(summary).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
