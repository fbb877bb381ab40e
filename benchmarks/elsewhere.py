"""What others were measured to do elsewhere: a peer that comes out slower here must be explained.

The machine elsewhere had two cores and PostgreSQL 15; how fast its disk and processor were says its floor. Values are
compared after they were scaled by the floors; how often an idle worker commits does not depend on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.cases import CASES
from benchmarks.figures import amount, table
from benchmarks.results import Results

FLOOR: Final = (7_600.0, 9_300.0)
"""Transactions a second."""
TOLERANCE: Final = 0.8
ABOUT: Final = (
    "Relative: 1 is as good as the worst value that was measured there, less is worse, after the floors of both "
    "machines were made equal."
)

MEASURED: Final[dict[tuple[str, str], tuple[float, float]]] = {
    ("dbos", "one_step"): (172, 222),
    ("dbos", "ten_step"): (275, 325),
    ("dbos", "latency_1"): (3.8, 3.8),
    ("dbos", "latency_10"): (23, 30),
    ("dbos", "signal"): (6.5, 7.1),
    ("dbos", "idle"): (16, 16),
    ("absurd", "one_step"): (433, 730),
    ("absurd", "ten_step"): (934, 1_749),
    ("absurd", "latency_1"): (10, 10),
    ("absurd", "latency_10"): (19, 19),
    ("absurd", "signal"): (7.2, 7.2),
    ("absurd", "idle"): (4, 4),
    ("procrastinate", "one_step"): (461, 773),
    ("procrastinate", "latency_1"): (4.7, 4.7),
    ("procrastinate", "idle"): (0.9, 0.9),
}
"""By system and case, the lowest and the highest. absurd's latencies with short polling intervals, as here."""

EXPLAINED: Final[dict[tuple[str, str], str]] = {
    ("dbos", "latency_1"): "without the rest between two runs, as there, 3.9 to 4.4 ms here",
}
"""Why a peer is slower here, by system and case."""


@dataclass(frozen=True)
class Comparison:
    """A value of here beside the worst of elsewhere. `relative`: 1 is as good, after scaling; less is worse."""

    system: str
    case: str
    here: float
    relative: float

    @property
    def behind(self) -> bool:
        return self.relative < TOLERANCE

    @property
    def remark(self) -> str:
        if not self.behind:
            return ""
        return EXPLAINED.get((self.system, self.case), "**more than 20 % behind, not explained**")


def comparisons(results: Results) -> list[Comparison]:
    """Of all that was measured here and there. Empty if the floor was not measured here."""
    floor = results.value("one_step", "floor")
    if floor is None:
        return []
    found = []
    for (system, case), (low, high) in MEASURED.items():
        here = results.value(case, system)
        if here is not None:
            worst = low if CASES[case].higher else high
            found.append(Comparison(system, case, here, relative(case, here, worst, floor)))
    return found


def relative(case: str, here: float, there: float, floor: float) -> float:
    """How good `here` is, as a multiple of `there`, if this machine were as fast as that one."""
    speed = 1.0 if case == "idle" else floor / (sum(FLOOR) / 2)
    return here / (there * speed) if CASES[case].higher else there / speed / max(here, 1e-9)


def markdown(results: Results) -> str:
    rows = []
    for one in comparisons(results):
        low, high = MEASURED[one.system, one.case]
        there = amount(low) if low == high else f"{amount(low)}-{amount(high)}"
        unit = CASES[one.case].unit
        rows.append([one.system, one.case, unit, amount(one.here), there, f"{one.relative:.2f}", one.remark])
    head = ["system", "case", "unit", "here", "elsewhere", "relative", "remark"]
    return table(head, rows, left=2)
