"""What is particular to the crashes of functions: bodies that block or spin, steps that kill the worker that replays
their body, requests that are answered through crashes and over a chain of runs, clean-up that is killed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from tests.chaos.kit import LIMIT, Measured, Stage, WorkerProcess
from tests.chaos.test_kill_points import JOBS

from durable.core.functions.body import SUSPECT
from durable.durable import Durable
from durable.engine.points import Point
from durable.worker.watchdog import EXIT_CODE

POINTS: Final = tuple(point for point in Point if point not in JOBS)
CHARGES: Final = "select step_id from durable.attempts where run_id = %s and kind = 'interrupted' order by seq"


def charges(stage: Stage, run: uuid.UUID) -> list[str]:
    """What the run's crashes were charged to."""
    return [row["step_id"] for row in stage.rows(CHARGES, run)]


def error(stage: Stage, run: uuid.UUID) -> dict[str, Any]:
    (row,) = stage.rows("select error from durable.runs where id = %s", run)
    found: dict[str, Any] = row["error"]
    return found


def kept_alive(stage: Stage, many: int, **settings: Any) -> bool:
    """So many workers, whatever happens to them; whether all is at rest."""
    for _ in range(many - sum(worker.code is None for worker in stage.workers)):
        stage.worker(**settings)
    return stage.at_rest()


# ---------------------------------------------------------------- bodies and steps that take their worker with them


def test_a_body_that_blocks_ends_its_worker_and_then_its_run(stage: Stage, measured: Measured) -> None:
    settings = {"max_crashes": 3, "patience": 1.0, "silence": "1s", "says_something": 0.2}
    blocking = stage.start("blocking")
    neighbours = [stage.start("neighbour") for _ in range(3)]
    stage.until(lambda: kept_alive(stage, 2, **settings), "all ended, with two workers kept alive")
    stage.until(lambda: sum(worker.code is not None for worker in stage.workers) >= 3, "each that it blocked has ended")
    codes = Counter(worker.code for worker in stage.workers)
    assert set(codes) == {None, EXIT_CODE}, "they ended by their watchdogs"
    assert stage.status(blocking) == "failed"
    failure = error(stage, blocking)
    assert failure["type"] == "durable.errors.StepInterrupted"
    assert "while the body itself ran" in failure["message"]
    first, *others = charges(stage, blocking)
    assert first == "before", "its entry was to be written with what the body does next"
    assert set(others) == {SUSPECT}
    assert stage.written(blocking) == {"before": 1}
    for run in neighbours:
        assert stage.status(run) == "completed", "it is not charged with what the body did until it fails"
        assert stage.written(run) == {"both/a/second": 1, "both/b/second": 1, "third": 1}
    measured(f"a blocking body ended {codes[EXIT_CODE]} workers, then failed")
    stage.check()


def test_a_body_that_spins_is_stopped_while_others_go_on(stage: Stage, measured: Measured) -> None:
    worker = stage.registered(stage.worker(patience=10.0, silence="5s"))
    began = time.monotonic()
    runs = [stage.start("spinning") for _ in range(2)]
    neighbours = [stage.start("neighbour") for _ in range(3)]
    stage.finish()
    measured(f"two spinning bodies and their neighbours ended after {time.monotonic() - began:.1f} s")
    for run in runs:
        assert stage.status(run) == "failed"
        assert error(stage, run)["type"] == "durable.errors.DefinitionError"
        assert "ran for a second without awaiting" in error(stage, run)["message"]
        assert charges(stage, run) == []
    for run in neighbours:
        assert stage.status(run) == "completed"
    assert worker.code is None, "it has outlived them"
    assert len(stage.workers) == 1
    stage.check()


def test_a_step_that_kills_is_charged_not_its_body(stage: Stage) -> None:
    run = stage.start("killing")
    stage.until(lambda: kept_alive(stage, 1, max_crashes=4), "all ended, with a worker kept alive")
    assert stage.status(run) == "completed", "the body has caught it"
    (row,) = stage.rows("select result from durable.journal where run_id = %s and step_id = 'run:result'", run)
    assert row["result"] == "interrupted"
    first, *others = charges(stage, run)
    assert first == "cheap", "ephemeral: it was to be written with the next entry, and was lost with the worker"
    assert others == ["kill"] * 4
    assert stage.noted(run, "kill") == 5
    assert stage.written(run) == {"before": 1, "after": 1}
    stage.check()


# ---------------------------------------------------------------- a chain of runs that answers requests


@contextmanager
def asking(stage: Stage, run: uuid.UUID, questions: int) -> Iterator[list[Any]]:
    """Somebody asks one question after the other; what was answered, once the block has ended."""
    answers: list[Any] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with Durable(stage.dsn, embedded="never") as app:
                answers.extend(app.request(run, "question", number, timeout=LIMIT) for number in range(questions))
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("point", [Point.AFTER_LOCK, Point.AFTER_HANDLER, Point.BEFORE_COMMIT, Point.AFTER_COMMIT])
def test_a_chain_answers_each_request_once(stage: Stage, point: Point, measured: Measured) -> None:
    links = 4
    first = stage.start("relay", left=links - 1)
    with asking(stage, first, links) as answers:
        for nth in range(1, 5):
            doomed = stage.worker(kill=(point, "function"), nth=nth, max_crashes=1_000)
            stage.until(lambda doomed=doomed: doomed.killed or stage.at_rest(), f"killed at {point}")  # type: ignore[misc]
            doomed.kill()
        stage.worker(max_crashes=1_000)
        stage.until(stage.at_rest, "the chain has ended")
    measured(f"a chain that answers was killed at {point}: {stage.kills().total()} times")
    assert answers == [{"to": number, "left": links - 1 - number} for number in range(links)]
    chain = stage.rows("select id, status, predecessor from durable.runs order by created_at, id")
    assert [row["status"] for row in chain] == ["completed"] * links
    assert [row["predecessor"] for row in chain] == [None, *(row["id"] for row in chain[:-1])]
    for row in chain:
        assert stage.written(row["id"]) == {"answer": 1}
    stage.check()


# ---------------------------------------------------------------- cancel


@pytest.mark.parametrize("compensate", [False, True], ids=["end", "roll back"])
@pytest.mark.parametrize("point", POINTS)
def test_clean_up_is_killed(stage: Stage, point: Point, compensate: bool) -> None:
    run = stage.start("cleaning", slow="function")
    first = stage.worker()
    stage.until(lambda: stage.noted(run, "wait/hold/hold"), "it waits")
    first.kill()
    stage.until(stage.no_backend_left, "its run is free")
    with Durable(stage.dsn, embedded="never") as app:
        assert app.cancel(run, reason="enough", compensate=compensate)
    killed_at(stage, point)
    stage.worker(max_crashes=1_000)
    stage.until(stage.at_rest, "it is canceled")
    assert stage.status(run) == "canceled"
    assert stage.kills()[point, "function"] == 1, "killed"
    assert stage.written(run) == {"book": 1, "tidy": 1} | ({"undo:book": 1} if compensate else {})
    assert stage.noted(run, "tell") >= 1
    stage.check()


def killed_at(stage: Stage, point: Point) -> WorkerProcess:
    """A worker is killed there."""
    if point is Point.IN_SWEEP:
        killed_at(stage, Point.AFTER_LOCK)
    doomed = stage.worker(kill=(point, "function"), max_crashes=1_000)
    stage.until(lambda: doomed.killed, f"killed at {point}")
    stage.until(stage.no_backend_left, "its run is free")
    return doomed
