"""Matrix of payments: the fault, the death, and the process that finishes each of them."""

import itertools
import random
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from reservation.failpoints import POINTS
from reservation.sandbox.faults import Fault

__all__ = [
    "CELLS",
    "FAULTS",
    "MOMENTS",
    "Cell",
    "Entry",
    "Kind",
    "Plan",
    "again",
    "matrix",
    "strangers",
]

NONE: Final = "none"

#: Every fault of the sandbox, so that a new one is covered too.
FAULTS: Final = (NONE, *(fault.value for fault in Fault))

#: All fail points around the confirm: operators' requests and refunds come long after it.
MOMENTS: Final = (
    NONE,
    *(
        point
        for point in POINTS
        if not point.startswith(("cancel:", "request:", "refund:", "rebuild:"))
    ),
)


class Entry(StrEnum):
    """How the second process continues a payment after the first."""

    #: The same success URL at the same moment, as from a second tab; then the settler.
    SUCCESS = "success"
    #: The buyer does not come back: the settler alone.
    SETTLER = "settler"
    #: The PG's webhooks and their repeats alone: no settler reads it.
    WEBHOOK = "webhook"
    #: The buyer loads the success URL again and again, and the settler works.
    REFRESH = "refresh"


class Kind(StrEnum):
    """The kind of payment that the buyer brings from the PG."""

    CARD = "card"
    #: Confirmed only after the hold ran out.
    LATE = "late"
    #: Approved by the PG without our call when the hold has run out and no buyer came.
    BEHIND = "behind"
    DECLINED = "declined"
    #: In a sale that takes no virtual accounts.
    ACCOUNT = "account"
    #: A payment key that the PG does not have.
    FORGED = "forged"


class Cell(msgspec.Struct, frozen=True, order=True):
    """One cell of the matrix."""

    fault: str
    moment: str
    entry: Entry

    @property
    def calls(self) -> bool:
        """Whether the PG is called at all: not without a claim or a return."""
        alone = self.entry in (Entry.SETTLER, Entry.WEBHOOK)
        return not (self.moment == "confirm:before_claim" and alone)


class Plan(msgspec.Struct, frozen=True):
    """One payment."""

    cell: Cell
    kind: Kind = Kind.CARD
    #: Until the PG's outage ends every call for this order fails; else its first confirm.
    outage: bool = False
    #: The first process's death that takes its settler to the moment.
    first_death: str = NONE
    quantity: int = 1


CELLS: Final = tuple(
    Cell(fault, moment, entry) for fault, moment, entry in itertools.product(FAULTS, MOMENTS, Entry)
)

#: Kinds of a hundred random payments.
_WEIGHTS: Final = {
    Kind.CARD: 80,
    Kind.LATE: 4,
    Kind.BEHIND: 3,
    Kind.DECLINED: 6,
    Kind.ACCOUNT: 4,
    Kind.FORGED: 3,
}


def matrix(draw: random.Random, times: int) -> Iterator[Plan]:
    """Every cell this many times, in a random order."""
    cells = [cell for cell in CELLS for _ in range(times)]
    draw.shuffle(cells)
    return (_plan(cell, draw) for cell in cells)


def again(cells: Sequence[Cell], draw: random.Random) -> Iterator[Plan]:
    """These cells once more, perhaps with a fault of another kind, or at another first death."""
    return (_plan(cell, draw) for cell in cells)


def strangers(draw: random.Random, count: int, *, deaths: float) -> Iterator[Plan]:
    """Payments of all kinds without a planned fault: the PG's own faults may hit any of them.

    Args:
        draw: the source of randomness.
        count: how many.
        deaths: the share of them whose process dies.
    """
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    for _ in range(count):
        moment = draw.choice(MOMENTS[1:]) if draw.random() < deaths else NONE
        cell = Cell(NONE, moment, draw.choice(list(Entry)))
        yield _plan(cell, draw, kind=draw.choices(kinds, weights)[0])


def _plan(cell: Cell, draw: random.Random, kind: Kind = Kind.CARD) -> Plan:
    return Plan(
        cell=cell,
        kind=kind,
        outage=draw.random() < 0.5 and cell.fault != NONE,
        first_death=_first_death(cell.moment, draw),
        quantity=draw.randint(1, 3),
    )


def _first_death(moment: str, draw: random.Random) -> str:
    """A settler's step comes only to a payment that a confirm has left behind."""
    choices: Sequence[str] = {
        "settle:after_take_over": ("confirm:after_claim", "confirm:after_call"),
        "settle:after_look_up": ("confirm:after_intent", "confirm:after_call"),
        "settle:after_intent": ("confirm:after_claim", "confirm:before_call"),
    }.get(moment, ("",))
    return draw.choice(choices) or NONE
