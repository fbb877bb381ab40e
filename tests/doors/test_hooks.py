"""Hooks as users write them: with the sync app, in the harness, in a worker that is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import durable
from durable import Durable, ErrorReport, Retry, Status, StatusChange, define
from durable.testing import Harness


def flaky(ctx: Any) -> int:
    if ctx.attempt < 3:
        raise ConnectionError("no line")
    return int(ctx.attempt)


calling = define("calling").step("call", flaky, retry=Retry(initial=60, jitter=False))
asking = define("asking").wait_for_signal("answer", "answer")
PATIENCE = 60.0


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with Durable(dsn, workflows=[calling, asking]) as app:
        yield app


def test_in_the_harness(app: Durable) -> None:
    errors: list[ErrorReport] = []
    changes: list[StatusChange] = []
    app.on_error(errors.append)

    @app.on_status_change
    async def changed(change: StatusChange) -> None:
        changes.append(change)

    with Harness(app) as t:
        run = app.start(calling)
        t.drain()
        assert [(e.step, e.attempt, e.delay, e.remaining) for e in errors] == [("call", 1, 60, 2)]
        t.drain()  # nothing is due: nothing is told again
        t.skip(seconds=61)
        t.drain()
        t.skip(minutes=3)
        t.drain()
        assert run.result() == {"call": 3}
        assert [e.attempt for e in errors] == [1, 2]
        assert changes[-1].status is Status.COMPLETED
        assert {e.run_id for e in errors} | {c.run_id for c in changes} == {run.id}


def test_a_hook_that_raises_falls_due_with_the_clock(app: Durable) -> None:
    ids: list[str] = []

    @app.on_status_change
    def hook(change: StatusChange) -> None:
        ids.append(change.id)
        if len(ids) == 1:
            raise OSError("unreachable")

    with Harness(app) as t:
        run = app.start(asking)
        t.drain()
        assert len(ids) == 1
        t.skip(seconds=2)
        t.drain()
        assert ids == [ids[0]] * 2
        assert run.status().derived == "waiting_for_signal"


def test_what_a_hook_does_to_runs_is_drained_too(app: Durable) -> None:
    @app.on_status_change
    def answer(change: StatusChange) -> None:
        if change.workflow == "asking" and change.status is Status.SUSPENDED:
            app.signal(change.run_id, "answer", 42, id=change.id)

    with Harness(app) as t:
        run = app.start(asking)
        t.drain()
        assert run.status().results == {"answer": 42}


def test_the_crash_of_a_drain_loses_nothing(app: Durable) -> None:
    statuses: list[Status] = []
    app.on_status_change(lambda change: statuses.append(change.status))
    with Harness(app) as t:
        app.start(define_two(app))
        t.drain(max_steps=1)
        assert statuses == []  # it died right after its commit
        t.drain()
    assert statuses == [Status.RUNNING, Status.COMPLETED]


def define_two(app: Durable) -> str:
    app.define("two").step("a", lambda ctx: 1).step("b", lambda ctx: 2)
    return "two"


def test_by_a_worker_in_the_background(app: Durable) -> None:
    told, thread = threading.Event(), threading.current_thread()
    threads: list[Any] = []

    @app.on_status_change
    def changed(change: StatusChange) -> None:
        threads.append(threading.current_thread())
        if change.status is Status.CANCELED:
            told.set()

    with app.worker():
        run = app.start(asking)
        run.cancel(reason="enough")  # written by this process, told by the worker
        assert told.wait(PATIENCE)
    assert thread not in threads
    assert all(name.name.startswith("durable-hook") for name in threads)


KILLED = """
import os, sys

from durable import Durable

app = Durable(sys.argv[1])
work = app.define("work").step("a", lambda ctx: 1)


@app.on_status_change
def hook(change):
    print(change.id, flush=True)
    os._exit(9)


app.start(work)
app.run_worker(until_idle=True)
"""


@pytest.mark.behaviour("WF-50")
def test_a_process_that_dies_in_a_hook(dsn: str, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, dsn], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 9, done.stderr
    ids: list[str] = []
    with Durable(dsn) as app:
        app.define("work").step("a", lambda ctx: 1)
        app.on_status_change(lambda change: ids.append(change.id))
        with Harness(app) as t:
            t.drain()
            assert ids == []  # for all that is known the other one is at it still
            t.skip(seconds=31)
            t.drain()
        assert ids == [done.stdout.strip()]
        assert [run.status for run in app.list()] == [Status.COMPLETED]
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select count(*) from durable.deliveries").fetchone() == (0,)


def test_both_facades_of_an_app_have_the_same_hooks(app: Durable) -> None:
    @app.on_error
    def hook(report: ErrorReport) -> None: ...

    assert app.async_app.hooks is app.hooks
    assert app.hooks.of("error") == (hook,)
    assert app.hooks.of("status") == ()


def test_two_apps_share_nothing(app: Durable) -> None:
    app.on_error(lambda report: None)
    assert Durable().hooks.kinds == ()


def test_their_shapes_are_public() -> None:
    assert {"StatusChange", "ErrorReport"} <= {*durable.__all__} & {*dir(durable)}
