"""What was measured, and what could not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from benchmarks.cases import CASES, STEPS, SYSTEMS, Size
from benchmarks.statistics import median, ratio

Measured: TypeAlias = "tuple[str, str] | tuple[str, str, str]"
"""A case, a system, and maybe a variant."""
Kept = Literal["empty", "large", "backlog"]
"""What a database holds before a measurement begins: see ``benchmarks/prepare.py``."""


@dataclass(frozen=True)
class Point:
    """One case of one system, measured once in each round.

    `variant` tells it from the case as it is in the table; `arguments` are what ``benchmarks.measure`` is given beside;
    `database`: what that holds at the beginning.
    """

    case: str
    system: str
    variant: str = ""
    arguments: tuple[str, ...] = ()
    database: Kept = "empty"

    def __str__(self) -> str:
        return f"{self.case} of {self.system}{f' ({self.variant})' if self.variant else ''}"


@dataclass(frozen=True)
class Failure:
    """A measurement that gave nothing, and why. `point` None: the system can't be measured here at all."""

    system: str
    reason: str
    point: Point | None = None


@dataclass
class Results:
    """Of each point the values of each round, by its number; settings and versions by system; what the measures beside
    the cases said, by their names."""

    size: Size = "full"
    values: dict[Point, dict[int, list[float]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    without: set[Point] = field(default_factory=set)
    """What a system does not have."""
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)

    def by_round(self, case: str, system: str, variant: str = "") -> dict[int, float]:
        """The rounds that have given a value, each summed up as its case says."""
        return {
            number: CASES[case].summary(values)
            for point, rounds in self.values.items()
            if (point.case, point.system, point.variant) == (case, system, variant)
            for number, values in rounds.items()
            if values
        }

    def value(self, case: str, system: str, variant: str = "") -> float | None:
        """The median over the rounds. None if there is no value. The floor has one value for all cases that count steps
        by the second."""
        alike = STEPS if system == "floor" and case in STEPS and not variant else (case,)
        rounds = [value for one in alike for value in self.by_round(one, system, variant).values()]
        return median(rounds) if rounds else None

    def ratio(self, one: Measured, to: Measured) -> float | None:
        """`one` as a multiple of `to`: the median of what that is in each round, for what is measured in one round has
        the same minutes of the machine. None if there is no round with both."""
        first, second = self.by_round(*one), self.by_round(*to)
        both = (ratio(first[number], second[number]) for number in first.keys() & second.keys())
        rounds = [value for value in both if value is not None]
        return median(rounds) if rounds else None

    def samples(self, case: str, system: str) -> list[float]:
        """All values of all rounds."""
        return [value for values in self.values.get(Point(case, system), {}).values() for value in values]

    def medians(self) -> dict[str, dict[str, float | None]]:
        """Of all cases and systems; None where a system has no such case, or it was not measured."""
        return {case: {system: _rounded(self.value(case, system)) for system in SYSTEMS} for case in CASES}

    def gave_nothing(self, point: Point) -> bool:
        """Whether a measurement went well and came to nothing, as a takeover that nobody made."""
        rounds: Mapping[int, list[float]] = self.values.get(point, {})
        return bool(rounds) and not any(rounds.values())

    def hopeless(self, point: Point) -> bool:
        """Whether there is no use in measuring a point once more."""
        return self.unusable(point.system) or point in self.without or self.gave_nothing(point)

    def unusable(self, system: str) -> bool:
        """Whether a system can't be measured here."""
        return any(failure.system == system and failure.point is None for failure in self.failures)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
