"""The results in Markdown: what was measured, how the systems compare, what failed, and what it was measured on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import elsewhere, growth, memory, profile, replay, targets
from benchmarks.cases import CASES, LATENCIES, SYSTEMS
from benchmarks.figures import amount, table, times
from benchmarks.results import Failure, Point, Results
from benchmarks.statistics import p99

OURS = "durable"
RATIOS = (
    "How many times as good as each other system durable is: the median of what that was in each round. The machine is "
    "not as fast in one round as in another."
)
BESIDE = {"memory": memory.markdown, "profile": profile.markdown, "replay": replay.markdown}


@dataclass(frozen=True)
class Asked:
    """What was to be measured, and on what. `rounds`: of how many values a median is."""

    cases: Sequence[str]
    systems: Sequence[str]
    growth: Sequence[str]
    beside: Sequence[str]
    rounds: int
    machine: str
    server: str


def parts(results: Results, asked: Asked) -> dict[str, str]:
    """The pages, by their names."""
    pages: dict[str, str] = {}
    if asked.cases:
        failed = [f for f in results.failures if f.system in (*asked.systems, "charts") and not _of_growth(f)]
        pages["results"] = _page(results, asked, "Results", _results(results, asked), failed)
    if asked.growth:
        sections = [growth.markdown(results, asked.growth), f"### Targets\n\n{targets.markdown(results, 'growth')}"]
        failed = [f for f in results.failures if f.system not in BESIDE and (f.point is None or _of_growth(f))]
        pages["growth"] = _page(results, asked, "Growth", sections, failed)
    for name in asked.beside:
        pages[name] = _beside(results, asked, name)
    return pages


def _of_growth(failure: Failure) -> bool:
    return failure.point is not None and bool(failure.point.variant)


def _beside(results: Results, asked: Asked, name: str) -> str:
    sections = [BESIDE[name](results.beside[name])] if name in results.beside else []
    if any(target.part == name for target in targets.TARGETS):
        sections.append(targets.markdown(results, name))
    failed = [failure for failure in results.failures if failure.system == name]
    return _page(results, asked, name.capitalize(), sections, failed, medians=False)


def _results(results: Results, asked: Asked) -> list[str]:
    return [
        values(results, asked),
        f"### Ratios\n\n{RATIOS}\n\n{ratios(results, asked)}",
        f"### Targets\n\n{targets.markdown(results, 'cases')}",
        f"### Beside what was measured elsewhere\n\n{elsewhere.ABOUT}\n\n{elsewhere.markdown(results)}",
        _settings(results, asked),
    ]


def _page(
    results: Results,
    asked: Asked,
    title: str,
    sections: Iterable[str],
    failed: Iterable[Failure],
    *,
    medians: bool = True,
) -> str:
    rounds = f"Medians of {asked.rounds} round{'s' if asked.rounds != 1 else ''}. " if medians else ""
    size = " A quick measurement: it shows that all works, not how fast." if results.size == "quick" else ""
    on = f"{asked.machine}; PostgreSQL {asked.server}, fsync and synchronous_commit on."
    return "\n\n".join([f"## {title}", rounds + on + size, *sections, *_failures(failed)]) + "\n"


def values(results: Results, asked: Asked) -> str:
    """The medians. Beside that of latencies their p99, beside that of takeovers the worst."""
    rows = []
    for case in asked.cases:
        cells = [_cell(results, case, system) for system in asked.systems]
        rows.append([case, f"{CASES[case].title} ({CASES[case].unit})", *cells])
    return table(["case", "what", *asked.systems], rows)


def _cell(results: Results, case: str, system: str) -> str:
    value = results.value(case, system)
    if value is None:
        return _nothing(results, Point(case, system))
    samples = results.samples(case, system)
    more = ""
    if case in LATENCIES:
        more = f" (p99 {amount(p99(samples))})"
    elif case == "takeover":
        more = f" (worst of {len(samples)}: {amount(max(samples))})"
    failed = any(failure.point == Point(case, system) for failure in results.failures)
    return amount(value) + more + (" (some failed)" if failed else "")


def _nothing(results: Results, point: Point) -> str:
    if results.gave_nothing(point):
        return CASES[point.case].nothing(results.size)
    failed = any(failure.system == point.system and failure.point in (None, point) for failure in results.failures)
    return "failed" if failed else "-"


def ratios(results: Results, asked: Asked) -> str:
    """durable to all others: more than 1 is better than they are, whatever the unit."""
    others = [system for system in asked.systems if system != OURS]
    rows = [[case, *(times(_better(results, case, system)) for system in others)] for case in asked.cases]
    return table(["case", *others], rows, left=1)


def _better(results: Results, case: str, system: str) -> float | None:
    ours, theirs = (case, OURS), (case, system)
    return results.ratio(ours, theirs) if CASES[case].higher else results.ratio(theirs, ours)


def _settings(results: Results, asked: Asked) -> str:
    lines = [f"- {system}: {results.settings[system]}" for system in asked.systems if system in results.settings]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))
    return "### Set up as\n\n" + "\n".join(lines) + f"\n\nVersions: {versions}"


def _failures(failures: Iterable[Failure]) -> list[str]:
    """A section with each reason once, and what failed for it; none if nothing failed."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for failure in failures:
        found[failure.system, failure.reason].append("everything" if failure.point is None else str(failure.point))
    lines = [
        f"- {system}: {reason} ({', '.join(_counted(failed))})" for (system, reason), failed in sorted(found.items())
    ]
    return ["### Failed\n\n" + "\n".join(lines)] if lines else []


def _counted(failed: Sequence[str]) -> list[str]:
    """Each once, with how often it failed."""
    return [f"{one}, {failed.count(one)} times" if failed.count(one) > 1 else one for one in dict.fromkeys(failed)]


def chosen_systems(given: Sequence[str] | None) -> tuple[str, ...]:
    """In their usual order."""
    return SYSTEMS if given is None else tuple(system for system in SYSTEMS if system in given)
