"""Measures point after point, round after round: each in a process of its own, on a new database of one server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.cases import CASES, LATENCIES, PATIENT, STEPS, Size
from benchmarks.figures import amount
from benchmarks.results import Failure, Kept, Point, Results
from benchmarks.server import Server

ROOT: Final = Path(__file__).parents[1]
ASKING: Final = 60.0
"""Seconds that a system may take to be imported."""
STARTED: Final = 12.0
"""Seconds until all workers have started that are then to be idle, or to be killed."""
PREPARING: Final = 3_600.0
"""Seconds that filling a database may take."""
BESIDE: Final = 3_600.0
"""Seconds that a measure beside the cases may take."""


class MeasurementFailed(Exception):
    """A measurement that was given up, or ended with an error: the message says why."""


class Suite:
    """All measurements on one server. `tell` is given a line about each."""

    def __init__(self, server: Server, results: Results, tell: Callable[[str], None]) -> None:
        self._server, self._size, self._results, self._tell = server, results.size, results, tell
        self._templates: dict[Kept, str] = {}
        self._lock = threading.Lock()

    def measure(self, points: Sequence[Point], rounds: int) -> None:
        """All points, and that once more in each further round. First each system is asked what it has."""
        systems = dict.fromkeys(point.system for point in points if not self._results.unusable(point.system))
        with ThreadPoolExecutor() as beside:
            for system, answer in zip(systems, beside.map(_asked, systems), strict=True):
                self._note_system(system, answer, points)
        for number in range(1, rounds + 1):
            for rows in side_by_side(points, self._size):
                self._side_by_side(rows, number)

    def _note_system(self, system: str, answer: dict[str, Any], points: Sequence[Point]) -> None:
        results = self._results
        if "unusable" in answer:
            results.failures.append(Failure(system, answer["unusable"]))
            self._tell(f"{system} can't be measured: {answer['unusable']}")
            return
        results.settings[system] = answer["settings"]
        results.versions |= answer["versions"]
        results.without.update(p for p in points if p.system == system and p.case not in answer["cases"])

    def _side_by_side(self, rows: Sequence[Row], number: int) -> None:
        """Each row by itself, its points in turn."""

        def measure(row: Row) -> None:
            time.sleep(row.after)
            for point in row.points:
                self._one(point, number)

        with ThreadPoolExecutor(max(1, len(rows))) as beside:
            for done in [beside.submit(measure, row) for row in rows]:
                done.result()

    def measure_beside(self, name: str) -> None:
        """What ``python -m benchmarks.NAME`` measures."""
        began = time.monotonic()
        try:
            with self._database("empty") as database:
                self._results.beside[name] = self._run(f"benchmarks.{name}", [], database, BESIDE)
        except MeasurementFailed as error:
            self._results.failures.append(Failure(name, str(error)))
        self._tell(f"{name}: {time.monotonic() - began:.0f} s")

    def _one(self, point: Point, number: int) -> None:
        results = self._results
        if results.hopeless(point):
            return
        began, given = time.monotonic(), [point.system, point.case, *point.arguments]
        try:
            with self._database(point.database) as database:
                answer = self._run("benchmarks.measure", given, database, CASES[point.case].timeout)
        except MeasurementFailed as error:
            answer = {"failed": str(error)}
        with self._lock:
            said = self._note(point, number, answer)
        self._tell(f"round {number}: {point}: {said} ({time.monotonic() - began:.1f} s)")

    def _note(self, point: Point, number: int, answer: dict[str, Any]) -> str:
        """Keep an answer; returns it in words."""
        results = self._results
        if "failed" in answer:
            results.failures.append(Failure(point.system, answer["failed"], point))
            return f"failed: {answer['failed']}"
        results.values.setdefault(point, {})[number] = answer["values"]
        case = CASES[point.case]
        if not answer["values"]:
            return case.nothing(results.size)
        return f"{amount(case.summary(answer['values']))} {case.unit}"

    @contextmanager
    def _database(self, kept: Kept) -> Iterator[str]:
        """A database for one measurement. Raises MeasurementFailed if it could not be filled."""
        database = self._server.create(self._template(kept))
        try:
            yield database
        finally:
            self._server.drop(database)

    def _template(self, kept: Kept) -> str | None:
        """The database of which a measurement gets a copy; filled when it is first asked for."""
        if kept == "empty":
            return None
        if kept not in self._templates:
            name = self._server.create()
            self._tell(f"filling a database: {kept}")
            self._run("benchmarks.prepare", [kept], name, PREPARING)
            self._templates[kept] = name
        return self._templates[kept]

    def _run(self, module: str, arguments: Sequence[str], database: str, limit: float) -> dict[str, Any]:
        """What a program says that is given a database. Raises MeasurementFailed."""
        given = [*arguments, "--dsn", self._server.dsn(database), "--size", self._size]
        return _answer_of(module, given, limit)


@dataclass(frozen=True)
class Row:
    """What is measured in turn, beside other rows. `after`: so many seconds behind them."""

    points: Sequence[Point]
    after: float = 0.0


def side_by_side(points: Sequence[Point], size: Size) -> Iterator[Sequence[Row]]:
    """One after the other, what is measured at the same time.

    Those that wait more than they work are side by side, behind all others. In a quick measurement only what counts
    steps by the second has the machine for itself: the rest is measured while those wait.
    """
    patient = [Row([point]) for point in points if point.case in PATIENT]
    if size == "full":
        yield [Row([point for point in points if point.case not in PATIENT])]
        yield patient
    else:
        rest = [point for point in points if point.case not in (*STEPS, *LATENCIES, *PATIENT)]
        yield [Row([point for point in points if point.case in STEPS])]
        yield [*patient, Row([point for point in points if point.case in LATENCIES], STARTED), Row(rest, STARTED)]


def _asked(system: str) -> dict[str, Any]:
    """What a system says of itself, or why it can't be measured."""
    try:
        return _answer_of("benchmarks.ask", [system], ASKING)
    except MeasurementFailed as error:
        return {"unusable": str(error)}


def _answer_of(module: str, arguments: Sequence[str], limit: float) -> dict[str, Any]:
    """Run ``python -m MODULE``; returns what its last line says. Raises MeasurementFailed."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, complaints = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end_with_its_own(process)
        raise MeasurementFailed(f"not ended after {limit:.0f} s") from None
    except BaseException:
        end_with_its_own(process)
        raise
    if process.returncode:
        end_with_its_own(process)
        raise MeasurementFailed(last_line(complaints) or f"exit code {process.returncode}")
    try:
        answer: dict[str, Any] = json.loads(last_line(said))
    except ValueError:
        raise MeasurementFailed(f"its last line is no JSON: {last_line(said)[:200]!r}") from None
    return answer


def end_with_its_own(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it has started, which are of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    """The last line with something in it."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
