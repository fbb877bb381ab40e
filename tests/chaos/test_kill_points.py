"""Workers are killed with SIGKILL at every point at which the engine can be hit, for every kind of node, and for
functions; then others finish the runs, and nothing is missing and nothing is there twice.

A cell is a point and what was executing there. The default run kills at every point, in one cell each, and proves that
every cell can be reached; ``-m soak`` kills fifty times in every cell.
"""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import pytest
from tests.chaos.kit import Measured, Nursery, Stage, WorkerProcess, staged
from tests.conftest import Base

from durable.engine.points import Point

Cell: TypeAlias = tuple[Point, str]

KINDS: Final = ("step", "parallel", "route", "loop", "sleep", "signal", "child", "function", "undo", "-")
"""What can be executing; ``-`` is what comes after the last node."""
WORKFLOWS: Final = {"function": ("script",), "undo": ("everything", "script")}
"""The workflows that come to such a kind; else `everything`."""
JOBS: Final = (Point.BEFORE_LOCK, Point.BEFORE_RERING, Point.BEFORE_FINISH)
"""Points of a job, which knows no node."""
DETACHED: Final = (Point.BEFORE_CLAIM, Point.AFTER_CLAIM, Point.BEFORE_OUTCOME)
"""Points that are reached only by what runs without its row."""

REACHABLE: Final[frozenset[Cell]] = frozenset(
    {(point, "-") for point in JOBS} | {(p, what) for p in Point if p not in JOBS for what in KINDS}
)

CHOSEN: Final[tuple[Cell, ...]] = (
    (Point.BEFORE_LOCK, "-"),
    (Point.AFTER_LOCK, "signal"),
    (Point.BEFORE_HANDLER, "route"),
    (Point.AFTER_HANDLER, "step"),
    (Point.BEFORE_CLAIM, "loop"),
    (Point.AFTER_CLAIM, "parallel"),
    (Point.BEFORE_OUTCOME, "parallel"),
    (Point.BEFORE_COMMIT, "child"),
    (Point.BEFORE_COMMIT, "undo"),
    (Point.AFTER_COMMIT, "sleep"),
    (Point.BEFORE_RERING, "-"),
    (Point.BEFORE_FINISH, "-"),
    (Point.IN_SWEEP, "step"),
    *((point, "function") for point in Point if point not in JOBS),
    (Point.AFTER_HANDLER, "undo"),
)
"""Where the default run kills."""


def test_default_run_kills_at_every_point() -> None:
    assert {point for point, _ in CHOSEN} == set(Point)
    assert set(CHOSEN) <= REACHABLE


def _name(cell: Cell) -> str:
    return f"{cell[0]}-{cell[1]}"


@pytest.mark.parametrize("cell", CHOSEN, ids=_name)
def test_killed_there(stage: Stage, cell: Cell) -> None:
    storm_on(cell)(stage, cell, kills=1)


def test_every_cell_is_reached(stage: Stage) -> None:
    """A kill matrix proves nothing about a cell that is never hit; and one that nobody declared is never killed in."""
    cases = itertools.product(("everything", "script"), ("", "all"), (False, True))
    runs = {stage.start(name, fail=fail, slow=slow): fail for name, slow, fail in cases}
    missing = list(KINDS)
    for _ in range(5):  # a sweep that is killed after it took a dead worker's jobs, and before more, has left no trace
        runs |= leave_to_the_sweep(stage, missing)
        busy = stage.start("busy")
        last = stage.worker(max_crashes=1_000)
        stage.until(lambda: stage.noted(busy, "hold"), "its row is held")  # noqa: B023
        stage.signal(busy, "gate", "yes")
        stage.finish()
        last.kill()
        missing = [what for what in KINDS if (Point.IN_SWEEP, what) not in stage.hits()]
        if not REACHABLE - stage.hits():  # a Point is a string
            break
    finish_and_check(stage, runs)
    reached = {(Point(point), what) for point, what in stage.hits()}
    assert sorted(REACHABLE - reached) == [], "never hit"
    assert sorted(reached - REACHABLE) == [], "nobody declared these"


def leave_to_the_sweep(stage: Stage, kinds: list[str]) -> dict[uuid.UUID, bool]:
    """Workers die, each with a run at one of these kinds of node in its hands."""
    runs = {}
    for what in kinds:
        runs[stage.start(workflows_of(what)[0], fail=what == "undo")] = what == "undo"
        doomed = stage.worker(kill=(Point.AFTER_LOCK, what), max_crashes=1_000)
        stage.until(lambda doomed=doomed: _hit(stage, doomed), f"killed at {what}")  # type: ignore[misc]
        stage.until(stage.no_backend_left, "its run is free")
    return runs


VARIANTS: Final = tuple(itertools.product((None, 1), (0.0, 2.0), (1, 2), (None, 1)))
"""Burst (the default, or one step a job), `detach_after`, surviving workers, jobs fetched at once (as many as there is
room for, or one)."""
KILLS: Final = 64
"""Kills a cell, spread over the variants."""


