"""Runs the mutating scripts with retries, and maps their common refusals to errors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotAcknowledged
from reservation.adapters.redis.scripts import load
from reservation.domain.errors import HoldLost, SaleRecovering, Unavailable

__all__ = ["ScriptRunner", "members_json"]


class ScriptRunner:
    """One call per change. Each script is idempotent.

    Each reply to a change raises the sale's high-water mark.
    """

    def __init__(self, connections: RedisClient) -> None:
        self._connections = connections
        self._marks = connections.marks

    async def run(
        self,
        name: str,
        sale_id: str,
        *,
        epoch: str,
        keys: Sequence[str],
        args: Sequence[str | int],
        acked: bool = True,
    ) -> list[str]:
        """Run a script whose first arguments are `not_after`, the epoch and the mark.

        Args:
            name: of the script.
            sale_id: the sale.
            epoch: the epoch of the sale, as last read by the caller.
            keys: the sale's key first.
            args: the script's further arguments.
            acked: whether replicas must have the change before the reply is used.

        Raises:
            NotAcknowledged: the script ran, and too few replicas have the change that it reports.
            SaleRecovering: the sale is missing, damaged or in another epoch, or the server lost
                events of it; a rebuild is due.
            HoldLost: the script found no such reservation.
            Unavailable: every try reached the server after `not_after`; nothing changed.
            StoreUnavailable, StoreUncertain: after several tries.
        """
        short: NotAcknowledged | None = None
        try:
            reply = await self._answer(
                name, keys, lambda: [epoch, *self._marks.of(sale_id, epoch), *args], acked=acked
            )
        except NotAcknowledged as error:
            short, reply = error, _checked(error.reply)
        # The reply of a script that wrote ends with the sale's new head.
        if reply and isinstance(reply[-1], list):
            head = reply.pop()
            # No answer has confirmed a change that replicas may lack, so its loss is none.
            if short is None and (acked or not self._connections.acks.wanted):
                self._marks.learn_head(sale_id, epoch, head)
        if reply and reply[0] == "went_back":
            self._marks.report_regression(sale_id, epoch)
            raise SaleRecovering
        if short is not None:
            raise NotAcknowledged(reply) from short
        return reply

    async def run_unmarked(
        self, name: str, *, epoch: str, keys: Sequence[str], args: Sequence[str | int]
    ) -> list[str]:
        """Run a script of a rebuild, which takes no mark: it replaces the lost data.

        Raises:
            The errors of `run`.
        """
        return await self._answer(name, keys, lambda: [epoch, *args])

    async def _answer(
        self, name: str, keys: Sequence[str], args: Any, *, acked: bool = False
    ) -> list[Any]:
        return _checked(
            await self._connections.call_again(
                load(name),
                keys,
                lambda: [self._connections.not_after_ms(keys[0]), *args()],
                acked=acked,
                touched=keys[0],
            )
        )


def _checked(reply: list[Any]) -> list[Any]:
    """The reply; the refusals that all scripts share become errors."""
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
