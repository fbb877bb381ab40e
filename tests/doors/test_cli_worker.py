"""``durable worker`` as processes: what it says, how it ends, what happens when one of several dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from tests.doors import cli_flows
from tests.doors.cli_kit import FLOWS, LIMIT, spawn, until

from durable import Durable, Run


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with Durable(dsn, workflows=[cli_flows.hello, cli_flows.endless, cli_flows.logging]) as app:
        yield app


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """To be filled; what still runs afterwards is killed."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def pids(dsn: str) -> set[int]:
    """The processes of the workers that are registered."""
    with psycopg.connect(dsn) as connection:
        return {pid for (pid,) in connection.execute("select pid from durable.workers").fetchall()}


def executing(app: Durable) -> Run[Any]:
    """A run whose step never ends, once a worker executes it without holding its row."""
    run = app.start("endless")
    until(lambda: run.status().steps, "a worker has taken the run up")
    return run


def next_line(process: subprocess.Popen[str], what: str) -> str:
    """The next line of its log that says this."""
    assert process.stderr is not None
    for line in process.stderr:
        if what in line:
            return line
    raise AssertionError(f"it ended without saying {what!r}")


def test_a_worker_says_what_it_serves_works_and_ends_in_order(
    app: Durable, dsn: str, processes: list[subprocess.Popen[str]]
) -> None:
    worker = spawn("worker", f"{FLOWS}:app", "--log-format", "json", dsn=dsn)
    processes.append(worker)
    run, logged = app.start("hello", {"name": "Ada"}), app.start("logging")
    assert run.result(timeout=LIMIT) == {"greet": "hello Ada"}
    logged.result(timeout=LIMIT)
    worker.send_signal(signal.SIGTERM)
    out, err = worker.communicate(timeout=LIMIT)
    assert worker.returncode == 0
    served = [json.loads(line) for line in out.splitlines()]
    assert {"workflow": "hello", "version": "1", "kind": "builder", "nodes": 1} in served
    assert len(served) == 4
    records = [json.loads(line) for line in err.splitlines()]
    (mine,) = [record for record in records if record["message"] == "from the handler"]
    assert (mine["run"], mine["workflow"], mine["step"], mine["attempt"]) == (str(logged.id), "logging", "log", 1)
    assert any(record["message"].startswith("SIGTERM") for record in records)
    assert sum(record["message"].startswith("database") for record in records) == 1
    assert pids(dsn) == set(), "it has said goodbye"


def test_a_sync_app_and_imports_are_served_too(app: Durable, dsn: str, processes: list[subprocess.Popen[str]]) -> None:
    processes.append(spawn("worker", f"{FLOWS}:sync_app", "--import", FLOWS, dsn=dsn))
    assert app.start("logging").result(timeout=LIMIT) == {"log": None}
    processes[0].send_signal(signal.SIGINT)
    assert processes[0].wait(LIMIT) == 0


@pytest.mark.behaviour("RA-20")
def test_a_step_that_does_not_end_is_handed_back_after_the_grace_time(
    app: Durable, dsn: str, processes: list[subprocess.Popen[str]]
) -> None:
    worker = spawn("worker", "--import", FLOWS, "--grace", "100ms", dsn=dsn)
    processes.append(worker)
    run = executing(app)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT) == 0
    assert run.status().status == "running"
    assert [event.attempt for event in run.history() if event.kind == "attempt_interrupted"] == [1]
    assert pids(dsn) == set(), "nobody has to take it over: it was handed back"


def test_the_second_signal_ends_it_at_once(app: Durable, dsn: str, processes: list[subprocess.Popen[str]]) -> None:
    worker = spawn("worker", "--import", FLOWS, dsn=dsn)
    processes.append(worker)
    executing(app)
    worker.send_signal(signal.SIGTERM)
    next_line(worker, "again to end at once")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(LIMIT) == 128 + signal.SIGTERM


def test_several_processes_one_is_replaced_and_all_end_together(
    app: Durable, dsn: str, processes: list[subprocess.Popen[str]]
) -> None:
    boss = spawn("worker", "--import", FLOWS, "--processes", "2", dsn=dsn)
    processes.append(boss)
    until(lambda: len(pids(dsn)) == 2, "two workers")
    first = pids(dsn)
    assert boss.pid not in first
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    assert "SIGKILL" in next_line(boss, "ended unexpectedly")
    until(lambda: len(pids(dsn) - {victim}) == 2, "another worker in its place")
    assert app.start("hello", {"name": "a"}).result(timeout=LIMIT) == {"greet": "hello a"}
    boss.send_signal(signal.SIGTERM)
    out, _ = boss.communicate(timeout=LIMIT)
    assert boss.returncode == 0
    assert out.count('"hello"') == 1, "said once, not by every process"
    until(lambda: pids(dsn) <= {victim}, "all have said goodbye")


def test_no_process_outlives_a_killed_parent(app: Durable, dsn: str, processes: list[subprocess.Popen[str]]) -> None:
    boss = spawn("worker", "--import", FLOWS, "--processes", "2", dsn=dsn)
    processes.append(boss)
    until(lambda: len(pids(dsn)) == 2, "two workers")
    boss.kill()
    until(lambda: not pids(dsn), "both have ended in order")


def test_the_second_signal_ends_all_processes_at_once(
    app: Durable, dsn: str, processes: list[subprocess.Popen[str]]
) -> None:
    boss = spawn("worker", "--import", FLOWS, "--processes", "2", dsn=dsn)
    processes.append(boss)
    executing(app)
    boss.send_signal(signal.SIGINT)
    next_line(boss, "again to end at once")
    boss.send_signal(signal.SIGINT)
    assert boss.wait(LIMIT) == 128 + signal.SIGINT
    with psycopg.connect(dsn, autocommit=True) as connection:
        alive = "select count(*) from pg_stat_activity where application_name = 'durable liveness' and datname = %s"
        name = [connection.info.dbname]
        until(lambda: connection.execute(alive, name).fetchone() == (0,), "nobody is connected any more")


def test_an_unreachable_database_is_one_line(processes: list[subprocess.Popen[str]]) -> None:
    began = time.monotonic()
    worker = spawn("worker", "--import", FLOWS, "--processes", "2", dsn="postgresql://x:secret@127.0.0.1:1/nowhere")
    processes.append(worker)
    out, err = worker.communicate(timeout=LIMIT)
    assert worker.returncode == 2
    assert out == ""
    assert "cannot connect" in err
    assert "secret" not in err
    assert "Traceback" not in err
    assert time.monotonic() - began < LIMIT
