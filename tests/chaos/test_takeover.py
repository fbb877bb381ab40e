"""What becomes of the runs of a worker that dies, stops, or is told to end."""

from __future__ import annotations

import signal
import time
import uuid

import pytest
from tests.chaos.kit import Measured, Stage, WorkerProcess

DEFAULTS = {"tick": 1.0, "stood": 3.0}
"""The engine's own times."""


def let_go(stage: Stage) -> None:
    """Handlers that hold on may end."""
    (stage.folder / "go").touch()


def may_judge(stage: Stage, worker: WorkerProcess) -> None:
    """Its lock has stood long enough for it to call others dead."""
    sql = "select 1 from durable.workers where pid = %s and started_at < clock_timestamp() - make_interval(secs => %s)"
    stage.until(lambda: stage.rows(sql, worker.pid, worker.settings.stood), f"worker {worker.pid} may judge")


def interrupted(stage: Stage, run: uuid.UUID) -> list[tuple[str, int]]:
    """The interrupted attempts of a run: step and number."""
    sql = "select step_id, attempt from durable.attempts where run_id = %s and kind = 'interrupted' order by seq"
    return [(row["step_id"], row["attempt"]) for row in stage.rows(sql, run)]


def entry(stage: Stage, run: uuid.UUID, step: str) -> tuple[str, int]:
    (row,) = stage.rows("select status, attempt from durable.journal where run_id = %s and step_id = %s", run, step)
    return row["status"], row["attempt"]


@pytest.mark.parametrize("workflow", ["holding-attached", "holding"])
def test_killed_worker_is_taken_over(stage: Stage, workflow: str, measured: Measured) -> None:
    first = stage.registered(stage.worker(**DEFAULTS))
    run = stage.start(workflow)
    stage.until(lambda: stage.noted(run, "hold") == 1, "the step runs")
    if workflow == "holding":
        stage.until(lambda: stage.rows("select 1 from durable.runs where claim_token is not null"), "it is detached")
    second = stage.registered(stage.worker(**DEFAULTS))
    may_judge(stage, second)
    first.kill()
    died = time.monotonic()
    stage.until(lambda: stage.noted(run, "hold") == 2, "the step runs again")
    measured(f"takeover after kill -9, default settings, {workflow}: {time.monotonic() - died:.2f} s")
    let_go(stage)
    stage.finish()
    stage.check()
    assert stage.status(run) == "completed"
    assert stage.written(run) == ({"hold": 1, "after": 1} if workflow == "holding-attached" else {"after": 1})
    assert interrupted(stage, run) == [("hold", 1)]
    assert entry(stage, run, "hold") == ("completed", 1)
    assert second.code is None


@pytest.mark.parametrize("workflow", ["holding", "holding-sync"])
def test_stopped_worker_loses_its_claims_and_goes_on(stage: Stage, workflow: str, measured: Measured) -> None:
    silence = {"silence": "1s", "says_something": 0.2}
    stopped = stage.registered(stage.worker(**silence))
    run = stage.start(workflow)
    stage.until(lambda: stage.rows("select 1 from durable.runs where claim_token is not null"), "it is detached")
    stopped.send(signal.SIGSTOP)
    began = time.monotonic()
    other = stage.registered(stage.worker(**silence))
    stage.until(lambda: stage.noted(run, "hold") == 2, "the step runs in the other worker")
    measured(f"takeover from a stopped worker, 1 s of silence, {workflow}: {time.monotonic() - began:.2f} s")
    let_go(stage)
    stage.finish()
    stopped.send(signal.SIGCONT)
    stage.until(lambda: "what its handler did is discarded" in stopped.log, "its late result is discarded")
    assert stage.written(run) == {"after": 1}
    assert entry(stage, run, "hold") == ("completed", 1)
    other.kill()
    later = stage.start("innocent")
    stage.finish()
    assert stage.status(later) == "completed", "it works again"
    stage.check()


def test_killer_step_fails_and_its_neighbours_complete(stage: Stage, measured: Measured) -> None:
    killer = stage.start("killer")
    innocents = [stage.start("innocent") for _ in range(6)]

    def supervised() -> bool:
        alive = [worker for worker in stage.workers if not worker.killed]
        for _ in range(2 - len(alive)):
            stage.worker(max_crashes=4)
        return stage.at_rest()

    stage.until(supervised, "all ended, with two workers kept alive")
    assert stage.status(killer) == "failed"
    (row,) = stage.rows(
        "select error ->> 'type' as type, error ->> 'message' as why from durable.runs where id = %s", killer
    )
    assert row["type"].endswith("StepInterrupted"), row
    assert len(interrupted(stage, killer)) == 4
    charges = {run: len(interrupted(stage, run)) for run in innocents}
    for run in innocents:
        assert stage.status(run) == "completed"
        assert stage.written(run) == {"second": 1, "third": 1}
    measured(
        f"a killer step killed {stage.noted(killer, 'kill')} workers; charged to 6 neighbours: {[*charges.values()]}"
    )
    stage.check()


def test_sigterm_lets_steps_end_then_hands_them_back_uncounted(stage: Stage) -> None:
    ending = stage.registered(stage.worker(grace=1.0))
    holding = [stage.start(name) for name in ("holding", "holding-sync", "holding-attached")]
    short = stage.start("brief")
    stage.until(lambda: all(stage.noted(run, "hold") for run in holding), "the long steps run")
    stage.until(lambda: stage.noted(short, "second"), "the short step runs")
    ending.send(signal.SIGTERM)
    stage.until(
        lambda: stage.noted(short, "second") and stage.written(short)["second"], "the short step ended in grace"
    )
    late = stage.start("innocent")
    assert ending.wait() == 0, ending.log
    assert stage.status(late) == "pending", "it was not fetched any more"
    assert not stage.rows("select 1 from durable.workers")
    assert not stage.rows("select 1 from durable.procrastinate_jobs where status = 'doing'")
    for run in holding:
        (row,) = stage.rows("select status, claim_token, frame::text from durable.runs where id = %s", run)
        assert row["status"] in ("pending", "running")
        assert row["claim_token"] is None
        assert '"crashes"' not in row["frame"], "no crash was charged"
    let_go(stage)
    stage.worker()
    stage.finish()
    stage.check()
    for run in holding:
        assert stage.status(run) == "completed"
        assert entry(stage, run, "hold") == ("completed", 1)
        assert stage.written(run)["after"] == 1
    assert interrupted(stage, holding[0]) == [("hold", 1)]
    assert interrupted(stage, holding[2]) == [("hold", 1)]
    assert interrupted(stage, short) == interrupted(stage, late) == []
