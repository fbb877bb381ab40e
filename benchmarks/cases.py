"""What is measured: the cases, their units, and how much is done for each.

A measurement gives one value or many; `Case.summary` makes one number of them, and the median of that over all rounds
stands in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.load import Load
from benchmarks.statistics import median, p99

Size = Literal["full", "quick"]

SYSTEMS: Final = ("floor", "durable", "durable_function", "dbos", "absurd", "procrastinate")


@dataclass(frozen=True)
class Case:
    """One thing that is measured of each system that has it.

    - `higher`: whether more is better.
    - `full`, `quick`: the load of a measurement of that size, as far as it is not the usual one.
    - `timeout`: seconds after which a measurement is given up.
    - `empty`: what it means that a measurement gave no value at all; may name fields of the load.
    """

    name: str
    unit: str
    title: str
    higher: bool
    full: Mapping[str, int]
    quick: Mapping[str, int]
    timeout: float = 300
    summary: Callable[[Sequence[float]], float] = median
    empty: str = "no value"

    def load(self, dsn: str, size: Size) -> Load:
        given = {"runs": 1, "steps": 1, **(self.full if size == "full" else self.quick)}
        return Load(dsn, **given)

    def nothing(self, size: Size) -> str:
        """What it means that a measurement of that size gave no value at all."""
        return self.empty.format(**vars(self.load("", size)))


CASES: Final = {
    case.name: case
    for case in (
        Case(
            "one_step",
            "steps/s",
            "runs of one step, one worker process",
            higher=True,
            full={"runs": 3_000, "steps": 1},
            quick={"runs": 200, "steps": 1},
        ),
        Case(
            "ten_step",
            "steps/s",
            "runs of ten steps, one worker process",
            higher=True,
            full={"runs": 1_000, "steps": 10},
            quick={"runs": 40, "steps": 10},
        ),
        Case(
            "fifty_step",
            "steps/s",
            "runs of fifty steps, one worker process",
            higher=True,
            full={"runs": 200, "steps": 50},
            quick={"runs": 10, "steps": 50},
        ),
        Case(
            "start",
            "runs/s",
            "runs started, one by one",
            higher=True,
            full={"runs": 1_500},
            quick={"runs": 150},
        ),
        Case(
            "start_many",
            "runs/s",
            "runs started, 1,000 in a call",
            higher=True,
            full={"runs": 10_000},
            quick={"runs": 1_000},
        ),
        Case(
            "latency_1",
            "ms",
            "from start to result, one step, p50",
            higher=False,
            full={"steps": 1, "samples": 300},
            quick={"steps": 1, "samples": 10},
        ),
        Case(
            "latency_10",
            "ms",
            "from start to result, ten steps, p50",
            higher=False,
            full={"steps": 10, "samples": 300},
            quick={"steps": 10, "samples": 10},
        ),
        Case(
            "signal",
            "ms",
            "from a signal to the run's end, p50",
            higher=False,
            full={"samples": 300},
            quick={"samples": 10},
        ),
        Case(
            "timer",
            "ms",
            "lateness of a sleep's end, p99",
            higher=False,
            full={"samples": 300},
            quick={"samples": 100},
            summary=p99,
        ),
        Case(
            "takeover",
            "s",
            "from kill -9 to the step in another process, p50",
            higher=False,
            full={"samples": 17},
            quick={"samples": 2, "patience": 15},
            timeout=900,
            empty="not within {patience:.0f} s",
        ),
        Case(
            "idle",
            "commits/s",
            "commits of one idle worker",
            higher=False,
            full={"samples": 3},
            quick={"samples": 1},
        ),
    )
}

STEPS: Final = ("one_step", "ten_step", "fifty_step")
"""The cases in which steps are counted by the second: the floor has one value for all three."""
LATENCIES: Final = ("latency_1", "latency_10", "signal")
PATIENT: Final = ("takeover", "idle")
"""The cases that wait more than they work: they are measured side by side."""
