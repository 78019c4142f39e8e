"""Fault: a name, a weight, and an action."""

import random
from collections.abc import Awaitable, Callable

import msgspec

from tests.faults.chaos.environment import Stage

__all__ = ["Fault"]


class Fault(msgspec.Struct, frozen=True):
    """One kind of harm.

    Attributes:
        kind: its name in the report.
        weight: how often it is drawn, relative to the others of its group.
        do: injects it, leaves every part running again, and returns a few words about it;
            empty if nothing could be done.
    """

    kind: str
    weight: int
    do: Callable[[Stage, random.Random], Awaitable[str]]
