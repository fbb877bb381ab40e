"""What `durable.testing` offers to the tests of others: fixtures, crashes at a step, asserts on history."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.conftest import Base

from durable import AsyncDurable, Context, Durable, NonRetryable, Rollback, StepContext, define, workflow
from durable.snapshots import HistoryEvent
from durable.testing import AsyncHarness, Harness, History, assert_history

# ---------------------------------------------------------------- fixtures


SUITE = """
import os
from pathlib import Path
import pytest
from durable import Context, Durable, workflow
from durable.testing import AsyncHarness, Harness, assert_history

def double(number: int) -> int:
    return 2 * number

@workflow
async def doubling(ctx: Context, number: int) -> int:
    await ctx.sleep(60)
    return await ctx.step(double, number)

@pytest.fixture
def durable_workflows():
    return [doubling]

seen = set()

def test_sync(durable_app, durable_harness, durable_database):
    run = durable_app.start(doubling, 21)
    durable_harness.drain()
    durable_harness.skip(minutes=1)
    durable_harness.drain()
    assert run.result() == 42
    assert_history(durable_harness.history(run), [..., "completed"])
    assert durable_app.list().items[0].id == run.id
    seen.add(durable_database)
    Path("pid").write_text(str(os.getpid()))

async def test_async(async_durable_app, async_durable_harness, durable_database):
    run = await async_durable_app.start(doubling, 4)
    await async_durable_harness.drain()
    await async_durable_harness.skip(minutes=1)
    await async_durable_harness.drain()
    assert await run.result() == 8
    assert (await async_durable_harness.history(run)).steps == ["double"]
    assert len((await async_durable_app.list()).items) == 1, "a database of its own"
    assert durable_database not in seen

def test_registers_more(durable_app):
    @durable_app.workflow
    async def other(ctx: Context) -> None: ...

    assert set(durable_app.workflows) == {"doubling", "other"}
"""

UNUSED = """
import sys

def test_nothing(durable_workflows):
    assert durable_workflows == []
    heavy = ("durable.engine", "durable.postgres", "psycopg", "procrastinate", "sqlalchemy")
    assert not [name for name in sys.modules if name.startswith(heavy)]
"""


def run_pytest(folder: Path, suite: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A suite in a process of its own, with the plugin as if it was installed."""
    (folder / "test_suite.py").write_text(suite)
    ini = "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    (folder / "pytest.ini").write_text(ini)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DURABLE_", "PYTEST_"))}
    plugins = ("-p", "durable.testing.plugin", "-p", "pytest_asyncio.plugin", "-p", "xdist.plugin")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options],
        cwd=folder,
        env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_the_fixtures_on_a_server_that_is_there(tmp_path: Path, base: Base, mode: str) -> None:
    suite = SUITE.replace("async def test", "@pytest.mark.asyncio\nasync def test") if mode == "strict" else SUITE
    done = run_pytest(tmp_path, suite, f"--asyncio-mode={mode}", DURABLE_TEST_DSN=base.dsn)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    pid = (tmp_path / "pid").read_text()
    with psycopg.connect(base.dsn) as connection:
        left = connection.execute("select datname from pg_database where datname ~ %s", [f"^durable_.*_{pid}(_|$)"])
        assert left.fetchall() == []


def test_the_fixtures_start_a_server_which_the_processes_of_xdist_share(server_root: Path) -> None:
    done = run_pytest(server_root, SUITE, "--asyncio-mode=auto", "-n2", f"--basetemp={server_root / 'base'}")
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert not list(server_root.glob("**/postmaster.pid"))


def test_who_uses_none_of_them_pays_nothing(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, UNUSED)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_plugin_is_declared() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\ndurable = "durable.testing.plugin"' in text
    assert metadata.version("durable")


# ---------------------------------------------------------------- crash_at


