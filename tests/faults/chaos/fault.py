"""What a fault is: a name, how often it is drawn, and what does it."""

import random
from collections.abc import Awaitable, Callable

import msgspec

from tests.faults.chaos.environment import Stage

__all__ = ["Fault"]


class Fault(msgspec.Struct, frozen=True):
    """One kind of harm.

    Attributes:
        kind: its name in the report.
        weight: how often it is drawn, beside the others of its lane.
        do: does it, leaves every part running again, and tells in a few words what it was; empty
            where nothing could be done.
    """

    kind: str
    weight: int
    do: Callable[[Stage, random.Random], Awaitable[str]]
