"""The examples do what they promise: an agent whose workers are killed, a file whose rows are loaded exactly once."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from examples.agent import agent as agents
from examples.etl import etl
from examples.etl.__main__ import counted
from tests.doors.cli_kit import LIMIT, ROOT, spawn, until

from durable import Durable, Run, RunFailed, StepSnapshot
from durable.testing import Harness

QUESTION = "I was charged twice for R-17"
RULES = ROOT / "examples" / "etl" / "rules.csv"


# ---------------------------------------------------------------- the agent


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with psycopg.connect(dsn) as connection:
        connection.execute(agents.TABLES)
    with Durable(dsn, workflows=[agents.agent]) as opened:
        yield opened


@pytest.fixture
def workers(dsn: str) -> Iterator[Any]:
    """Starts workers in processes of their own."""
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> subprocess.Popen[str]:
        started.append(spawn("worker", "examples.agent.app:app", dsn=dsn, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rows(dsn: str, query: str) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return connection.execute(query.encode()).fetchall()


def run_example(name: str, *words: str, dsn: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m examples.NAME`` in the root of the repository, and what is typed there."""
    return subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *words],
        cwd=ROOT,
        env={"DURABLE_DATABASE_URL": dsn, "THINKING": "0"},
        input=said,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def flat(steps: Sequence[StepSnapshot]) -> dict[str, StepSnapshot]:
    return {found.step_id: found for step in steps for found in (step, *flat(step.children).values())}


def thinks(run: Run[str], step_id: str) -> bool:
    found = flat(run.status().steps).get(step_id)
    return found is not None and found.status == "running"


def test_an_agent_whose_workers_are_killed(app: Durable, dsn: str, workers: Any) -> None:
    first = workers(THINKING="0")
    run = app.start(agents.agent, QUESTION)
    until(lambda: run.status().derived == "waiting_for_resume", "the agent asks for an approval")
    status = run.status()
    assert status.waiting_name == "turn[1]/call_tool"
    assert flat(status.steps)["turn[1]/call_tool"].snapshot["tool"] == "refund"
    first.kill()  # while nothing of it runs: the run is a row

    assert run.resume("turn[1]/call_tool", {"approved": True, "by": "Grace"}).accepted
    second = workers(THINKING="600")
    until(lambda: thinks(run, "turn[2]/ask_model"), "the refund is made, and the model thinks again")
    second.kill()  # in the middle of a step

    workers(THINKING="0")
    answer = run.result(timeout=LIMIT)
    assert answer == "Invoice R-17 was paid twice: 49.00 were given back, approved by Grace. The customer knows."
    assert rows(dsn, "select invoice, cents from agent.refunds") == [("R-17", 4900)]
    assert [recipient for _, recipient, _ in rows(dsn, "select * from agent.mails")] == ["ada@inbox.example"]
    interrupted = [event.step for event in run.history() if event.kind == "attempt_interrupted"]
    assert interrupted == ["turn[2]/ask_model"]


def test_an_agent_that_may_not(app: Durable, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "THINKING", 0)
    with Harness(app) as t:
        run = app.start(agents.agent, QUESTION)
        t.drain()
        assert run.resume("turn[1]/call_tool", {"approved": False, "by": "Grace"}).accepted
        t.drain()
        assert "Grace has refused the refund" in run.result()
    assert rows(dsn, "select * from agent.refunds") == []


def test_an_agent_on_a_terminal(dsn: str) -> None:
    done = run_example("agent", QUESTION, dsn=dsn, said="y\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("49.00 were given back, approved by you. The customer knows.\n")


# ---------------------------------------------------------------- the file


def loading(dsn: str) -> Durable:
    with psycopg.connect(dsn) as connection:
        connection.execute(etl.TABLES)
    return Durable(dsn, workflows=[etl.load_file, etl.load_row])


def some_lines(folder: Path, every: int) -> Path:
    lines = RULES.read_text(encoding="utf-8").splitlines()
    path = folder / "some.csv"
    path.write_text("\n".join([lines[0], *lines[1::every]]) + "\n", encoding="utf-8")
    return path


def test_the_file_has_what_its_page_says() -> None:
    with RULES.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    wrong = []
    for line in lines:
        try:
            etl.converted(line)
        except ValueError as error:
            wrong.append(str(error))
    assert len(lines) == 2178
    assert len(wrong) == 79
    assert wrong.count("at: 25 is no time of day") == 1


def test_rows_are_loaded_exactly_once_and_bad_ones_reported(dsn: str, tmp_path: Path) -> None:
    """With a worker that dies again and again."""
    path = some_lines(tmp_path, every=15)
    with loading(dsn) as app, Harness(app) as t:
        run = app.start(etl.load_file, str(path))
        for _ in range(10):
            assert t.drain(max_steps=20) == 20
        t.drain()
        report = run.result()
    assert (report.lines, report.loaded) == (146, 140)
    assert set(report.rejected.values()) == {
        "save: -1: a clock that is put back for the winter is nothing that the table can hold"
    }
    with psycopg.connect(dsn) as connection:
        assert counted(connection, path.name) == (140, 140)
    assert dict(rows(dsn, "select line, reason from etl.rejected")) == report.rejected


def test_the_same_file_again_is_the_same_run(dsn: str, tmp_path: Path) -> None:
    path = some_lines(tmp_path, every=15)
    first, again = run_example("etl", str(path), dsn=dsn), run_example("etl", str(path), dsn=dsn)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("146 lines: 140 loaded, 6 rejected; the table has 140 rows\n")
    assert again.stdout == first.stdout


def test_too_many_bad_rows(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    good, bad = "d,1916,only,Jun,14,23s,1,S", "d,1916,only,Sat,14,23s,1,S"
    path.write_text("\n".join(["name,from,to,in,on,at,save,letters", *[good] * 18, bad, bad]), encoding="utf-8")
    with loading(dsn) as app, Harness(app) as t:
        run = app.start(etl.load_file, str(path))
        t.drain()
        with pytest.raises(RunFailed) as failed:
            run.result()
    assert failed.value.error["type"] == "durable.errors.JoinFailed"
    assert rows(dsn, "select * from etl.rejected") == []


@pytest.mark.soak
def test_the_whole_file(dsn: str) -> None:
    with loading(dsn) as app, app.worker():
        report = app.start(etl.load_file, str(RULES)).result(timeout=5 * LIMIT)
    assert (report.lines, report.loaded, len(report.rejected)) == (2178, 2099, 79)
    with psycopg.connect(dsn) as connection:
        assert counted(connection, RULES.name) == (2099, 2099)
