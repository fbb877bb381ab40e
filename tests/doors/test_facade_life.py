"""An app's life: made, connected at its first use, shared, forked, restarted under, closed; and what it says when its
database is not what it should be."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import (
    AsyncDurable,
    ConfigurationError,
    Durable,
    SchemaMismatch,
    Status,
    StepContext,
    define,
    migrate,
)
from durable.postgres import EmbeddedPostgres

work = define("work").step("work", lambda ctx: ctx.input)


def connections(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and application_name like 'durable app%'"
        ).fetchone()
    assert row is not None
    return int(row[0])


# ---------------------------------------------------------------- made


@pytest.mark.parametrize(
    "options",
    [
        {"dsn": "mysql://db/app"},
        {"dsn": ""},
        {"dsn": "postgresql://u:p%zz@db/app"},
        {"schema": "Shop!"},
        {"schema": None},
        {"queue": "q" * 41},
        {"queue": ""},
        {"queue": 5},
        {"embedded": "sometimes"},
        {"pool_size": 0},
        {"pool_size": 2.5},
        {"detach_after": -1},
        {"detach_after": float("nan")},
        {"detach_after": "2"},
        {"max_crashes": 0},
        {"max_payload": True},
        {"codec": object()},
        {"imports": "shop.workflows"},
        {"workflows": work},
    ],
)
@pytest.mark.parametrize("cls", [Durable, AsyncDurable])
def test_wrong_arguments_are_refused_at_once(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as error:
        cls(**options)
    assert "p%zz" not in str(error.value)


def test_nothing_happens_before_the_first_use(dsn: str) -> None:
    before = set(threading.enumerate())
    app = Durable(dsn, workflows=[work])
    app.get("0190fd8e-0000-7000-8000-000000000000")
    assert app.database is None
    assert "not connected yet" in repr(app)
    assert set(threading.enumerate()) == before
    app.close()


def test_the_default_queue_is_the_schemas_name() -> None:
    assert Durable(schema="shop").queue == "shop"
    assert Durable(schema="shop", queue="q").queue == "q"
    assert Durable().options.pool_size == 10


# ---------------------------------------------------------------- connected


def test_one_line_says_which_database_was_taken(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "durable"), Durable(dsn, workflows=[work]) as app:
        app.list()
        app.list()
        assert app.database is not None
    lines = [record.getMessage() for record in caplog.records if record.name == "durable"]
    assert len(lines) == 1
    assert "from the dsn argument" in lines[0]


async def test_concurrent_first_uses_connect_once(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ensured: list[str] = []
    ensure = migrate.ensure

    def counted(*arguments: Any, **options: Any) -> None:
        ensured.append("once")
        ensure(*arguments, **options)

    monkeypatch.setattr(migrate, "ensure", counted)
    async with AsyncDurable(dsn, workflows=[work]) as app:
        runs = await asyncio.gather(*(app.start(work, n) for n in range(30)))
        assert len({run.id for run in runs}) == 30
        assert ensured == ["once"]
        assert connections(dsn) <= 10


def test_threads_share_an_app(dsn: str) -> None:
    with Durable(dsn, workflows=[work]) as app, ThreadPoolExecutor(16) as threads:
        runs = list(threads.map(lambda n: app.start(work, n), range(100)))
        assert len({run.id for run in runs}) == 100
        assert len(app.list(limit=200)) == 100


def test_several_event_loops_may_use_an_app(dsn: str) -> None:
    app = AsyncDurable(dsn, workflows=[work])

    async def once() -> Status:
        run = await app.start(work)
        return (await run.status()).status

    async def once_and_close() -> Status:
        async with app:
            return await once()

    assert asyncio.run(once()) is Status.PENDING  # nobody closes: its connections go with its loop
    with ThreadPoolExecutor() as threads:
        assert threads.submit(asyncio.run, once_and_close()).result(20) is Status.PENDING
    assert asyncio.run(once_and_close()) is Status.PENDING


async def test_close_gives_back_and_a_later_use_connects_anew(dsn: str) -> None:
    app = AsyncDurable(dsn, workflows=[work])
    await app.close()  # it never connected
    with pytest.raises(ConfigurationError, match=r"await app\.connect\(\)"):
        app.pool  # noqa: B018
    await app.connect()
    assert app.pool is app.pool
    await app.list()
    assert connections(dsn) == 1
    await app.close()
    await app.close()
    assert app.database is None
    assert connections(dsn) == 0
    assert (await app.list()).items == ()
    await app.close()


# ---------------------------------------------------------------- the wrong database


def test_a_host_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Durable("postgresql://app:s3cret@127.0.0.1:1/app", workflows=[work])
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"cannot connect.*127\.0\.0\.1") as error:
            app.start(work)
        assert "s3cret" not in str(error.value)
        assert isinstance(error.value.__cause__, psycopg.OperationalError)
    app.close()


def test_a_database_that_is_not_there(dsn: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    app = Durable(dsn.replace(str(name), "no_such_database"), workflows=[work])
    with pytest.raises(ConfigurationError, match='"no_such_database" does not exist'):
        app.list()
    app.close()


def test_a_database_without_the_schema(empty_dsn: str) -> None:
    with Durable(empty_dsn, workflows=[work]) as app:
        with pytest.raises(SchemaMismatch, match=r"has no tables of durable.*`durable migrate`"):
            app.start(work)
        app.migrate()
        app.migrate()
        assert app.start(work).status().status is Status.PENDING


def test_it_migrates_itself_if_told_to(empty_dsn: str) -> None:
    with Durable(empty_dsn, schema="shop", workflows=[work], auto_migrate=True) as app:
        run = app.start(work, 1)
        assert run.status().status is Status.PENDING
        app.run_worker(until_idle=True)
        assert run.result() == {"work": 1}


@pytest.mark.parametrize(
    ("revision", "says"), [("0000", "does not know|missing"), ("9999", "which this version of durable does not")]
)
def test_a_schema_that_is_too_old_or_too_new(dsn: str, revision: str, says: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("update durable.alembic_version set version_num = %s", [revision])
    with Durable(dsn, workflows=[work]) as app, pytest.raises(SchemaMismatch, match=says) as error:
        app.start(work)
    assert (error.value.found, error.value.needed) == (revision, migrate.HEAD)


# ---------------------------------------------------------------- under way


def test_a_restart_of_the_database_costs_no_call(own_server: EmbeddedPostgres) -> None:
    with Durable(own_server.dsn(), workflows=[work], auto_migrate=True) as app:
        run = app.start(work, 1)
        with ThreadPoolExecutor(8) as threads:  # several connections lie in the pool
            list(threads.map(lambda _: app.list(), range(50)))
        for mode in ("fast", "immediate"):
            own_server.restart(mode)
            assert run.signal("hello")
            assert app.start(work, 2).status().status is Status.PENDING
            assert len(app.list()) >= 2
        own_server.restart("immediate")
        assert run.cancel()
        assert run.status().status is Status.CANCELED


FORKED = """
import os, sys
from durable import Durable, define

