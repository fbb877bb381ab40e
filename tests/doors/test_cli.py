"""Each command: what it does, what it prints, how it exits."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from tests.doors import cli_flows
from tests.doors.cli_kit import FLOWS, Cli, process_of_its_own

from durable import AsyncDurable, Durable, migrate
from durable.cli import COMMANDS


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with process_of_its_own(monkeypatch):
        yield


@pytest.fixture
def cli(module_dsn: str, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(module_dsn, capsys)


def work(dsn: str) -> None:
    """Execute what there is, but not those that never end."""
    flows = [cli_flows.hello, cli_flows.failing, cli_flows.asking]
    with Durable(dsn, workflows=flows) as app:
        app.run_worker(until_idle=True)


# ---------------------------------------------------------------- from start to end


def test_a_run_from_start_to_history(cli: Cli) -> None:
    run = cli.start("hello", '{"name": "Ada"}', "--key", "k-1", "--tag", "tenant=acme", "--tag", "n:=3")
    assert cli.start("hello", '{"name": "Ada"}', "--key", "k-1") == run
    pending = cli("status", run).one
    assert (pending["id"], pending["status"], pending["tags"]) == (run, "pending", {"n": 3, "tenant": "acme"})

    work(cli.dsn)

    status = cli("status", run)
    assert status.code == 0
    assert status.one["status"] == status.one["state"] == "completed"
    assert status.one["results"] == {"greet": "hello Ada"}
    assert status.one["steps"][0]["step_id"] == "greet"
    kinds = [event["kind"] for event in cli("history", run).lines]
    assert kinds == ["created", "started", "attempt_started", "attempt_succeeded", "completed"]


def test_start_and_wait(cli: Cli) -> None:
    """Waiting for a run that has ended already, as a repeated start with a key does."""
    words = ("hello", '{"name": "Bo", "times": 2}', "--key", "waited", "--import", FLOWS)
    assert cli("start", *words).code == 0
    work(cli.dsn)
    said = cli("start", *words, "--wait")
    assert said.code == 0
    assert said.one["result"] == {"greet": "hello Bo hello Bo"}
    assert said.one["status"] == "completed"


def test_waiting_for_a_run_that_fails_exits_1_and_says_why(cli: Cli) -> None:
    run = cli.start("failing", "--key", "fails")
    work(cli.dsn)
    said = cli("start", "failing", "--key", "fails", "--import", FLOWS, "--wait")
    assert said.code == 1
    assert said.one["error"]["message"] == "not \x1b[31mtoday"
    assert "not \\x1b[31mtoday" in said.err, "no terminal may obey what a run says"
    assert cli("status", run, "--wait").code == 1
    assert cli("status", run).code == 0


def test_a_run_that_is_still_going_exits_3(cli: Cli) -> None:
    run = cli.start("asking")
    said = cli("status", run, "--wait-timeout", "0")
    assert said.code == 3
    assert said.one["status"] == "pending"
    assert run in said.err
    assert cli("start", "asking", "--import", FLOWS, "--wait-timeout", "10ms").code == 3


def test_input_comes_from_a_file_or_standard_input(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "input.json"
    file.write_text('{"name": "file"}', encoding="utf-8")
    run = cli.start("hello", f"@{file}")
    assert cli("status", run).one["input"] == {"name": "file", "times": 1}
    with file.open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run = cli.start("hello", "-")
    assert cli("status", run).one["input"]["name"] == "file"


def test_options_of_start_reach_the_run(cli: Cli) -> None:
    id_ = str(uuid.uuid4())
    assert cli.start("hello", '{"name": "a"}', "--id", id_, "--delay", "1h30m", "--timeout", "1d", "--priority", "3",
                     "--version", "1") == id_  # fmt: skip
    found = cli("status", id_).one
    assert (found["state"], found["priority"]) == ("delayed", 3)
    assert found["deadline"] is not None


def test_an_app_brings_its_workflows(cli: Cli) -> None:
    run = cli("start", "hello", '{"name": "a"}', "--app", f"{FLOWS}:app").one["id"]
    assert cli("status", run, "--app", f"{FLOWS}:sync_app").one["total_steps"] == 1


# ---------------------------------------------------------------- lists


def test_list_filters_and_pages(cli: Cli) -> None:
    tag = uuid.uuid4().hex
    runs = [cli.start("hello", '{"name": "a"}', "--tag", f"t={tag}", "--key", f"{tag}-{i}") for i in range(3)]
    runs.append(cli.start("asking", "--tag", f"t={tag}"))

    def listed(*words: str) -> list[str]:
        return [run["id"] for run in cli("list", "--tag", f"t={tag}", *words).lines]

    assert listed() == runs[::-1]
    assert listed("--workflow", "asking") == [runs[3]]
    assert listed("--key", f"{tag}-1") == [runs[1]]
    assert listed("--status", "completed") == []
    assert listed("--status", "pending", "--status", "failed", "--version", "1") == runs[::-1]
    assert listed("--parent", runs[0]) == []
    first = cli("list", "--tag", f"t={tag}", "--limit", "3")
    assert len(first.lines) == 3
    after = first.err.split("--after ")[1].strip()
    assert listed("--after", after) == [runs[0]]


def test_list_knows_what_parked_runs_do_by_either_spelling(cli: Cli) -> None:
    run = cli.start("asking")
    work(cli.dsn)
    for spelling in ("waiting-for-signal", "waiting_for_signal"):
        assert run in [one["id"] for one in cli("list", "--status", spelling).lines]


# ---------------------------------------------------------------- telling runs what to do


def test_signal(cli: Cli) -> None:
    run = cli.start("asking")
    said = cli("signal", run, "answer", "-42", "--id", "once")
    assert (said.code, said.one) == (0, {"run": run, "signal": "answer"})
    assert cli("signal", run, "answer", "-42", "--id", "once").code == 0
    work(cli.dsn)
    assert cli("status", run).one["results"] == {"answer": -42}
    late = cli("signal", run, "answer", "1")
    assert late.code == 1
    assert "completed" in late.err


def test_resume_is_strict(cli: Cli) -> None:
    run = cli.start("asking")
    work(cli.dsn)
    wrong = cli("resume", run, "other", "1")
    assert wrong.code == 1
    assert "waiting for signal 'answer'" in wrong.err
    assert cli("resume", run, "answer", '"no number"', "--import", FLOWS).code == 2
    assert cli("resume", run, "answer", "7").code == 0
    assert cli("resume", run, "answer", "7").code == 1
    work(cli.dsn)
    assert cli("status", run).one["results"] == {"answer": 7}


def test_pause_resume_cancel_retry(cli: Cli) -> None:
    run = cli.start("asking")
    assert cli("resume", run).code == 1
    assert cli("pause", run).code == 0
    assert cli("status", run).one["status"] == "paused"
    assert cli("pause", run).code == 1
    assert cli("resume", run).code == 0
    assert cli("cancel", run, "--reason", "no more", "--compensate").code == 0
    assert cli("status", run).one["reason"] == "no more"
    again = cli("cancel", run)
    assert again.code == 1
    assert "canceled" in again.err
    refused = cli("retry", run)
    assert refused.code == 1
    failed = cli.start("failing")
    work(cli.dsn)
    assert cli("retry", failed).code == 0
    assert cli("status", failed).one["status"] == "running"


def test_recover_and_purge(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(dsn, capsys)
    run = cli.start("failing")
    assert cli("recover").one == {"recovered": 0}
    work(dsn)
    assert cli("purge", "--older-than", "30d").one == {"purged": 0}
    assert cli("purge", "--older-than", "0").one == {"purged": 1}
    assert cli("status", run).code == 1


# ---------------------------------------------------------------- tables


def test_tables(cli: Cli) -> None:
    run = cli.start("failing", '{"a": "[bold]b"}', "--key", "table", "--tag", "t=table")
    assert (
        cli("start", "failing", '{"a": "[bold]b"}', "--key", "table", "--import", FLOWS, "-o", "table").out
        == f"{run}\n"
    )
    work(cli.dsn)
    for command in ("list", "status", "history"):
        words = (run,) if command != "list" else ("--tag", "t=table")
        said = cli(command, *words, "-o", "table")
        assert said.code == 0
        assert "failed" in said.out
        assert "\x1b" not in said.out
    assert "[bold]b" in cli("status", run, "-o", "table").out
    assert "not \\x1b[31mtoday" in cli("status", run, "-o", "table").out
    assert cli("list", "--tag", "t=no such", "-o", "table").out.strip() == "no runs"
    assert "nothing to do" in cli("migrate", "-o", "table").out
    assert cli("recover", "-o", "table").out == "0 runs were put back\n"


# ---------------------------------------------------------------- the database


def test_migrate(empty_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(empty_dsn, capsys)
    missing = cli("list")
    assert missing.code == 1
    assert "durable migrate" in missing.err
    check = cli("migrate", "--check")
    assert check.code == 1
    assert f"revision {migrate.HEAD}" in check.one["missing"]
    assert cli("migrate").code == 0
    assert cli("migrate", "--check").code == 0
    assert cli("migrate").one["applied"] == []
    assert cli("list").code == 0
    assert cli("migrate", "--schema", "other").code == 0
    assert cli("list", "--schema", "other").lines == []
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("update durable.alembic_version set version_num = '9999'")
    newer = cli("migrate")
    assert newer.code == 1
    assert "9999" in newer.err


def test_migrate_as_sql_needs_no_database(cli: Cli) -> None:
    said = cli.plain("migrate", "--sql")
    assert said.code == 0
    assert "create table" in said.out.lower()


# ---------------------------------------------------------------- mistakes

RUN = "00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (("start", "nothing", "--import", FLOWS), 2, "known workflows: asking, endless, failing, hello, logging"),
        (("start", "hello"), 2, "--import"),
        (("start", "hello", "{}", "--import", FLOWS), 2, "name"),
        (("start", "hello", '{"name": 1}', "--import", FLOWS), 2, "input of workflow 'hello'"),
        (("start", "hello", "Ada", "--import", FLOWS), 2, "a string needs quotes"),
        (("start", "hello", '{"name": "Ada",}', "--import", FLOWS), 2, "line 1, column"),
        (("start", "hello", '{"name": NaN}', "--import", FLOWS), 2, "NaN"),
        (("start", "hello", '{"name": "\\u0000"}', "--import", FLOWS), 2, "name"),
        (("start", "hello", '{"name": "\\ud800"}', "--import", FLOWS), 2, "name"),
        (("start", "failing", "[" * 100_000, "--import", FLOWS), 2, "not JSON"),
        (("start", "failing", "123456789012345678901234567890", "--import", FLOWS), 2, "bit"),
        (("start", "hello", "@/does/not/exist", "--import", FLOWS), 2, "cannot read /does/not/exist"),
        (("start", "hello", '{"name": "a"}', "--import", "no.such.module"), 2, "no.such.module"),
        (("start", "hello", '{"name": "a"}', "--import", "json"), 2, "no workflow at its top level"),
        (("start", "hello", '{"name": "a"}', "--import", FLOWS, "--version", "9"), 2, "known versions of it: 1"),
        (("start", "hello", '{"name": "a"}', "--import", FLOWS, "--delay", "soon"), 2, "30d"),
        (("start", "hello", '{"name": "a"}', "--import", FLOWS, "--delay", "9" * 30 + "d"), 2, "--delay"),
        (("start", "hello", '{"name": "a"}', "--import", FLOWS, "--tag", "novalue"), 2, "NAME=VALUE"),
        (("start", "hello", '{"name": "a"}', "--import", FLOWS, "--id", "x"), 2, "UUID"),
        (("start", "hello", '{"name": "a"}', "--app", f"{FLOWS}:nothing"), 2, "nothing"),
        (("start", "hello", '{"name": "a"}', "--app", f"{FLOWS}:no_app"), 2, "is a str"),
        (("start", "hello", '{"name": "a"}', "--app", FLOWS), 2, "MODULE:NAME"),
        (("start", "hello", '{"name": "a"}', "--app", "no.such:app"), 2, "cannot import"),
        (("status", RUN), 1, "there is no run"),
        (("status", "x"), 1, "there is no run 'x'"),
        (("history", RUN), 1, "there is no run"),
        (("signal", RUN, "a"), 1, "there is no run"),
        (("signal", RUN, "a", "{"), 2, "not JSON"),
        (("resume", RUN, "a"), 1, "there is no run"),
        (("pause", RUN), 1, "there is no run"),
        (("cancel", RUN), 1, "there is no run"),
        (("retry", RUN), 1, "there is no run"),
        (("list", "--status", "sleepy"), 2, "sleeping"),
        (("list", "--limit", "0"), 2, "at least 1"),
        (("list", "--after", "nonsense"), 2, "after"),
        (("list", "--parent", "x"), 1, "there is no run 'x'"),
        (("list", "--schema", "No Schema"), 2, "schema"),
        (("list", "--nonsense"), 2, "--nonsense"),
        (("list", "-o", "xml"), 2, "xml"),
        (("purge",), 2, "older-than"),
        (("purge", "--older-than", "x"), 2, "30d"),
        (("migrate", "--check", "--sql"), 2, "exclude"),
        (("demo", "--orders", "0"), 2, "--orders"),
        (("worker",), 2, "no workflow is registered"),
        (("worker", f"{FLOWS}:empty_app"), 2, "no workflow is registered"),
        (("worker", "--import", FLOWS, "--concurrency", "0"), 2, "at least 1"),
        (("worker", "--import", FLOWS, "--grace", "x"), 2, "--grace"),
        (("worker", f"{FLOWS}:app", "--schema", "other"), 2, "--schema"),
        (("worker", f"{FLOWS}:app", "--app", f"{FLOWS}:app"), 2, "name one"),
        (("nonsense",), 2, "nonsense"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(cli: Cli, words: tuple[str, ...], code: int, what: str) -> None:
    said = cli(*words)
    assert (said.code, said.out) == (code, ""), said.err
    assert what in said.err
    assert said.err.startswith("durable: ")
    assert "Traceback" not in said.err
    assert len(said.err) < 1000


def test_a_used_key_with_another_input_is_refused(cli: Cli) -> None:
    cli.start("hello", '{"name": "a"}', "--key", "used")
    said = cli("start", "hello", '{"name": "b"}', "--key", "used", "--import", FLOWS)
    assert said.code == 1
    assert "'used' is taken" in said.err


def test_20_mb_are_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_text(json.dumps("x" * 20_000_000), encoding="utf-8")
    said = cli("start", "failing", f"@{file}", "--import", FLOWS)
    assert said.code == 2
    assert len(said.err) < 1000


@pytest.mark.parametrize(
    ("dsn", "code"), [("mysql://a@b/c", 2), ("host=/nowhere user=x password=secret", 2), ("nonsense", 2)]
)
def test_a_wrong_dsn_is_one_line_without_its_password(capsys: pytest.CaptureFixture[str], dsn: str, code: int) -> None:
    said = Cli(dsn, capsys)("list")
    assert said.code == code
    assert "secret" not in said.err
    assert "Traceback" not in said.err


def test_a_dsn_is_never_ignored(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that names its own database would execute the runs of another one than was asked for."""
    monkeypatch.setattr(cli_flows, "app", AsyncDurable(cli.dsn, workflows=[cli_flows.hello]))
    said = cli("status", RUN, "--app", f"{FLOWS}:app")
    assert said.code == 2
    assert "--dsn is not for" in said.err
    assert cli.plain("status", RUN, "--app", f"{FLOWS}:app").code == 1


