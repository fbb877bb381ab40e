"""The figures of the measurements."""

from __future__ import annotations

import pytest
from benchmarks.figures import amount, table, times
from benchmarks.statistics import median, p99, quantile, ratio


@pytest.mark.parametrize(("values", "middle"), [([3], 3), ([5, 1, 3], 3), ([4, 1, 3, 2], 2.5)])
def test_the_median_does_not_depend_on_the_order(values: list[float], middle: float) -> None:
    assert median(values) == middle


def test_a_quantile_lies_between_its_neighbours_in_proportion() -> None:
    assert quantile([0, 10], 0.25) == 2.5
    assert p99(list(range(101))) == 99
    assert p99([7]) == 7


def test_of_nothing_there_is_no_quantile() -> None:
    with pytest.raises(ValueError, match="no values"):
        median([])


@pytest.mark.parametrize(("value", "to", "expected"), [(6, 3, 2), (None, 3, None), (3, None, None), (3, 0, None)])
def test_a_ratio_needs_both_values(value: float | None, to: float | None, expected: float | None) -> None:
    assert ratio(value, to) == expected


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0, "0.00")]
)
def test_amounts_have_three_digits(value: float, shown: str) -> None:
    assert amount(value) == shown


def test_a_ratio_that_is_not_known_is_shown_as_such() -> None:
    assert times(None) == "-"
    assert times(2) == "2.00 x"


def test_the_columns_with_numbers_stand_on_the_right() -> None:
    assert table(["case", "n"], [["a", "1"]], left=1) == "| case | n |\n| --- | ---: |\n| a | 1 |"
