"""Stored runs against today's code: the golden set, `durable replay`, `durable.testing.replay`."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.doors.cli_kit import Cli, process_of_its_own
from tests.doors.facts import unchanged
from tests.golden.workflows import WORKFLOWS, note, number, refuse

from durable import (
    AsyncDurable,
    ConfigurationError,
    Context,
    DefinitionError,
    Durable,
    HistoryDiverged,
    Retry,
    StepFailed,
    WorkflowNotRegistered,
    define,
    workflow,
)
from durable.core.state import EntryKind
from durable.define.registry import Registry
from durable.engine.guard import Guard
from durable.replaying import Fit, Recording, Verdict, read_recordings, replayed, stored, to_line
from durable.testing import Harness, replay
from durable.values import WaitingFor

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.jsonl"))
CAUGHT, BUILT, STEPS, RENEWED = (
    GOLDEN[0].with_name(f"{name}.jsonl") for name in ("caught", "built", "steps", "renewed")
)

Body = Callable[[Context], Awaitable[Any]]


# ---------------------------------------------------------------- the golden set


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_recorded_runs_go_on_with_the_code_of_today(path: Path) -> None:
    assert replay(WORKFLOWS, path) == len(path.read_text().splitlines())


def test_the_golden_set_has_entries_of_all_kinds_and_runs_at_all_kinds_of_waits() -> None:
    recordings = [recording for path in GOLDEN for recording in read_recordings(path)]
    assert {e.kind for recording in recordings for e in recording.journal.values()} == set(EntryKind)
    waits = {WaitingFor.RETRY, WaitingFor.SLEEP, WaitingFor.SIGNAL, WaitingFor.RESUME}
    assert {recording.run.waiting_for for recording in recordings} == {None, *waits}
    pruned = next(r for r in recordings if r.run.workflow == "loops" and r.run.status.ended)
    assert "count[37]" in pruned.journal
    assert "count[3]" not in pruned.journal
    assert {workflow.name for workflow in WORKFLOWS} == {path.stem for path in GOLDEN}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_recording_comes_back_as_it_was_written(path: Path) -> None:
    assert [to_line(recording) for recording in read_recordings(path)] == path.read_text().splitlines()


# ---------------------------------------------------------------- changed code


async def came_to_nothing(ctx: Context) -> Any:
    return None


async def other_name(ctx: Context) -> Any:
    await ctx.try_step(refuse, "it", name="reject")
    return await ctx.step(note, "critical")


async def other_kind(ctx: Context) -> Any:
    await ctx.sleep(5, name="refuse")


async def one_more(ctx: Context) -> Any:
    try:
        await ctx.step(refuse, "it")
    except StepFailed as error:
        await ctx.step(note, error.kind)
    await ctx.step(note, "more", name="more")


async def raising(ctx: Context) -> Any:
    try:
        await ctx.step(refuse, "it")
    except StepFailed as error:
        await ctx.step(note, error.kind)
    raise ValueError("not today")


async def raising_early(ctx: Context) -> Any:
    await ctx.try_step(refuse, "it")
    raise ValueError("too early")


async def other_type(ctx: Context) -> Any:
    async def counted(what: str) -> int:
        return 1

    await ctx.try_step(refuse, "it")
    await ctx.step(counted, "critical", name="note")


@pytest.mark.parametrize(
    ("body", "expected", "found"),
    [
        (came_to_nothing, "step 'refuse', step 'note'", "its end"),
        (other_name, "step 'refuse', step 'note'", "step 'reject' (at "),
        (other_kind, "step 'refuse'", "sleep 'refuse'"),
        (one_more, "the end of the run, with a result", "step 'more' (at "),
        (raising, "the end of the run, with a result", "its end, by ValueError: not today"),
        (raising_early, "step 'note'", "its end, by ValueError: too early"),
        (other_type, "the result of step 'note'", "a type that it is not of"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_differs_is_told(body: Any, expected: str, found: str) -> None:
    (verdict,) = verdicts(CAUGHT, workflow(name="caught")(body))
    assert verdict.fit is Fit.DIVERGED
    assert verdict.expected is not None
    assert expected in verdict.expected
    assert verdict.found is not None
    assert found in verdict.found
    with pytest.raises(HistoryDiverged, match="caught") as raised:
        replay([workflow(name="caught")(body)], CAUGHT)
    assert expected in str(raised.value)
    assert found in str(raised.value)


def test_code_after_the_end_of_an_old_run_may_be_new_if_it_is_patched() -> None:
    async def patched_end(ctx: Context) -> Any:
        try:
            await ctx.step(refuse, "it")
        except StepFailed as error:
            await ctx.step(note, error.kind)
        if ctx.patched("more"):
            await ctx.step(note, "more", name="more")

    (verdict,) = verdicts(CAUGHT, workflow(name="caught")(patched_end))
    assert verdict.fit is Fit.OK


def test_a_run_that_was_continued_must_be_continued() -> None:
    async def stays(ctx: Context, left: int) -> int:
        await ctx.step(note, left)
        return left

    found = verdicts(RENEWED, workflow(name="renewed")(stays))
    assert [verdict.fit for verdict in found] == [Fit.OK, Fit.DIVERGED, Fit.DIVERGED]  # the newest first
    assert {verdict.expected for verdict in found[1:]} == {"the end of the run, continued as new"}


def test_a_run_in_the_middle_may_go_on_with_new_code_from_where_it_is() -> None:
    """It is compared with what it has passed and begun, not with what was to come."""

    async def shorter(ctx: Context, order: dict[str, Any]) -> None:
        await ctx.step(note, "once", name="charge")

    fits = [verdict.fit for verdict in verdicts(STEPS, workflow(name="steps")(shorter))]
    assert fits == [Fit.OK, *[Fit.DIVERGED] * 4]  # the first waits for the second attempt at that step


def test_builder_runs_are_compared_by_their_nodes() -> None:
    changed = define("built", input=int).step("one", number).step("and", number)
    found = verdicts(BUILT, changed)
    assert [verdict.fit for verdict in found] == [Fit.DIVERGED] * 2
    assert found[0].expected is not None
    assert found[0].expected.startswith("one (step), two (parallel), three (loop), either (route)")
    assert found[0].found == "one (step), and (step)"


@pytest.mark.parametrize("kind", ["foreign", "spinning"])
def test_code_that_breaks_a_rule_is_a_fault(kind: str) -> None:
    async def foreign(ctx: Context) -> None:
        await asyncio.sleep(0)

    async def spinning(ctx: Context) -> None:
        while True:
            pass

    changed = workflow(name="caught")({"foreign": foreign, "spinning": spinning}[kind])
    (verdict,) = verdicts(CAUGHT, changed)
    assert verdict.fit is Fit.FAULT
    assert verdict.failure is not None
    assert verdict.failure.type == "durable.errors.DefinitionError"
    with pytest.raises(DefinitionError, match=r"only ctx\.\* may be awaited|without awaiting"):
        replay([changed], CAUGHT)


def test_nothing_is_executed_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def body(ctx: Context) -> Any:
        ctx.logger.warning("begun")
        try:
            await ctx.step(forbidden, name="refuse")
        except StepFailed:
            await ctx.step(forbidden, name="note")
        ctx.logger.warning("ended")

    (verdict,) = verdicts(CAUGHT, workflow(name="caught")(body))
    assert verdict.fit is Fit.OK
    assert caplog.records == []


async def forbidden(*given: Any) -> Any:
    pytest.fail("a handler was executed")


# ---------------------------------------------------------------- durable.testing.replay


def test_all_that_does_not_fit_is_in_the_error() -> None:
    with pytest.raises(HistoryDiverged) as raised:
        replay([workflow(name="renewed")(came_to_nothing)], RENEWED)
    assert len(raised.value.__notes__) == 2
    assert all("the code came to its end" in note for note in raised.value.__notes__)


def test_an_app_will_do() -> None:
    assert replay(Durable(workflows=WORKFLOWS), CAUGHT) == 1
    assert replay(AsyncDurable(workflows=WORKFLOWS), CAUGHT) == 1


def test_what_is_not_replayed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkflowNotRegistered, match="caught"):
        replay([], CAUGHT)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match="no recordings"):
        replay(WORKFLOWS, tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        replay(WORKFLOWS, tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no recording"),
        ("[]", "no recording"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "run": {}, "journal": []}', "no recording"),
    ],
)
def test_a_damaged_file_says_where(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{CAUGHT.read_text()}{line}\n")
    with pytest.raises(ConfigurationError, match=rf"runs\.jsonl:2: .*{why}"):
        replay(WORKFLOWS, path)


# ---------------------------------------------------------------- the command line


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with process_of_its_own(monkeypatch):
        yield


@pytest.fixture
def cli(dsn: str, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(dsn, capsys)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """An app of these workflows; where it is to be found."""

    def deploy(*workflows: Any) -> str:
        module = types.ModuleType("code_of_today")
        module.__dict__["app"] = AsyncDurable(workflows=workflows)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:app"

    return deploy


@workflow
async def greeting(ctx: Context, name: str) -> str:
    greeted = await ctx.step(note, name, name="greet")
    await ctx.wait_for_signal("goodbye")
    return f"hello {greeted}"


async def changed_greeting(ctx: Context, name: str) -> str:
    await ctx.step(forbidden, name="welcome")
    return name


def ran(dsn: str, *names: str) -> list[str]:
    """Runs of `greeting`; the first one has ended. Their ids."""
    with Durable(dsn, workflows=[greeting]) as app, Harness(app) as t:
        runs = [app.start(greeting, name) for name in names]
        runs[0].signal("goodbye")
        t.drain()
        return [str(run.id) for run in runs]


def test_runs_that_fit(cli: Cli, code: Callable[..., str]) -> None:
    runs = ran(cli.dsn, "Ada", "Bob")
    with unchanged(cli.dsn):
        said = cli("replay", code(greeting))
    assert said.code == 0
    assert [(line["id"], line["status"], line["verdict"]) for line in said.lines] == [
        (runs[1], "suspended", "ok"),
        (runs[0], "completed", "ok"),
    ]
    assert "2 runs replayed: 2 fit" in said.err
    quiet = cli("replay", code(greeting), "-o", "table")
    assert (quiet.code, quiet.out) == (0, "")


def test_runs_that_do_not_fit(cli: Cli, code: Callable[..., str]) -> None:
    (run,) = ran(cli.dsn, "Ada\x1b[31m")
    changed = code(workflow(name="greeting")(changed_greeting))
    with unchanged(cli.dsn):
        said = cli("replay", changed)
    assert said.code == 1
    assert (said.one["id"], said.one["verdict"]) == (run, "diverged")
    assert said.one["expected"] == "step 'greet', signal 'goodbye'"
    assert said.one["found"].startswith("step 'welcome' (at ")
    told = cli("replay", changed, "-o", "table")
    assert told.code == 1
    assert told.out.splitlines()[:2] == [
        f"{run}  greeting 1, completed: diverged",
        "  - step 'greet', signal 'goodbye'",
    ]
    assert "1 runs replayed: 1 diverged" in told.err


def test_a_fault_is_told(cli: Cli, code: Callable[..., str]) -> None:
    async def foreign(ctx: Context, name: str) -> None:
        await asyncio.sleep(0)

    ran(cli.dsn, "Ada")
    said = cli("replay", code(workflow(name="greeting")(foreign)), "-o", "table")
    assert said.code == 1
    assert "completed: fault" in said.out
    assert "only ctx.* may be awaited" in said.out


def test_which_runs(cli: Cli, code: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Page by page; those of workflows that are not known are none of its business."""
    monkeypatch.setattr("durable.replaying.database.PAGE", 2)
    runs = ran(cli.dsn, "Ada", "Bob", "Eve", "Ian", "Kim")
    place = code(greeting, define("other").step("greet", number))
    assert [line["id"] for line in cli("replay", place).lines] == runs[::-1]
    assert [line["id"] for line in cli("replay", place, "--limit", "3").lines] == runs[:1:-1]
    assert [line["id"] for line in cli("replay", place, "--status", "completed").lines] == runs[:1]
    assert len(cli("replay", place, "--status", "waiting-for-signal", "--workflow", "greeting").lines) == 4
    assert cli("replay", place, "--workflow", "other").lines == []
    assert cli("replay", code(define("other").step("greet", number))).lines == []


