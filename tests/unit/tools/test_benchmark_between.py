"""The confidence interval of the benchmark between two commits."""

import pytest

from benchmarks.parts.between import interval_of_median


def test_the_interval_of_fifteen_values_is_the_fourth_to_the_twelfth() -> None:
    assert interval_of_median([float(value) for value in range(15, 0, -1)]) == (4.0, 12.0)


def test_the_interval_of_25_values_is_the_8th_to_the_18th() -> None:
    assert interval_of_median([float(value) for value in range(1, 26)]) == (8.0, 18.0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_interval_of_too_few_values_is_their_range(count: int) -> None:
    assert interval_of_median([float(value) for value in range(count)]) == (0.0, count - 1.0)
