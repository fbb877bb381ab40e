"""What durable is to reach, as ratios of values of the same run where the machine would matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks import growth
from benchmarks.figures import amount, table
from benchmarks.results import Kept, Results
from benchmarks.statistics import median, p99, ratio

Found = Callable[[Results], float | None]


@dataclass(frozen=True)
class Target:
    """`part`: of what measurement it is. `found`: what was reached; None if that was not measured."""

    part: str
    what: str
    limit: float
    at_least: bool
    found: Found
    strict: bool = False

    @property
    def sign(self) -> str:
        return (">" if self.at_least else "<") + ("" if self.strict else "=")

    def reached(self, value: float) -> bool:
        if value == self.limit:
            return not self.strict
        return value > self.limit if self.at_least else value < self.limit


def beside(case: str, other: str, system: str = "durable", to: str | None = None) -> Found:
    """The value of a case, as a multiple of another system's, or of the case `to`."""
    return lambda results: results.ratio((case, system), (to or case, other))


def alone(case: str) -> Found:
    return lambda results: results.value(case, "durable")


def p99_beside(case: str, other: str) -> Found:
    """The 99th percentile of all rounds together, as a multiple of another system's."""
    return lambda results: ratio(_p99(results, case, "durable"), _p99(results, case, other))


def _two_processes(results: Results) -> float | None:
    two = growth.LINES["growth_processes"].variant(2)
    return results.ratio(("ten_step", "durable", two), ("ten_step", "floor", two))


def _p99(results: Results, case: str, system: str) -> float | None:
    values = results.samples(case, system)
    return p99(values) if values else None


def _timer_p99(results: Results) -> float | None:
    return _p99(results, "timer", "durable")


def _slowdown(case: str, kept: Kept) -> Found:
    return lambda results: growth.slowdown(results, case, kept)


def _worst_takeover(results: Results) -> float | None:
    return max(results.samples("takeover", "durable"), default=None)


def _replay(results: Results) -> float | None:
    return median(results.beside["replay"]["replay_ms"]) if "replay" in results.beside else None


def _memory(results: Results) -> float | None:
    if "memory" not in results.beside:
        return None
    before, after = results.beside["memory"]["mib"]
    return ratio(after, before)


CASES: Final = "cases"

TARGETS: Final = (
    Target(CASES, "ten_step / dbos", 10, True, beside("ten_step", "dbos")),
    Target(CASES, "ten_step / absurd", 2, True, beside("ten_step", "absurd")),
    Target(CASES, "ten_step / floor", 0.45, True, beside("ten_step", "floor")),
    Target(CASES, "fifty_step / floor", 0.55, True, beside("fifty_step", "floor")),
    Target(CASES, "one_step / dbos", 6, True, beside("one_step", "dbos")),
    Target(CASES, "one_step / absurd", 1.8, True, beside("one_step", "absurd")),
    Target(CASES, "start / procrastinate", 0.9, True, beside("start", "procrastinate")),
    Target(CASES, "start_many / start", 8, True, beside("start_many", "durable", to="start")),
    Target(CASES, "latency_1 / dbos", 1, False, beside("latency_1", "dbos"), strict=True),
    Target(CASES, "latency_10 / dbos", 0.5, False, beside("latency_10", "dbos"), strict=True),
    Target(CASES, "latency_1 / dbos, p99", 1, False, p99_beside("latency_1", "dbos"), strict=True),
    Target(CASES, "latency_10 / dbos, p99", 0.5, False, p99_beside("latency_10", "dbos"), strict=True),
    Target(CASES, "signal, p50 in ms", 5, False, alone("signal"), strict=True),
    Target(CASES, "timer, p99 of all in ms", 100, False, _timer_p99, strict=True),
    Target(CASES, "ten_step / durable_function", 1.3, False, beside("ten_step", "durable_function")),
    Target(CASES, "idle, commits/s", 2, False, alone("idle")),
    Target(CASES, "takeover, p50 in s", 1, False, alone("takeover"), strict=True),
    Target(CASES, "takeover, worst in s", 2.5, False, _worst_takeover, strict=True),
    Target("growth", "two processes / floor", 0.55, True, _two_processes),
    *(
        Target("growth", f"{case}, as slow on database {kept}", 1.25, False, _slowdown(case, kept))
        for kept, cases in growth.KEPT.values()
        for case in cases
    ),
    Target("replay", "replay of 1,000 steps in ms", 50, False, _replay, strict=True),
    Target("memory", "memory after all runs / after the first ones", 1.1, False, _memory),
)


def markdown(results: Results, part: str) -> str:
    rows = []
    for target in TARGETS:
        if target.part != part:
            continue
        value = target.found(results)
        said = "not measured" if value is None else "reached" if target.reached(value) else "**missed**"
        if value is not None and results.size == "quick":
            said += " (quick)"
        rows.append(
            [target.what, f"{target.sign} {target.limit:g}", "-" if value is None else f"{amount(value)}", said]
        )
    return table(["target", "goal", "found", ""], rows, left=1)