@pytest.mark.soak
@pytest.mark.parametrize("cell", sorted(REACHABLE), ids=_name)
def test_matrix(nursery: Nursery, base: Base, template: Any, tmp_path: Path, cell: Cell, measured: Measured) -> None:
    began, count = time.monotonic(), 0
    for number, (burst, wanted, survivors, batch) in enumerate(VARIANTS):
        detach_after = wanted if reachable_with(cell, wanted) else 0.05
        folder = tmp_path / str(number)
        folder.mkdir()
        with (
            base.created(f"{template.template_dbname}_{cell[0]}_{number}", template.template_dbname) as dsn,
            staged(nursery, dsn, folder, burst=burst, detach_after=detach_after, fetch_batch=batch) as stage,
        ):
            count += storm_on(cell)(stage, cell, kills=KILLS // len(VARIANTS), survivors=survivors)
    measured(f"{_name(cell)}: {count} kills in {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_way_to_work(
    nursery: Nursery, dsn: str, tmp_path: Path, variant: tuple[int | None, float, int, int | None]
) -> None:
    """Killed before and after the commit of a step, whatever the worker's options are."""
    burst, detach_after, survivors, batch = variant
    with staged(nursery, dsn, tmp_path, burst=burst, detach_after=detach_after, fetch_batch=batch) as stage:
        for point in (Point.BEFORE_COMMIT, Point.AFTER_COMMIT):
            storm(stage, (point, "step"), kills=1, survivors=survivors)


def reachable_with(cell: Cell, detach_after: float) -> bool:
    """With a large `detach_after` only branches, and steps that say so, run without their row."""
    return detach_after < 1 or cell[0] not in DETACHED or cell[1] in ("step", "parallel", "function", "undo")


# ---------------------------------------------------------------- how


class Storm(Protocol):
    def __call__(self, stage: Stage, cell: Cell, *, kills: int, survivors: int = 1) -> int: ...


def storm_on(cell: Cell) -> Storm:
    return storm_while_busy if cell[0] is Point.BEFORE_RERING else storm


def storm(stage: Stage, cell: Cell, *, kills: int, survivors: int = 1) -> int:
    """Kill one worker after the other in this cell, while new runs keep coming; then let others finish, and check."""
    point, what = cell
    runs = {}
    fails, names = _alternating(what), itertools.cycle(workflows_of(what))
    slow = what if point in DETACHED and stage.detaches_soon else ""
    first: Cell = (Point.AFTER_LOCK, what) if point is Point.IN_SWEEP else cell
    while stage.kills()[point, what] < kills:
        fail = next(fails)
        runs[stage.start(next(names), slow=slow, fail=fail)] = fail
        nth = 1 if kills == 1 else random.randint(1, 3)
        doomed = stage.worker(kill=first, nth=1 if point is Point.IN_SWEEP else nth, max_crashes=1_000)
        stage.until(lambda doomed=doomed: _hit(stage, doomed) or _over(stage), f"killed at {first}")  # type: ignore[misc]
        if point is Point.IN_SWEEP and doomed.killed:
            doomed = stage.worker(kill=cell, max_crashes=1_000)
            stage.until(lambda doomed=doomed: _hit(stage, doomed) or _over(stage), f"killed at {cell}")  # type: ignore[misc]
        doomed.kill()
    for _ in range(survivors):
        stage.worker(max_crashes=1_000)
    finish_and_check(stage, runs)
    return stage.kills()[point, what]


def storm_while_busy(stage: Stage, cell: Cell, *, kills: int, survivors: int = 1) -> int:
    """As `storm`, where a signal meets a row that is held for longer than a doorbell waits."""
    runs = []
    while stage.kills()[cell] < kills:
        runs.append(run := stage.start("busy"))
        doomed = stage.worker(kill=cell, max_crashes=1_000)
        stage.until(lambda: stage.noted(run, "hold") or doomed.killed, "the row is held")  # noqa: B023
        stage.signal(run, "gate", "yes")
        stage.until(lambda: doomed.killed or stage.at_rest(), f"killed at {cell}")  # noqa: B023
        doomed.kill()
    for _ in range(survivors):
        stage.worker(max_crashes=1_000)
    stage.until(stage.at_rest, "all have ended, by the signals that were sent")
    for run in runs:
        assert stage.written(run) == {"hold": 1, "after": 1}
        assert stage.status(run) == "completed"
    stage.check()
    return stage.kills()[cell]


def finish_and_check(stage: Stage, runs: dict[uuid.UUID, bool]) -> None:
    stage.finish()
    for run, fail in runs.items():
        stage.check_run(run, fail=fail)
    stage.check()


def workflows_of(what: str) -> tuple[str, ...]:
    return WORKFLOWS.get(what, ("everything",))


def _hit(stage: Stage, doomed: WorkerProcess) -> bool:
    stage.answer()
    return doomed.killed


def _over(stage: Stage) -> bool:
    """Nothing is left that could bring a worker to its kill point."""
    return stage.at_rest()


def _alternating(what: str) -> Iterator[bool]:
    if what == "undo":
        return itertools.repeat(True)
    return itertools.repeat(False) if what == "-" else itertools.cycle((True, False))
