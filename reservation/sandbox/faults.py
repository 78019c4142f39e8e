"""Fault injection: the kind of fault, the calls it hits, and how often."""

import asyncio
import random
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["AFTER", "BEFORE", "Fault", "FaultRequest", "Faults", "Operation", "Rule"]

Operation = Literal["confirm", "look_up", "cancel"]

#: Active rules at once. The first that fits a call wins, so few are needed.
RULES_MAX = 1000


class Fault(StrEnum):
    """Kinds of fault. "Before" and "after" are of the moment the money moves."""

    #: The connection is closed at once, without an answer; nothing was done.
    REFUSE = "refuse"
    #: 409: a call with this idempotency key is said to be running; nothing was done.
    IN_PROGRESS = "in_progress"
    #: 429; nothing was done.
    RATE_LIMITED = "rate_limited"
    #: 302 to somewhere else; nothing was done.
    REDIRECT = "redirect"
    #: 500; nothing was done.
    ERROR_BEFORE_COMMIT = "error_before_commit"
    #: Silence for `seconds`, or until all faults are cleared; then it is done and answered, whether
    #: or not a client still listens.
    HANG = "hang"
    #: Done, and the connection is closed without an answer.
    COMMIT_THEN_DROP = "commit_then_drop"
    #: Done, and answered with 500; the idempotency key does not keep that answer.
    ERROR_AFTER_COMMIT = "error_after_commit"
    #: Done, and answered with an HTML page under status 200.
    GARBAGE = "garbage"
    #: Carried out, with an answer of megabytes.
    OVERSIZED = "oversized"
    #: Done, and the answer comes in crumbs over `seconds`.
    SLOW_DRIP = "slow_drip"
    #: Carried out, with another order, payment, amount or currency in the answer.
    OTHER_ORDER = "other_order"
    OTHER_KEY = "other_key"
    OTHER_AMOUNT = "other_amount"
    OTHER_CURRENCY = "other_currency"
    #: Done and answered well; its webhooks come twenty times, old ones among them.
    WEBHOOK_STORM = "webhook_storm"


#: Faults that keep the call from being done at all.
BEFORE = frozenset(
    {
        Fault.REFUSE,
        Fault.IN_PROGRESS,
        Fault.RATE_LIMITED,
        Fault.REDIRECT,
        Fault.ERROR_BEFORE_COMMIT,
    }
)
#: Faults of the answer to a call that was done.
AFTER = frozenset(Fault) - BEFORE - {Fault.HANG, Fault.WEBHOOK_STORM}


class FaultRequest(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """One rule: a fault, and the calls it hits."""

    fault: Fault
    operations: tuple[Operation, ...] = ("confirm",)
    #: Only calls for this order, or this payment; all calls where neither is given.
    order_id: str | None = None
    payment_key: str | None = None
    #: Share of the matching calls that are hit, drawn with `seed`.
    rate: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int = 0
    #: Number of hits until the rule is used up; unlimited if absent.
    times: Annotated[int, Meta(ge=1)] | None = None
    #: Of `hang` and `slow_drip`. The default outlasts a client that waits for a minute.
    seconds: Annotated[float, Meta(gt=0, le=600)] = 75.0


class Rule:
    """An active rule."""

    def __init__(self, number: int, request: FaultRequest) -> None:
        self.number = number
        self.request = request
        self.applied = 0
        self._random = random.Random(request.seed)  # noqa: S311 - the choice of failing calls is not secret

    def meets(self, operation: Operation, payment_key: str | None, order_id: str | None) -> bool:
        """Whether this call is hit; counts it if so."""
        rule = self.request
        if (
            operation not in rule.operations
            or (rule.times is not None and self.applied >= rule.times)
            or (rule.order_id is not None and rule.order_id != order_id)
            or (rule.payment_key is not None and rule.payment_key != payment_key)
            or (rule.rate < 1 and self._random.random() >= rule.rate)
        ):
            return False
        self.applied += 1
        return True

    def view(self) -> dict[str, object]:
        members: dict[str, object] = msgspec.to_builtins(self.request)
        return {"id": self.number, **members, "applied": self.applied}


class Faults:
    """All rules, in the order they were set. They are forgotten when the sandbox ends."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._numbers = 0
        #: Counts of the cleared rules.
        self._applied: dict[str, int] = {}
        self._cleared = asyncio.Event()

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules)

    def add(self, request: FaultRequest) -> Rule | None:
        """A new rule behind the others; None if there are too many."""
        if len(self._rules) >= RULES_MAX:
            return None
        self._numbers += 1
        rule = Rule(self._numbers, request)
        self._rules.append(rule)
        return rule

    def clear(self) -> None:
        self._applied = self.applied()
        self._rules.clear()
        self._cleared.set()
        self._cleared = asyncio.Event()

    async def hang(self, seconds: float) -> None:
        """Wait so long, or until all faults are cleared."""
        try:
            async with asyncio.timeout(seconds):
                await self._cleared.wait()
        except TimeoutError:
            return

    def applied(self) -> dict[str, int]:
        """How often each fault was applied since the sandbox began."""
        counts = dict(self._applied)
        for rule in self._rules:
            if rule.applied:
                name = rule.request.fault.value
                counts[name] = counts.get(name, 0) + rule.applied
        return counts

    def pick(
        self, operation: Operation, payment_key: str | None, order_id: str | None
    ) -> FaultRequest | None:
        """The fault of this call, if any."""
        for rule in self._rules:
            if rule.meets(operation, payment_key, order_id):
                return rule.request
        return None
