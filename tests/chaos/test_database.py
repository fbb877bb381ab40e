"""The database goes away under the workers, forgets the queue, or delivers jobs that nobody meant: nothing is lost, and
nothing is there twice.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from tests.chaos.cutter import proxied
from tests.chaos.kit import Measured, Nursery, Stage, staged

from durable import migrate
from durable.postgres import EmbeddedPostgres


def load(stage: Stage, runs: int) -> dict[uuid.UUID, bool]:
    """So many runs of `everything`, and two of `script`; half of them fail late; some detach here, some there."""
    slow = ("", "step", "undo", "loop", "route", "child")
    cases = [("everything", slow[number % len(slow)]) for number in range(runs)]
    cases += [("script", "function"), ("script", "")]
    return {stage.start(name, slow=slow, fail=n % 2 == 0): n % 2 == 0 for n, (name, slow) in enumerate(cases)}


def finish(stage: Stage, runs: dict[uuid.UUID, bool], workers: int = 2) -> None:
    """All runs end as they must, and no worker has ended."""
    stage.finish()
    for run, fail in runs.items():
        stage.check_run(run, fail=fail)
    stage.check()
    assert [worker.code for worker in stage.workers] == [None] * workers


@contextmanager
def meanwhile(what: Callable[[], None]) -> Iterator[threading.Event]:
    """Do something again and again while the block runs. Errors of the database are what is tested."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def again() -> None:
        while not stop.is_set():
            try:
                what()
            except psycopg.OperationalError:
                pass
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_the_answer_to_commit_is_cut(stage: Stage, measured: Measured) -> None:
    with proxied(stage.dsn) as cutter:
        for _ in range(2):
            stage.registered(stage.worker(dsn=cutter.dsn, max_crashes=1_000))
        cutter.cut(share=0.3, cuts=40)
        runs = load(stage, 4)
        finish(stage, runs)
        measured(f"cut: {cutter.answers_cut} answers to COMMIT, {cutter.commits_cut} COMMITs")
        assert cutter.answers_cut > 0


def test_connections_are_terminated(stage: Stage, measured: Measured) -> None:
    runs = load(stage, 4)
    for _ in range(2):
        stage.registered(stage.worker(max_crashes=1_000))
    ended = 0
    sql = """
      select pg_terminate_backend(pid) from pg_stat_activity
      where datname = current_database() and application_name like 'durable %%' order by random() limit 1
    """
    while ended < 25 and not stage.at_rest():
        ended += len(stage.rows(sql))
        stage.answer()
    measured(f"terminated {ended} connections")
    finish(stage, runs)


@pytest.fixture
def own_stage(nursery: Nursery, own_server: EmbeddedPostgres, tmp_path: Path) -> Iterator[Stage]:
    """On a server that can be restarted. What is committed there survives that."""
    dsn = own_server.dsn("durable")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter database durable set synchronous_commit to on")
    migrate.upgrade(dsn)
    with staged(nursery, dsn, tmp_path) as made:
        yield made


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_restart_under_load(
    own_stage: Stage, own_server: EmbeddedPostgres, mode: Literal["immediate", "fast"], measured: Measured
) -> None:
    stage = own_stage
    for _ in range(2):
        stage.registered(stage.worker(stood=3.0))
    detached, threaded, attached = (stage.start(name) for name in ("holding", "holding-sync", "holding-attached"))
    runs = load(stage, 4)
    stage.until(lambda: all(stage.noted(run, "hold") for run in (detached, threaded, attached)), "they hold on")
    claimed = "select 1 from durable.runs where id = any (%s) and claim_token is not null having count(*) = 2"
    stage.until(lambda: stage.rows(claimed, [detached, threaded]), "two are detached")
    began = time.monotonic()
    own_server.restart(mode)
    restarted = time.monotonic()
    stage.until(lambda: stage.rows("select 1 from durable.workers having count(*) >= 2"), "the database is back")
    (stage.folder / "go").touch()
    finish(stage, runs)
    measured(f"{mode} restart took {restarted - began:.1f} s, all ended {time.monotonic() - restarted:.1f} s after it")
    for run in (detached, threaded, attached):
        assert stage.status(run) == "completed"
        assert stage.written(run)["after"] == 1
    assert stage.written(attached)["hold"] == 1
    for run in (detached, threaded):
        assert stage.noted(run, "hold") == 1, "a detached step outlives the restart, and is not run again"


def test_the_sweep_alone_brings_all_to_their_end(stage: Stage, measured: Measured) -> None:
    runs = load(stage, 4)
    for _ in range(2):
        stage.registered(stage.worker(max_crashes=1_000))
    deleted = 0

    def delete() -> None:
        nonlocal deleted
        with psycopg.connect(stage.dsn, autocommit=True) as connection:
            deleted += connection.execute("delete from durable.procrastinate_jobs").rowcount

    for _ in range(20):
        delete()
        before = stage.statuses()
        stage.answer()
        stage.until(lambda before=before: moved(stage, before) or stage.at_rest(), "something has moved")  # type: ignore[misc]
    measured(f"deleted {deleted} jobs")
    finish(stage, runs)


def moved(stage: Stage, before: dict[uuid.UUID, str]) -> bool:
    stage.answer()
    return stage.statuses() != before or bool(stage.rows("select 1 from durable.procrastinate_jobs"))


DUPLICATES = """
insert into durable.procrastinate_jobs (queue_name, task_name, priority, args)
select r.queue, task, (random() * 2000000)::int, case
    when task = 'durable.ring' then jsonb_build_object('run_id', r.id)
    else jsonb_build_object('run_id', r.id, 'revision', greatest(r.revision - age, 0))
  end
from durable.runs r, generate_series(-1, 2) as age,
  unnest(array['durable.advance', 'durable.compensate', 'durable.ring']) as task
where r.finished_at is null or random() < 0.2
"""


def test_jobs_that_nobody_meant_change_nothing(stage: Stage, measured: Measured) -> None:
    """Twice, late, early, of the wrong kind, out of order, for runs that have ended."""
    runs = load(stage, 4)
    for _ in range(2):
        stage.registered(stage.worker())
    inserted = 0

    def insert() -> None:
        nonlocal inserted
        with psycopg.connect(stage.dsn, autocommit=True) as connection:
            (waiting,) = connection.execute("select count(*) from durable.procrastinate_jobs").fetchone() or (0,)
            if waiting < 100:
                inserted += connection.execute(DUPLICATES).rowcount

    with meanwhile(insert):
        stage.until(stage.all_ended, "all have ended")
    finish(stage, runs)
    measured(f"{inserted} jobs that nobody meant")
    interrupted: list[dict[str, Any]] = stage.rows("select * from durable.attempts where kind = 'interrupted'")
    why = {row["error"]["message"] for row in interrupted}
    assert why <= {"interrupted by cancel"}  # a map that has enough cancels the rest; nobody has crashed