class Hands:
    """What handlers did."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def do(self, what: str) -> str:
        self.log.append(what)
        return what

    async def fail_once(self, what: str) -> str:
        self.log.append(what)
        if self.log.count(what) == 1:
            raise ConnectionError("once")
        return what

    async def undo(self, output: str, what: str) -> None:
        self.log.append(f"undo {what}")


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.mark.parametrize(
    ("when", "executed"),
    [
        ("before_handler", ["one", "two", "three"]),
        ("after_handler", ["one", "two", "two", "three"]),
        ("before_commit", ["one", "two", "two", "three"]),
        ("after_commit", ["one", "two", "three"]),
    ],
)
@pytest.mark.parametrize("shape", ["function", "builder"])
def test_the_worker_dies_where_it_is_told_to(
    dsn: str, hands: Hands, when: Any, executed: list[str], shape: str
) -> None:
    def number(name: str) -> Any:
        async def handler(ctx: StepContext[Any]) -> str:
            return await hands.do(name)

        return handler

    @workflow
    async def counting(ctx: Context) -> list[str]:
        return [await ctx.step(hands.do, each, name=each) for each in ("one", "two", "three")]

    built = define("built").step("one", number("one")).step("two", number("two")).step("three", number("three"))
    made: Any = counting if shape == "function" else built
    with Durable(dsn, workflows=[made]) as app, Harness(app) as t:
        run = app.start(made)
        t.crash_at("two", when=when)
        t.drain()
        assert not run.status().ended
        assert hands.log == executed[: executed.index("two") + (when != "before_handler")]
        t.drain()
        assert hands.log == executed
        assert t.history(run).steps == ["one", "two", "three"]
        assert t.history(run).count("attempt_interrupted", step="two") == (0 if when == "after_commit" else 1)


async def test_at_a_branch_an_iteration_and_a_compensator(dsn: str, hands: Hands) -> None:
    @workflow
    async def all_sorts(ctx: Context) -> None:
        async def turn(c: Context, number: int) -> int | None:
            await c.step(hands.do, f"turn {number}", name="go")
            if number == 2:
                raise Rollback
            return number + 1

        branches = {name: lambda c, name=name: c.step(hands.do, name, compensate=hands.undo) for name in ("a", "b")}
        await ctx.join("both", branches)
        await ctx.loop("turns", turn, 0)

    async with AsyncDurable(dsn, workflows=[all_sorts]) as app, AsyncHarness(app) as t:
        run = await app.start(all_sorts)
        for step in ("both/b/do", "turns[1]/go", "undo:both/a/do"):
            t.crash_at(step)
            await t.drain()
            assert not (await run.status()).ended
        await t.drain()
        assert (await run.status()).status == "failed"
        history = await t.history(run)
        assert {"both/b/do", "turns[1]/go"} <= {event.step for event in history.of("attempt_interrupted")}
        assert hands.log.count("turn 1") == 2
        assert hands.log.count("undo a") == 2
        assert hands.log.count("undo b") == 1
        assert history.count("compensated") == 2


def test_after_the_commit_of_a_failed_attempt(dsn: str, hands: Hands) -> None:
    @workflow
    async def retrying(ctx: Context) -> str:
        return str(await ctx.step(hands.fail_once, "it", name="it"))

    with Durable(dsn, workflows=[retrying]) as app, Harness(app) as t:
        run = app.start(retrying)
        t.crash_at("it", when="after_commit")
        t.drain()
        assert run.status().derived == "retrying"
        t.skip(minutes=1)
        t.drain()
        assert_history(
            t.history(run),
            [
                "created",
                "started",
                "attempt_started it",
                "attempt_failed it",
                "suspended",
                "attempt_started it",
                "attempt_succeeded it",
                "completed",
            ],
        )


def test_a_crash_that_does_not_come_fails_the_test(dsn: str, hands: Hands) -> None:
    built = define("built").step("one", lambda ctx: 1)
    with Durable(dsn, workflows=[built]) as app:
        with pytest.raises(AssertionError, match=r"crash_at\('three', when='before_commit'\)"), Harness(app) as t:
            t.crash_at("three")
            app.start(built)
            t.drain()
        with pytest.raises(ZeroDivisionError), Harness(app) as t:  # an error of the test's own is not hidden by it
            t.crash_at("three")
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="before_handler, after_handler"), Harness(app) as t:
            t.crash_at("one", when="now")  # type: ignore[arg-type]


# ---------------------------------------------------------------- history


def test_a_history(dsn: str) -> None:
    def refuse(ctx: StepContext[Any]) -> None:
        raise NonRetryable("no")

    built = define("built").step("one", lambda ctx: 1).wait_for_signal("go", "go").step("two", refuse)
    with Durable(dsn, workflows=[built]) as app, Harness(app) as t:
        run = app.start(built)
        t.drain()
        run.signal("go")
        t.drain()
        history = t.history(run)
    assert history.lines == [
        "created",
        "started",
        "attempt_started one",
        "attempt_succeeded one",
        "wait_waiting go",
        "suspended",
        "message_received go",
        "wait_satisfied go",
        "attempt_started two",
        "attempt_failed two",
        "failed",
    ]
    assert history.steps == ["one"]
    assert history.count("attempt_started") == 2
    assert history.count("attempt_failed", step="one") == 0
    assert history.of(step="two").lines == ["attempt_started two", "attempt_failed two"]
    assert history.of("created", "failed").lines == ["created", "failed"]
    assert history[0].kind == "created"
    assert history[-2:].lines == ["attempt_failed two", "failed"]
    assert repr(history[:1]) == "<history\n  created\n>"


LINES = ["created", "started", "attempt_started a", "attempt_succeeded a", "attempt_started b", "completed"]


@pytest.mark.parametrize(
    "expected",
    [
        LINES,
        [...],
        [..., "completed"],
        ["created", ...],
        ["created", ..., "completed"],
        [..., *LINES, ...],
        ["created", "started", ..., "attempt_started b", ..., "completed"],
        [..., "attempt_started a", "attempt_succeeded a", ..., "attempt_started b", ...],
    ],
)
def test_a_history_that_is_as_expected(expected: Any) -> None:
    assert_history(history_of(LINES), expected)


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ([], "+ created"),
        ([*LINES, "failed"], "- failed"),
        (["created", "completed"], "+ attempt_started a"),
        ([..., "failed"], "at its end:\n  failed\nbut:\n  completed"),
        (["started", ...], "at its beginning:\n  started\nbut:\n  created"),
        (["created", ..., "attempt_started b", ..., "attempt_started a", ...], "after line 5:\n  attempt_started a"),
        ([..., "attempt_started a", "attempt_started b", ...], "after line 0:"),
        ([*LINES, ..., "completed"], "at its end:\n  completed\nbut:\n  nothing"),
    ],
)
def test_a_history_that_is_not(expected: Any, said: str) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_history(history_of(LINES), expected)
    assert said in str(raised.value)


def history_of(lines: list[str]) -> History:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    words = (line.partition(" ") for line in lines)
    return History(HistoryEvent(kind, at, step or None) for kind, _, step in words)