def test_a_version_that_is_not_known_is_told(cli: Cli, code: Callable[..., str]) -> None:
    ran(cli.dsn, "Ada")
    said = cli("replay", code(workflow(name="greeting", version="2")(changed_greeting)))
    assert (said.code, said.one["verdict"]) == (0, "unknown")
    assert "1 of an unknown version" in said.err


def test_exported_runs_are_replayed_without_a_database(cli: Cli, code: Callable[..., str], tmp_path: Path) -> None:
    ran(cli.dsn, "Ada", "Bob")
    path = tmp_path / "runs.jsonl"
    assert cli("replay", code(greeting), "--export", str(path)).code == 0
    assert [json.loads(line)["run"]["input"] for line in path.read_text().splitlines()] == ["Bob", "Ada"]
    assert [line["verdict"] for line in cli.plain("replay", code(greeting), "--from", str(path)).lines] == ["ok"] * 2
    changed = workflow(name="greeting")(changed_greeting)
    said = cli.plain("replay", code(changed), "--from", str(path))
    assert (said.code, len(said.lines)) == (1, 2)
    assert replay([greeting], path) == 2
    with pytest.raises(HistoryDiverged, match="welcome"):
        replay([changed], path)


def test_an_export_is_plain_whatever_codec_there_is(dsn: str, tmp_path: Path) -> None:
    class Turned:
        def encode(self, plain: bytes) -> bytes:
            return plain[::-1]

        decode = encode

    with Durable(dsn, workflows=[greeting], codec=Turned()) as app, Harness(app) as t:
        app.start(greeting, "Ada", key="17", tags={"tenant": "acme"})
        t.drain()
    recording = asyncio.run(first_recording(dsn, Turned()))
    told = to_line(recording)
    assert json.loads(told)["run"]["input"] == "Ada"
    assert "acme" not in told
    assert '"17"' not in told


