"""Certificate: the proof that a sale of several partitions is short of the units of a request.

Each script sees one partition, so two rounds of readings decide. Each partition is read once in a
round, and the second round begins after the first has ended. The sale is short of a SKU at some
instant between the two if in both rounds the partitions together have too few units available and
none in transit, no hold is overdue, and no partition was rebuilt or refilled in between.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

__all__ = ["PARTITIONS_MAX", "Certificate", "Doubt", "Lot", "Reading", "judge", "sku_short"]

#: The partition is one of the 64 characters of an order id.
PARTITIONS_MAX: Final = 64


class Lot(msgspec.Struct, frozen=True):
    """All transfers of one direction, peer and SKU: the last number, and the sum of their units."""

    number: int
    units: int


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One partition at one instant."""

    partition: int
    epoch: str
    #: How many changes added to `available`, or lifted the deadline of an overdue hold.
    refills: int
    #: Holds whose deadline has passed.
    due: tuple[str, ...] = ()
    #: Units by SKU.
    available: Mapping[str, int]
    #: By peer and SKU.
    lent: Mapping[tuple[int, str], Lot] = {}
    received: Mapping[tuple[int, str], Lot] = {}


class Certificate(msgspec.Struct, frozen=True):
    """The sale had fewer units of this SKU than a request wants."""

    sku: str
    units: int

    def serves(self, wants: Mapping[str, int]) -> bool:
        """Whether it also refuses a request of these units by SKU, which began before it did."""
        return wants.get(self.sku, 0) >= self.units


class Doubt(StrEnum):
    """The reason why two rounds prove nothing."""

    #: Overdue holds must end first.
    DUE = "due"
    #: A partition was rebuilt or refilled between its readings.
    CHANGED = "changed"
    #: No wanted SKU was short at both rounds: units are available or in transit.
    NOT_SHORT = "not_short"


def judge(
    first: Sequence[Reading], second: Sequence[Reading], wants: Mapping[str, int]
) -> Certificate | Doubt:
    """Judge two rounds of readings for a request.

    Args:
        first: one reading of each partition of the sale, by partition.
        second: the same again; each of them was made after all of the first round.
        wants: units by SKU, each at least 1.

    Raises:
        ValueError: the rounds are not of the same partitions, or a reading lacks a wanted SKU.
    """
    _require_rounds(first, second, wants)
    if any(reading.due for reading in (*first, *second)):
        return Doubt.DUE
    if any(_has_changed(*pair) for pair in zip(first, second, strict=True)):
        return Doubt.CHANGED
    for sku, units in wants.items():
        if sku_short(first, sku, units) and sku_short(second, sku, units):
            return Certificate(sku, units)
    return Doubt.NOT_SHORT


def sku_short(readings: Sequence[Reading], sku: str, units: int) -> bool:
    """Whether a round found fewer units of a SKU available, and none in transit."""
    available = sum(reading.available[sku] for reading in readings)
    return available < units and not _is_in_transit(readings, sku)


def _is_in_transit(readings: Sequence[Reading], sku: str) -> bool:
    """Whether any donor has lent another number of units than their receiver has received.

    The sums alone would not do: a partition that lost its record of a lend would hide the units of
    another one in transit.
    """
    lent = _units_by_way(
        ((reading.partition, peer, of), lot)
        for reading in readings
        for (peer, of), lot in reading.lent.items()
    )
    received = _units_by_way(
        ((peer, reading.partition, of), lot)
        for reading in readings
        for (peer, of), lot in reading.received.items()
    )
    ways = {way for way in lent | received if way[2] == sku}
    return any(lent.get(way, 0) != received.get(way, 0) for way in ways)


def _units_by_way(
    lots: Iterable[tuple[tuple[int, int, str], Lot]],
) -> dict[tuple[int, int, str], int]:
    """Units by donor, receiver and SKU."""
    return {way: lot.units for way, lot in lots}


def _has_changed(first: Reading, second: Reading) -> bool:
    return (first.epoch, first.refills) != (second.epoch, second.refills)


def _require_rounds(
    first: Sequence[Reading], second: Sequence[Reading], wants: Mapping[str, int]
) -> None:
    places = [reading.partition for reading in first]
    if places != list(range(len(places))) or places != [reading.partition for reading in second]:
        raise ValueError("a round has one reading of each partition, in their order")
    if not places or not wants or min(wants.values()) < 1:
        raise ValueError("a certificate needs partitions and wanted units")
    if any(sku not in reading.available for reading in (*first, *second) for sku in wants):
        raise ValueError("a reading lacks a wanted SKU")
