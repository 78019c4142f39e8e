"""Base of the simulated clients: calls that are recorded for the judge, and retried."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import jwt
import msgspec

from loadtests.recording import Call, operation_of
from reservation.config.settings import Settings
from reservation.verification.model.history_format import Operation
from tests.faults.simulation.http import CutOff, Request, Unreachable, Web, json_of
from tests.faults.simulation.loop import VirtualLoop
from tests.faults.simulation.processes import Process

__all__ = ["PG", "SHOP", "Answer", "Client", "Town"]

SHOP = "http://shop.sim"
PG = "http://pg.sim"

#: A client's time-out. The service answers within 10 s.
PATIENCE_SECONDS = 20.0
#: Tries of one call whose answer did not come, or was a deferral.
TRIES_MAX = 12
#: Maximum pause between two tries.
PAUSE_SECONDS_MAX = 4.0


class Answer(msgspec.Struct, frozen=True):
    """A client's answer; status 0 if none came."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> str:
        """The refusal's code."""
        return self.body.get("code", "")

    @property
    def unsure(self) -> bool:
        """Whether a retry is worthwhile."""
        return self.status == 0 or self.status >= 500 or self.status == 429


class Town(msgspec.Struct, kw_only=True):
    """The state shared by all clients."""

    sale_id: str
    #: Price of each SKU.
    prices: dict[str, int]
    settings: Settings
    web: Web
    loop: VirtualLoop
    operations: list[Operation]
    #: Answers that no client should ever get.
    wrong: list[str]
    #: Every order whose buyer may get answers about it, and its buyer's own call for it.
    orders: list[dict[str, Any]]
    #: Payments into virtual accounts without a deposit yet.
    accounts: list[str]
    #: Counts the outcomes.
    count: Callable[[str], None]


class Client:
    """One client on its own machine."""

    def __init__(self, town: Town, name: str, draw: random.Random) -> None:
        self.town = town
        self.name = name
        self.draw = draw
        self.process = Process(name, town.loop, draw)
        # Signed once; PyJWT reads the machine's own clock, which is later.
        claims = {"sub": name, "iat": 1, "exp": 4_000_000_000, "aud": "reservation-guest"}
        token = jwt.encode(claims, town.settings.jwt_secret, algorithm="HS256")
        self._bearer = (b"authorization", f"Bearer {token}".encode())

    async def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *headers: tuple[bytes, bytes],
        to: str = SHOP,
        patience: float = PATIENCE_SECONDS,
    ) -> Answer:
        """One call; recorded where it is one of the history's."""
        url = path if path.startswith("http") else to + path
        content = b"" if body is None else msgspec.json.encode(body)
        sent = [(b"accept", b"application/json"), (b"content-type", b"application/json"), *headers]
        if not any(name == b"authorization" for name, _ in headers):
            sent.append(self._bearer)
        invoked_ns = self._now_ns()
        request = Request(method=method, url=url, headers=tuple(sent), body=content)
        status, answer, replayed = 0, dict[str, Any](), False
        try:
            async with asyncio.timeout(patience):
                response = await self.town.web.ask(self.process, request)
            status, answer = response.status, json_of(response)
            replayed = (b"idempotent-replayed", b"true") in response.headers
        except (TimeoutError, Unreachable, CutOff):
            answer = {}
        self._check(method, path, status, answer)
        made = Call(
            sale=self.town.sale_id,
            client=self.name,
            buyer=self.name,
            method=method,
            url=url,
            body=body,
            invoked_ns=invoked_ns,
            answered_ns=self._now_ns(),
            status=status,
            answer=answer,
            replayed=replayed,
        )
        operation = operation_of(made) if url.startswith(SHOP) else None
        if operation is not None:
            self.town.operations.append(operation)
        return Answer(status, answer)

    async def call_until_sure(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *headers: tuple[bytes, bytes],
        to: str = SHOP,
    ) -> Answer:
        """The same call, retried while its outcome is unknown."""
        answer = Answer(0, {})
        for _ in range(TRIES_MAX):
            answer = await self.call(method, path, body, *headers, to=to)
            if not answer.unsure:
                return answer
            await self.pause(PAUSE_SECONDS_MAX)
        return answer

    async def pause(self, most: float) -> None:
        """Sleep for a random time up to this many seconds."""
        await asyncio.sleep(self.draw.random() * most)

    def _check(self, method: str, path: str, status: int, answer: dict[str, Any]) -> None:
        if status == 500:
            self.town.wrong.append(f"{self.name}: {method} {path[:80]} answered 500: {answer}")

    def _now_ns(self) -> int:
        return int(self.town.loop.now * 1e9)
