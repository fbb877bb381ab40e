"""Measure durable beside other systems, on a throw-away PostgreSQL with fsync on:

    uv run --group bench python -m benchmarks            # everything: an hour or two
    uv run --group bench python -m benchmarks --quick    # all cases and systems in two minutes, to see that all works

Prints tables of medians and ratios. What was measured in full is also written to docs/benchmarks; anything else only to
the folder that --write names. Progress goes to standard error. Exits with 1 if a measurement has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import charts, growth, machine, report
from benchmarks.cases import CASES, SYSTEMS
from benchmarks.report import Asked
from benchmarks.results import Failure, Point, Results
from benchmarks.server import on_disk, throw_away
from benchmarks.suite import ROOT, Suite

BESIDE: Final = tuple(report.BESIDE)
ROUNDS: Final = 3


def main() -> int:
    given = _arguments()
    results = Results(given.size)
    data = given.data or on_disk()
    with throw_away(data) as server:
        suite = Suite(server, results, tell)
        asked = Asked(
            cases=given.cases,
            systems=given.systems,
            growth=given.growth,
            rounds=given.rounds,
            beside=given.beside,
            machine=machine.described(data),
            server=server.version,
        )
        suite.measure(points(given.cases, given.systems), given.rounds)
        suite.measure(growth.points(given.growth), given.rounds)
        for name in given.beside:
            suite.measure_beside(name)
    written = _write(results, asked, given.write)
    for page in report.parts(results, asked).values():
        print(page)
    for path in written:
        tell(f"written: {path}")
    if given.json is not None:
        given.json.write_text(json.dumps(results.medians(), indent=2) + "\n", encoding="utf-8")
    return 1 if results.failures else 0


def points(cases: Sequence[str], systems: Sequence[str]) -> list[Point]:
    """Case after case, each system in turn."""
    return [Point(case, system) for case in cases for system in systems]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(results: Results, asked: Asked, folder: Path | None) -> list[Path]:
    """The charts and the pages; returns where. What can't be drawn stands among the failures."""
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        if asked.cases or asked.growth:
            written += charts.write(results, folder)
    except ImportError as error:
        results.failures.append(Failure("charts", str(error)))
    for name, page in report.parts(results, asked).items():
        path = folder / f"{name}.md"
        path.write_text(page, encoding="utf-8")
        written.append(path)
    return written


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*CASES, "growth", *growth.NAMES, *BESIDE)
    parser.add_argument("--quick", action="store_true", help="little of everything, one round")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, with --quick 1")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(known)}")
    parser.add_argument("--systems", metavar="NAME,...", help=f"of {', '.join(SYSTEMS)}; the growth has its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write {case: {system: median}}")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write tables and charts there")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="on which disk the server's data are to lie")
    given = parser.parse_args()
    names = _named(parser, given.only, known)
    given.size = "quick" if given.quick else "full"
    given.rounds = given.rounds if given.rounds is not None else 1 if given.quick else ROUNDS
    if given.rounds < 1:
        parser.error("--rounds: at least one")
    given.systems = report.chosen_systems(_named(parser, given.systems, SYSTEMS))
    given.write = given.write or (None if given.quick or names or len(given.systems) < len(SYSTEMS) else DEFAULT)
    given.cases = [case for case in CASES if names is None or case in names]
    more = () if given.quick and names is None else (*growth.NAMES, *BESIDE)
    wanted = more if names is None else (*names, *(growth.NAMES if "growth" in names else ()))
    given.growth = [name for name in growth.NAMES if name in wanted]
    given.beside = [name for name in BESIDE if name in wanted]
    return given


DEFAULT: Final = ROOT / "docs" / "benchmarks"


def _named(parser: argparse.ArgumentParser, given: str | None, known: Sequence[str]) -> list[str] | None:
    """What a list with commas names; None if it was not given."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no {', '.join(unknown)}: there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
