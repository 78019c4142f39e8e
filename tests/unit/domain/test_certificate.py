"""The certificate of a sale of several partitions: each reason against it, and its readers."""

import msgspec
import pytest

from reservation.domain.certificate import Certificate, Doubt, Lot, Reading, judge

WANTS = {"a": 2}


def reading(partition: int, *, a: int = 0, b: int = 0, **changes: object) -> Reading:
    plain = Reading(partition=partition, epoch="e", refills=0, available={"a": a, "b": b})
    return msgspec.structs.replace(plain, **changes)


SHORT = (reading(0, a=1, b=9), reading(1, b=9))


def test_a_sale_short_at_both_rounds_is_certified() -> None:
    assert judge(SHORT, SHORT, WANTS) == Certificate("a", 2)


def test_a_sale_with_enough_units_at_one_round_is_not() -> None:
    """A sale of units in the meantime may have left too few; before, there were enough."""
    enough = (reading(0, a=1, b=9), reading(1, a=1, b=9))
    for rounds in ((enough, SHORT), (SHORT, enough)):
        assert judge(*rounds, WANTS) is Doubt.NOT_SHORT


def test_one_sku_must_be_short_at_both_rounds() -> None:
    other = (reading(0, a=9, b=1), reading(1))
    assert judge(SHORT, other, {"a": 2, "b": 2}) is Doubt.NOT_SHORT


def test_units_in_transit_prevent_it() -> None:
    lent = (SHORT[0], reading(1, b=9, lent={(0, "a"): Lot(1, 1)}))
    assert judge(lent, lent, WANTS) is Doubt.NOT_SHORT
    assert judge(SHORT, lent, WANTS) is Doubt.NOT_SHORT


def test_a_transfer_that_arrived_or_that_is_of_another_item_does_not() -> None:
    arrived = (
        reading(0, a=1, received={(1, "a"): Lot(2, 3)}),
        reading(1, lent={(0, "a"): Lot(2, 3), (0, "b"): Lot(1, 1)}),
    )
    assert judge(arrived, arrived, WANTS) == Certificate("a", 2)


def test_a_unit_received_before_its_lend_was_read_prevents_it() -> None:
    ahead = (reading(0, a=1, received={(1, "a"): Lot(1, 1)}), reading(1))
    assert judge(ahead, ahead, WANTS) is Doubt.NOT_SHORT


def test_a_forgotten_lend_does_not_hide_units_in_transit() -> None:
    """Partition 0 has lost its record of two units for 1, and two others are on their way to it."""
    rounds = (
        reading(0),
        reading(1, received={(0, "a"): Lot(1, 2)}),
        reading(2, lent={(0, "a"): Lot(1, 2)}),
    )
    assert judge(rounds, rounds, WANTS) is Doubt.NOT_SHORT


@pytest.mark.parametrize("changes", [{"refills": 1}, {"epoch": "f"}])
def test_a_refill_or_a_rebuild_between_the_rounds_prevents_it(changes: dict[str, object]) -> None:
    after = (SHORT[0], msgspec.structs.replace(SHORT[1], **changes))
    assert judge(SHORT, after, WANTS) is Doubt.CHANGED


def test_an_overdue_hold_at_either_round_prevents_it() -> None:
    due = (SHORT[0], msgspec.structs.replace(SHORT[1], due=("order",)))
    for rounds in ((due, SHORT), (SHORT, due)):
        assert judge(*rounds, WANTS) is Doubt.DUE


def test_a_certificate_serves_requests_of_as_much_or_more() -> None:
    certificate = Certificate("a", 2)
    assert certificate.serves({"a": 2, "b": 1})
    assert certificate.serves({"a": 3})
    assert not certificate.serves({"a": 1})
    assert not certificate.serves({"b": 5})


@pytest.mark.parametrize(
    ("first", "second", "wants"),
    [
        (SHORT, SHORT[:1], WANTS),
        (SHORT, SHORT[::-1], WANTS),
        (SHORT[1:], SHORT[1:], WANTS),
        ((), (), WANTS),
        (SHORT, SHORT, {}),
        (SHORT, SHORT, {"a": 0}),
        (SHORT, SHORT, {"z": 1}),
    ],
)
def test_rounds_that_are_not_whole_are_an_error(
    first: tuple[Reading, ...], second: tuple[Reading, ...], wants: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=r"certificate|round|reading"):
        judge(first, second, wants)
