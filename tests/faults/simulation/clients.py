"""Base of the simulated clients: calls that are recorded for the judge, and repeated."""

import asyncio
import random
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import jwt
import msgspec

from loadtests.recording import Call, operation_of
from reservation.config.settings import Settings
from reservation.verification.model.history_format import Operation
from reservation.verification.scenario_steps import Answer, Request, members_of
from reservation.verification.shopper import Crowd
from tests.faults.simulation import http
from tests.faults.simulation.http import CutOff, Unreachable, Web
from tests.faults.simulation.loop import VirtualLoop
from tests.faults.simulation.processes import Process

__all__ = ["PG", "SHOP", "Client", "Town"]

SHOP = "http://shop.sim"
PG = "http://pg.sim"

#: A client's time-out. The service answers within 10 s.
PATIENCE_SECONDS = 20.0
#: Tries of one call whose answer did not come, or was a deferral.
TRIES_MAX = 12
#: Maximum pause between two tries.
PAUSE_SECONDS_MAX = 4.0
_BASE_HEADERS = {"accept": "application/json", "content-type": "application/json"}


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
    #: Every order that a buyer got.
    orders: list[dict[str, Any]]
    #: The buyers.
    crowd: Crowd
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
        self.credentials = {"Authorization": f"Bearer {token}"}

    async def send(self, request: Request) -> Answer:
        """One call; recorded where it is one of the history's."""
        url = request.url if request.url.startswith("http") else SHOP + request.url
        body = b"" if request.body is None else msgspec.json.encode(request.body)
        headers = _BASE_HEADERS | {name.lower(): text for name, text in request.headers.items()}
        sent = http.Request(
            method=request.method,
            url=url,
            headers=tuple((name.encode(), text.encode()) for name, text in headers.items()),
            body=body,
        )
        invoked_ns = self._now_ns()
        status, answer, replayed = 0, dict[str, Any](), False
        try:
            async with asyncio.timeout(request.cut_after_seconds or PATIENCE_SECONDS):
                response = await self.town.web.ask(self.process, sent)
            status, answer = response.status, members_of(response.body)
            replayed = (b"idempotent-replayed", b"true") in response.headers
        except (TimeoutError, Unreachable, CutOff):
            answer = {}
        if status == HTTPStatus.INTERNAL_SERVER_ERROR:
            short = f"{request.method} {request.url[:80]}"
            self.town.wrong.append(f"{self.name}: {short} answered 500: {answer}")
        operation = operation_of(
            Call(
                sale=self.town.sale_id,
                client=self.name,
                buyer=self.name,
                method=request.method,
                url=url,
                body=request.body,
                invoked_ns=invoked_ns,
                answered_ns=self._now_ns(),
                status=status,
                answer=answer,
                replayed=replayed,
            )
        )
        if operation is not None and url.startswith(SHOP):
            self.town.operations.append(operation)
        return Answer(status, answer)

    async def call(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """One call under this client's credentials."""
        return await self.send(
            Request(
                name="call",
                method=method,
                url=url,
                headers={**self.credentials, **headers},
                body=body,
            )
        )

    async def call_until_sure(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """The same call, repeated while its outcome is unknown."""
        answer = Answer(0, {})
        for _ in range(TRIES_MAX):
            answer = await self.call(method, url, body, headers)
            if not answer.is_deferred:
                return answer
            await self.pause(PAUSE_SECONDS_MAX)
        return answer

    async def pause(self, most: float) -> None:
        """Sleep for a random time up to this many seconds."""
        await asyncio.sleep(self.draw.random() * most)

    def _now_ns(self) -> int:
        return int(self.town.loop.now * 1e9)