async def first_recording(dsn: str, codec: Any) -> Recording:
    async with AsyncDurable(dsn, workflows=[greeting], codec=codec) as app:
        await app.connect()
        async for recording in stored(app.store, app.pool, app.registry):
            return recording
    raise AssertionError("there is no run")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("replay",), "no workflow is known"),
        (("replay", "--from", "x"), "no workflow is known"),
        (("replay", "{place}", "--limit", "0"), "at least 1"),
        (("replay", "{place}", "--workflow", "nothing"), "nothing"),
        (("replay", "{place}", "--status", "asleep"), "unknown status"),
        (("replay", "{place}", "--app", "{place}"), "name one"),
        (("replay", "{place}", "--from", "x", "--limit", "1"), "--from replays all"),
        (("replay", "{place}", "--from", "no/such.jsonl"), "cannot read"),
        (("replay", "{place}", "--export", "no/such/folder.jsonl"), "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage(cli: Cli, code: Callable[..., str], words: tuple[str, ...], why: str) -> None:
    given = [word.format(place=code(greeting)) for word in words]
    said = cli.plain(*given) if "--from" in words else cli(*given)
    assert (said.code, said.out) == (2, "")
    assert why in said.err


# ---------------------------------------------------------------- runs at odd places


@pytest.mark.parametrize(("step", "status"), [("both/a/note", "running"), ("undo:note", "compensating")])
def test_a_run_whose_worker_has_died(dsn: str, step: str, status: str) -> None:
    rolled_back = next(w for w in WORKFLOWS if w.name == "rolled_back")
    with Durable(dsn, workflows=WORKFLOWS) as app, Harness(app) as t:
        run = app.start(rolled_back)
        t.crash_at(step)
        t.drain()
        (verdict,) = asyncio.run(of_database(dsn))
        assert (verdict.fit, verdict.run.status, verdict.run.id) == (Fit.OK, status, run.id)
        t.drain()


@pytest.mark.parametrize(("first", "fit"), [("one", Fit.OK), ("other", Fit.DIVERGED)])
def test_a_block_that_is_tried_again_is_looked_into(dsn: str, first: str, fit: Fit) -> None:
    """Although the engine does not, before its time has come."""

    def made(name: str) -> Any:
        async def around(c: Context) -> None:
            await c.step(note, 1, name=name)
            await c.step(failing, retry=1)

        @workflow(name="trying")
        async def trying(ctx: Context) -> None:
            await ctx.block("around", around, retry=Retry(initial=60))

        return trying

    async def failing() -> None:
        raise ConnectionError

    with Durable(dsn, workflows=[made("one")]) as app, Harness(app) as t:
        run = app.start("trying")
        t.drain()
        assert run.status().derived == "retrying"
    (verdict,) = asyncio.run(of_database(dsn, made(first)))
    assert verdict.fit is fit


def test_a_run_that_has_failed_by_a_fault_is_as_it_was(dsn: str) -> None:
    async def faulty(ctx: Context) -> None:
        await ctx.step(note, 1)
        await asyncio.sleep(0)

    with Durable(dsn, workflows=[made := workflow(name="caught")(faulty)]) as app, Harness(app) as t:
        app.start(made)
        t.drain()
    (verdict,) = asyncio.run(of_database(dsn, made))
    assert verdict.fit is Fit.OK


async def of_database(dsn: str, *workflows: Any) -> list[Verdict]:
    async with AsyncDurable(dsn, workflows=workflows or WORKFLOWS) as app:
        await app.connect()
        return [replayed(recording, app.registry) async for recording in stored(app.store, app.pool, app.registry)]


def verdicts(path: Path, *workflows: Any) -> list[Verdict]:
    """What becomes of the runs of a file."""
    registry, guard = Registry(), Guard()
    for each in workflows:
        registry.add(each)
    try:
        return [replayed(recording, registry, guard) for recording in read_recordings(path)]
    finally:
        guard.close()
