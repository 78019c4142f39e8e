"""Runs the mutating scripts until they answer, and turns their common refusals into errors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from reservation.domain.errors import HoldLost, SaleRecovering, Unavailable
from reservation.redis.connection import Connections
from reservation.redis.scripts import load

__all__ = ["Calls", "members_json"]


class Calls:
    """One call per change. Each script answers a repeat as it answered the first time."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def run(
        self, name: str, *, epoch: str, keys: Sequence[str], args: Sequence[str | int]
    ) -> list[str]:
        """Run a script whose first two arguments are `not_after` and the epoch.

        Raises:
            SaleRecovering: the sale is not the one we know, and waits for a rebuild.
            HoldLost: the script found no such reservation.
            Unavailable: it came too late each time; nothing was changed.
            StoreUnavailable, StoreUncertain: after several tries.
        """
        reply: list[str] = await self._connections.call_again(
            load(name), keys, lambda: [self._connections.not_after_ms(), epoch, *args]
        )
        match reply[0] if reply else "":
            case "recovering":
                raise SaleRecovering
            case "not_found":
                raise HoldLost
            case "too_late":
                raise Unavailable
            case _:
                return reply


def members_json(members: Mapping[str, Any]) -> str:
    """Members to append to an event's JSON object: each with its leading comma."""
    return "".join(
        f",{json.dumps(name)}:{msgspec.json.encode(value).decode()}"
        for name, value in members.items()
    )
