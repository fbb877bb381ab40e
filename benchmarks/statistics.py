"""The few figures that the tables are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle. Raises ValueError if there is none."""
    return quantile(values, 0.5)


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds. Of a hundred values or fewer it lies near the greatest."""
    return quantile(values, 0.99)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated. Raises ValueError if there is none."""
    if not values:
        raise ValueError("there are no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratio(value: float | None, to: float | None) -> float | None:
    """`value` as a multiple of `to`. None if one of them was not measured, or there is nothing to divide by."""
    if value is None or to is None or to == 0:
        return None
    return value / to