# ---------------------------------------------------------------- fork and watch


def test_fork_goes_on_from_a_step(cli: Cli) -> None:
    run = cli.start("hello", '{"name": "Ada"}')
    work(cli.dsn)
    said = cli("fork", run, "--from", "greet", "--input", '{"name": "Bo"}', "--import", FLOWS)
    assert said.code == 0, said.err
    fork = said.one["id"]
    assert said.one["forked_from"] == run
    work(cli.dsn)
    assert cli("status", fork).one["results"] == {"greet": "hello Bo"}
    assert cli("status", fork).one["forked_from"] == run
    assert f"forked from  {run}" in cli("status", fork, "-o", "table").out
    assert cli("status", run).one["results"] == {"greet": "hello Ada"}
    table = cli("fork", run, "-o", "table")
    assert uuid.UUID(table.out.strip()) not in (uuid.UUID(run), uuid.UUID(fork))


def test_fork_says_what_is_wrong(cli: Cli) -> None:
    run = cli.start("hello", '{"name": "Ada"}')
    work(cli.dsn)
    for words, code, why in (
        ((run, "--from", "nothing"), 2, "'greet'"),
        ((run, "--input", "{", "--import", FLOWS), 2, "not JSON"),
        ((run, "--input", "{}", "--import", FLOWS), 2, "the input of workflow 'hello'"),
        ((str(uuid.uuid4()),), 1, "there is no run"),
    ):
        said = cli("fork", *words)
        assert (said.code, said.out) == (code, "")
        assert why in said.err


def test_watch_shows_the_run_until_it_has_ended(cli: Cli) -> None:
    done, failed = cli.start("hello", '{"name": "Ada"}'), cli.start("failing")
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work, cli.dsn)
        said = cli("watch", done)
        working.result()
    assert said.code == 0
    assert said.lines[-1]["results"] == {"greet": "hello Ada"}
    assert {line["id"] for line in said.lines} == {done}
    assert cli("watch", failed).code == 1
    table = cli("watch", done, "-o", "table")
    assert table.code == 0
    assert done in table.out
    assert "completed" in table.out
    assert cli("watch", str(uuid.uuid4())).code == 1


# ---------------------------------------------------------------- help


def test_help_names_every_command(cli: Cli) -> None:
    said = cli.plain("--help")
    assert said.code == 0
    for _, name, _, _ in COMMANDS:
        assert f" {name} " in said.out
        assert cli.plain(name, "--help").code == 0


def test_version(cli: Cli) -> None:
    assert cli.plain("--version").out.strip() == "0.1.0"
