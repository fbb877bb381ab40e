"""What was measured, and what could not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.cases import CASES, STEPS, SYSTEMS, Size
from benchmarks.statistics import median

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
    """Of each point the values of each round; settings and versions by system; what the measures beside the cases said,
    by their names."""

    size: Size = "full"
    values: dict[Point, list[list[float]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    without: set[Point] = field(default_factory=set)
    """What a system does not have."""
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, case: str, system: str, variant: str = "") -> list[list[float]]:
        """The values of each round. The floor has one value for all cases that count steps by the second."""
        alike = STEPS if system == "floor" and case in STEPS and not variant else (case,)
        return [
            values
            for point, rounds in self.values.items()
            if point.system == system and point.variant == variant and point.case in alike
            for values in rounds
        ]

    def value(self, case: str, system: str, variant: str = "") -> float | None:
        """The median over the rounds, each summed up as its case says. None if there is no value."""
        summary = CASES[case].summary
        rounds = [summary(values) for values in self.of(case, system, variant) if values]
        return median(rounds) if rounds else None

    def samples(self, case: str, system: str) -> list[float]:
        """All values of all rounds."""
        return [value for values in self.of(case, system) for value in values]

    def medians(self) -> dict[str, dict[str, float | None]]:
        """Of all cases and systems; None where a system has no such case, or it was not measured."""
        return {case: {system: _rounded(self.value(case, system)) for system in SYSTEMS} for case in CASES}

    def gave_nothing(self, point: Point) -> bool:
        """Whether a measurement went well and came to nothing, as a takeover that nobody made."""
        rounds: Sequence[list[float]] = self.values.get(point, ())
        return bool(rounds) and not any(rounds)

    def hopeless(self, point: Point) -> bool:
        """Whether there is no use in measuring a point once more."""
        return self.unusable(point.system) or point in self.without or self.gave_nothing(point)

    def unusable(self, system: str) -> bool:
        """Whether a system can't be measured here."""
        return any(failure.system == system and failure.point is None for failure in self.failures)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