app = Durable(sys.argv[1])
work = app.define("work").step("work", lambda ctx: ctx.input)
app.start(work, "parent")
children = []
for n in range(3):
    child = os.fork()
    if child == 0:
        app.start(work, n)
        sys.exit(len(app.list()) < 2)
    children.append(child)
app.start(work, "parent")
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
app.start(work, "parent")
print(codes, len(app.list()))
"""


def test_forked_processes_go_on_by_themselves(dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", FORKED, dsn],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[0, 0, 0] 6\n", done.stderr
    assert done.stderr == ""


EMBEDDED = """
from durable import Durable

app = Durable(embedded="always")
work = app.define("work").step("work", lambda ctx: str(ctx.app.start("leaf", ctx.input).id))
leaf = app.define("leaf").step("leaf", lambda ctx: ctx.input + 1)
with app.worker():
    child = app.start(work, 1).result(30)["work"]
    print(app.result(child, 30))
"""


def test_the_embedded_database_needs_nothing_and_leaves_nothing_running(server_root: Path) -> None:
    """Also: handlers in threads call the very app that runs them, and an app that nobody closes ends in peace."""
    environment = {name: value for name, value in os.environ.items() if "DATABASE_URL" not in name}
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=server_root,
        env=environment,
    )
    assert done.stdout == "{'leaf': 2}\n", done.stderr
    assert done.stderr == ""
    assert not (server_root / ".durable" / "pg" / "postmaster.pid").exists()


# ---------------------------------------------------------------- working


def test_a_worker_in_the_background_of_a_block(dsn: str) -> None:
    app = Durable(dsn, workflows=[work])
    before = set(threading.enumerate())
    with app, app.worker():
        assert app.start(work, 1).result(30) == {"work": 1}
    assert set(threading.enumerate()) - before == set()
    assert app.database is None


def test_a_worker_that_can_not_start_says_so(dsn: str, empty_dsn: str) -> None:
    with Durable(dsn) as app:
        with pytest.raises(ConfigurationError, match="no workflow is registered"), app.worker():
            pytest.fail("the block was entered")
        with pytest.raises(ConfigurationError, match="no workflow is registered"):
            app.run_worker()
    with (
        Durable(empty_dsn, workflows=[work]) as app,
        pytest.raises(SchemaMismatch),
        app.worker(),
    ):
        pytest.fail("the block was entered")


def test_an_error_of_the_block_passes_through_the_worker(dsn: str) -> None:
    with Durable(dsn, workflows=[work]) as app, pytest.raises(ZeroDivisionError), app.worker():
        raise ZeroDivisionError


async def test_an_async_worker_on_the_same_loop(dsn: str) -> None:
    seen: list[object] = []

    async def handler(ctx: StepContext[Any]) -> None:
        seen.append(ctx.app)
        await ctx.app.signal(ctx.run_id, "from within")

    async with AsyncDurable(dsn) as app:
        app.define("calls").step("call", handler).wait_for_signal("heard", "from within")
        async with app.worker() as worker:
            assert await (await app.start("calls")).result(30) == {"call": None, "heard": None}
            assert worker.started.is_set()
        assert seen == [app]
        await app.run_worker(until_idle=True)


async def test_an_async_worker_that_can_not_start_says_so(dsn: str) -> None:
    async with AsyncDurable(dsn) as app:
        with pytest.raises(ConfigurationError, match="no workflow is registered"):
            async with app.worker():
                pytest.fail("the block was entered")


TERMINATED = """
import sys
from durable import Durable

app = Durable(sys.argv[1])
app.define("shout").step("shout", lambda ctx: print("working", flush=True))
app.start("shout")
app.run_worker()
print("ended in order")
"""


def test_sigterm_ends_a_worker_in_order(dsn: str) -> None:
    worker = subprocess.Popen([sys.executable, "-c", TERMINATED, dsn], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "working\n"
        worker.terminate()
        assert worker.communicate(timeout=60)[0] == "ended in order\n"
        assert worker.returncode == 0
    finally:
        worker.kill()
        worker.wait()
