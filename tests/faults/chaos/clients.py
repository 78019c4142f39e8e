"""Clients of one sale: a crowd in its own process, and the answers to each of its buyers.

`python -m tests.faults.chaos.clients ORDERS` reads its `Orders` as JSON from the argument, writes
every call with its answer to a file, one line each, and a summary to its standard output.
"""

import asyncio
import random
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from api.http.auth.guests import Guests
from loadtests.recording import Call, operation_of
from reservation.config.settings import Settings
from reservation.verification.scenario_steps import Answer, Request, Scenario, perform
from reservation.verification.scenarios import live
from reservation.verification.shopper import Crowd, Habits, Shopper
from tests.faults.chaos.http_client import TimedAnswer, Wire

__all__ = ["Orders", "Summary"]

#: Prepares of a buyer without a hold.
WISHES_MAX = 8
#: Accusations that are kept in full.
ACCUSED_MAX = 50

HABITS = Habits(
    tries_max=7,
    pause_seconds=(0.05, 0.5),
    status_reads_max=3,
    status_wait_seconds=2,
    late_seconds=(0.2, 2.0),
    items=(1, 1, 1, 2),
    quantities=(1, 1, 2),
    mispriced=0.01,
    cut_off=1 / 150,
    reads=0.2,
)
#: Share of prepares that are sent twice at once.
CLICKS_TWICE = 0.03
#: Lives of a buyer with a hold, and their weights.
LIVES = {
    "release": 40,
    "leave": 20,
    "pay": 11,
    "refresh": 11,
    "fail": 6,
    "decline": 4,
    "late": 3,
    "tamper": 3,
    "intrude": 2,
}
_KINDS, _WEIGHTS = list(LIVES), list(LIVES.values())


class Orders(msgspec.Struct, kw_only=True, frozen=True):
    """The orders of one crowd."""

    #: Each request goes to one of them.
    urls: tuple[str, ...]
    environ: dict[str, str]
    sale_id: str
    #: Price of each SKU.
    prices: dict[str, int]
    hold_seconds: int
    seconds: float
    buyers: int
    seed: int
    file: str
    #: Receives the token of each new order, one line each; empty for none.
    tokens: str = ""


class Summary(msgspec.Struct, kw_only=True):
    """The result of one crowd."""

    calls: int = 0
    disconnects: int = 0
    lives: dict[str, int] = {}
    statuses: dict[str, int] = {}
    accused: list[str] = []


class Clients:
    """All the buyers of one process."""

    def __init__(self, orders: Orders, file: Any, tokens: Any = None) -> None:
        self._orders = orders
        self._tokens = tokens
        self._draw = random.Random(orders.seed)
        settings = Settings.load(orders.environ, None)
        self._guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
        self._wires = [Wire(url) for url in orders.urls]
        #: By the address that an order names: a restarted PG may have another.
        self._pgs: dict[str, Wire] = {}
        self._file = file
        self._encoder = msgspec.json.Encoder()
        self._lives: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._crowd = Crowd(
            sale_id=orders.sale_id,
            habits=HABITS,
            accuse=self._accuse,
            prices=orders.prices,
            hold_seconds=orders.hold_seconds,
        )
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
        for wire in self._wires:
            wire.close()
        for pg in self._pgs.values():
            pg.close()
        self.summary.lives = dict(self._lives.most_common())
        self.summary.statuses = dict(self._statuses.most_common())
        return self.summary

    async def _live(self) -> None:
        buyer_id, token = self._guests.new("")
        headers = {"Authorization": f"Bearer {token}"}
        shopper = Shopper(self._crowd, headers=headers, draw=self._draw)
        self._lives[await perform(self._visit(shopper), partial(self._ask, buyer_id))] += 1

    def _visit(self, shopper: Shopper) -> Scenario[str]:
        """Prepare one basket after the other until there is a hold; the life with it."""
        draw = self._draw
        for _ in range(draw.randint(1, WISHES_MAX)):
            clicks = 2 if draw.random() < CLICKS_TWICE else 1
            order = yield from shopper.prepare(shopper.basket(), clicks=clicks)
            if not isinstance(order, str):
                life = draw.choices(_KINDS, weights=_WEIGHTS)[0]
                yield from live(shopper, life, order)
                return life
        return "nothing to be had"

    async def _ask(self, buyer_id: str, request: Request) -> Answer:
        """One request; recorded where it is one of the history's."""
        wire, path = self._draw.choice(self._wires), request.url
        is_service = path.startswith("/")
        if not is_service:
            url = urlsplit(path)
            path = f"{url.path}?{url.query}" if url.query else url.path
            # An order's own URLs name the service past the network between it and its clients.
            is_service = url.path.startswith("/v1/")
            if not is_service:
                address = f"{url.scheme}://{url.netloc}"
                wire = self._pgs.setdefault(address, Wire(address))
        answer = await wire.ask(
            request.method,
            path,
            request.headers,
            request.body,
            cut_after=request.cut_after_seconds,
        )
        if is_service:
            self._count(buyer_id, request, path, answer)
        return answer

    def _count(self, buyer_id: str, request: Request, path: str, answer: TimedAnswer) -> None:
        self.summary.calls += 1
        self.summary.disconnects += request.cut_after_seconds is not None
        who = "intruder " if request.name.startswith("intrude") else ""
        self._statuses[f"{who}{answer.status} {answer.code}".strip()] += 1
        operation = operation_of(
            Call(
                sale=self._orders.sale_id,
                client=buyer_id,
                buyer=buyer_id,
                method=request.method,
                url=path,
                body=request.body,
                invoked_ns=answer.asked_ns,
                answered_ns=answer.read_ns,
                status=answer.status,
                answer=answer.body,
                replayed=answer.replayed,
            )
        )
        if operation is not None:
            self._file.write(self._encoder.encode(operation) + b"\n")
            if self._tokens is not None and operation.seq:
                told = operation.order, answer.body["token"]
                self._tokens.write(self._encoder.encode(told) + b"\n")

    def _accuse(self, accusation: str) -> None:
        if len(self.summary.accused) < ACCUSED_MAX:
            self.summary.accused.append(accusation)


def main() -> int:
    """One crowd."""
    orders = msgspec.json.decode(sys.argv[1], type=Orders)
    with ExitStack() as stack:
        stack.enter_context(suppress(KeyboardInterrupt))
        file, tokens = (
            stack.enter_context(Path(name).open("wb", buffering=1 << 20)) if name else None
            for name in (orders.file, orders.tokens)
        )
        summary = uvloop.run(Clients(orders, file, tokens).run())
        sys.stdout.write(msgspec.json.encode(summary).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
