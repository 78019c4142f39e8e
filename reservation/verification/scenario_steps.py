"""Steps of a scenario, and the loop that performs them under asyncio.

A scenario is a generator: it yields its steps, receives the result of each, and returns its
outcome. It does no I/O, so one scenario serves every driver, and a test can script its answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeAlias, TypeVar, cast

import msgspec

__all__ = [
    "Answer",
    "AtOnce",
    "Pause",
    "Request",
    "Scenario",
    "ask_once",
    "at_once",
    "members_of",
    "perform",
]

T = TypeVar("T")

#: Statuses after which the same request may be repeated; 0 where no answer came.
_DEFERRED: Final = frozenset({0, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class Answer(msgspec.Struct, frozen=True):
    """One decoded answer; status 0 where none came."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> str:
        """The code of a problem document, or nothing."""
        return str(self.body.get("code", ""))

    @property
    def is_success(self) -> bool:
        """Whether the request was accepted."""
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def is_deferred(self) -> bool:
        """Whether the outcome is unknown or put off, so that a repeat is worthwhile."""
        return self.status in _DEFERRED


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request; its result is an `Answer`."""

    #: The name of its kind in statistics.
    name: str
    method: str
    #: A path of the service, or a whole URL: the PG's, or one that an answer contained.
    url: str
    headers: Mapping[str, str] = {}
    body: Mapping[str, Any] | None = None
    #: Refusals that are expected here and nowhere else.
    known: tuple[str, ...] = ()
    #: The client closes the connection this many seconds after it sent the request.
    cut_after_seconds: float | None = None


class Pause(msgspec.Struct, frozen=True):
    """A wait; it has no result."""

    seconds: float


class AtOnce(msgspec.Struct, frozen=True):
    """Scenarios performed side by side; the result is the list of their outcomes."""

    scenarios: Sequence[Generator[Any, Any, Any]]


Scenario: TypeAlias = Generator[Request | Pause | AtOnce, Any, T]


def ask_once(request: Request) -> Scenario[Answer]:
    """The answer to one request."""
    return cast("Answer", (yield request))


def at_once(scenarios: Sequence[Scenario[T]]) -> Scenario[list[T]]:
    """The outcomes of scenarios performed side by side."""
    if len(scenarios) == 1:
        return [(yield from scenarios[0])]
    return cast("list[T]", (yield AtOnce(scenarios)))


async def perform(scenario: Scenario[T], send: Callable[[Request], Awaitable[Answer]]) -> T:
    """Perform each step; the outcome of the scenario."""
    result: Any = None
    try:
        while True:
            step = scenario.send(result)
            if isinstance(step, Request):
                result = await send(step)
            elif isinstance(step, Pause):
                result = await asyncio.sleep(step.seconds)
            else:
                result = await asyncio.gather(*(perform(one, send) for one in step.scenarios))
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        scenario.close()


def members_of(content: bytes | None) -> dict[str, Any]:
    """The members of a JSON object; none if the content is something else."""
    try:
        found = msgspec.json.decode(content or b"{}")
    except msgspec.DecodeError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
