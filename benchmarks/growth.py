"""Does durable stay as fast when there is more of something? What is measured for that, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.cases import CASES, Size
from benchmarks.cases import STEPS as STEPS_A_SECOND
from benchmarks.figures import amount, table, times
from benchmarks.prepare import FINISHED, PARKED, WAITING
from benchmarks.results import Kept, Point, Results

OURS: Final = ("durable", "durable_function")
STEPS: Final = (1, 2, 5, 10, 20, 50)
IN_FLIGHT: Final = (1, 8, 32, 128)
PROCESSES: Final = (1, 2)
BACKLOG_CASES: Final = (*STEPS_A_SECOND, "start", "start_many")
"""What is worked off or started before those that wait; a latency would be that of a worker that is never idle."""


@dataclass(frozen=True)
class Line:
    """Steps a second by some setting: the case of ten steps, with another `option` of ``benchmarks.measure``."""

    name: str
    title: str
    option: str
    settings: tuple[int, ...]
    systems: tuple[str, ...]

    def variant(self, setting: int) -> str:
        return f"{self.name} {setting}"

    def points(self) -> list[Point]:
        return [
            Point("ten_step", system, self.variant(setting), (self.option, str(setting)))
            for setting in self.settings
            for system in self.systems
        ]

    def values(self, results: Results, system: str) -> list[float | None]:
        return [results.value("ten_step", system, self.variant(setting)) for setting in self.settings]

    def markdown(self, results: Results) -> str:
        rows = []
        for system in self.systems:
            values = self.values(results, system)
            rows.append([system, *("-" if value is None else amount(value) for value in values)])
        return f"### Steps a second, by {self.title}\n\n" + table(["system", *map(str, self.settings)], rows, left=1)


LINES: Final = {
    "growth_steps": Line("steps", "steps in a run", "--steps", STEPS, (*OURS, "floor")),
    "growth_in_flight": Line("in flight", "runs in flight", "--in-flight", IN_FLIGHT, (*OURS, "floor")),
    "growth_processes": Line("processes", "worker processes", "--processes", PROCESSES, (*OURS, "dbos", "floor")),
}
KEPT: Final[dict[str, tuple[Kept, tuple[str, ...]]]] = {
    "growth_table": ("large", tuple(CASES)),
    "growth_backlog": ("backlog", BACKLOG_CASES),
}
NAMES: Final = (*LINES, *KEPT)
EMPTY: Final[Kept] = "empty"


def points(names: Sequence[str]) -> list[Point]:
    """What is measured for these; none twice."""
    wanted: list[Point] = []
    for name in names:
        if name in LINES:
            wanted += LINES[name].points()
            continue
        kept, cases = KEPT[name]
        wanted += [
            Point(case, "durable", f"database {database}", database=database)
            for case in cases
            for database in (EMPTY, kept)
        ]
    return list(dict.fromkeys(wanted))


def slowdown(results: Results, case: str, kept: Kept) -> float | None:
    """How many times as slow, or as busy, durable is on such a database as on an empty one."""
    empty, full = (case, "durable", "database empty"), (case, "durable", f"database {kept}")
    return results.ratio(empty, full) if CASES[case].higher else results.ratio(full, empty)


def markdown(results: Results, names: Sequence[str]) -> str:
    parts = [LINES[name].markdown(results) for name in names if name in LINES]
    parts += [_kept(results, *KEPT[name]) for name in names if name in KEPT]
    return "\n\n".join(parts)


def beside(kept: Kept, size: Size) -> str:
    """What such a database holds, in words."""
    if kept == "large":
        return f"{FINISHED[size]:,} ended and {PARKED[size]:,} parked runs"
    return f"{WAITING[size]:,} waiting runs of lower priority"


def _kept(results: Results, kept: Kept, cases: Sequence[str]) -> str:
    def shown(case: str, database: str) -> str:
        value = results.value(case, "durable", f"database {database}")
        return "-" if value is None else amount(value)

    rows = [
        [case, CASES[case].unit, shown(case, "empty"), shown(case, kept), times(slowdown(results, case, kept))]
        for case in cases
    ]
    head = ["case", "unit", "empty", "full", "as slow"]
    return f"### Beside {beside(kept, results.size)}\n\n" + table(head, rows)
