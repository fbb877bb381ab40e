"""``connection=``: savepoints, odd search paths, rivals, and callers that know no Python.

What any kind of connection commits or rolls back: tests/doors/test_facade_connections.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from tests.doors.facts import rows, unchanged
from tests.store.kit import wait_until_blocked

from durable import AsyncDurable, Durable, RunExists, RunNotFound, Start, define, migrate
from durable.testing import AsyncHarness, Harness
from durable.values import Status

work = define("work").step("work", lambda ctx: ctx.input)
wait = define("wait").wait_for_signal("answer", "go")
WORKFLOWS = [work, wait]

ODD_PATHS = ["public", '"$user", public', "trap, pg_catalog", "", "durable, trap"]
TRAP = """
create schema if not exists trap;
create table if not exists trap.runs (id int);
create table if not exists trap.procrastinate_jobs (id int);
create or replace function trap.enqueue(text, uuid, bigint, text, int, interval default null) returns void
  language sql as 'select 1/0';
create or replace function trap.engine_now() returns timestamptz language sql as 'select now() + interval ''9 years''';
"""


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with Durable(dsn, workflows=WORKFLOWS) as app:
        yield app


@pytest.fixture
async def async_app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=WORKFLOWS) as app:
        yield app


@pytest.fixture
def engine(dsn: str) -> Iterator[sa.Engine]:
    engine = migrate.engine(dsn)
    yield engine
    engine.dispose()


def there(app: Durable, run: Any) -> bool:
    try:
        return bool(app.status(run).id)
    except RunNotFound:
        return False


# ---------------------------------------------------------------- savepoints


def test_a_savepoint_that_is_rolled_back_takes_its_run_and_message_along(app: Durable, dsn: str) -> None:
    other = app.start(wait)
    with psycopg.connect(dsn) as connection:
        kept = app.start(work, 1, connection=connection)
        with connection.transaction() as savepoint:
            lost = app.start(work, 2, connection=connection)
            app.signal(other, "go", "lost", connection=connection)
            raise psycopg.Rollback(savepoint)
        with connection.transaction():
            inner = app.start(work, 3, connection=connection)
            app.signal(other, "go", "kept", connection=connection)
    assert [there(app, run) for run in (kept, lost, inner)] == [True, False, True]
    with Harness(app) as harness:
        harness.drain()
    assert other.result(timeout=0) == {"answer": "kept"}
    assert inner.result(timeout=0) == {"work": 3}


def test_savepoints_of_sqlalchemys_connection_and_session(app: Durable, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        with connection.begin_nested() as savepoint:
            lost = app.start(work, connection=connection)
            savepoint.rollback()
        kept = app.start(work, connection=connection)
    with Session(engine) as session, session.begin():
        with session.begin_nested() as nested:
            lost_too = app.start(work, connection=session)
            nested.rollback()
        with session.begin_nested():
            kept_too = app.start(work, connection=session)
    assert [there(app, run) for run in (lost, kept, lost_too, kept_too)] == [False, True, False, True]


async def test_savepoints_of_async_connections(async_app: AsyncDurable, dsn: str) -> None:
    engine = create_async_engine("postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(dsn))
    runs = []
    async with await psycopg.AsyncConnection.connect(dsn) as plain:
        async with plain.transaction() as savepoint:
            runs.append(await async_app.start(work, connection=plain))
            raise psycopg.Rollback(savepoint)
        async with plain.transaction():
            runs.append(await async_app.start(work, connection=plain))
    async with engine.begin() as connection:
        savepoint_ = await connection.begin_nested()
        runs.append(await async_app.start(work, connection=connection))
        await savepoint_.rollback()
        runs.append(await async_app.start(work, connection=connection))
    async with AsyncSession(engine) as session, session.begin():
        nested = await session.begin_nested()
        runs.append(await async_app.start(work, connection=session))
        await nested.rollback()
        runs.append(await async_app.start(work, connection=session))
    await engine.dispose()
    found = {run.id for run in await async_app.list(workflow=work)}
    assert [run.id in found for run in runs] == [False, True] * 3


def test_an_error_within_a_savepoint_leaves_the_transaction_usable(app: Durable, dsn: str) -> None:
    app.start(work, 1, key="k")
    with psycopg.connect(dsn) as connection:
        with pytest.raises(RunExists), connection.transaction():
            app.start(work, 2, key="k", connection=connection)
        fine = app.start(work, 3, connection=connection)
    assert there(app, fine)


def test_a_transaction_that_has_failed_says_what_the_database_says(app: Durable, dsn: str) -> None:
    with unchanged(dsn), psycopg.connect(dsn) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("select 1/0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            app.start(work, connection=connection)
        connection.rollback()


# ---------------------------------------------------------------- where names are looked up


@pytest.mark.parametrize("path", ODD_PATHS)
def test_any_search_path_serves_and_is_left_as_it_was(app: Durable, dsn: str, path: str) -> None:
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        connection.execute(TRAP.encode())
        connection.execute("select set_config('search_path', %s, false)", [path])
        run = app.start(wait, connection=connection)
        app.start_many(wait, [Start(1)], connection=connection)
        assert app.signal(run, "go", 1, connection=connection)
        assert app.cancel(app.start(work, connection=connection), connection=connection)
        row = connection.execute("select current_setting('search_path') as path").fetchone()
        assert row is not None
        assert row["path"] == path
    with Harness(app) as harness:
        harness.drain()
    assert run.result(timeout=0) == {"answer": 1}


# ---------------------------------------------------------------- the wrong kind


async def test_the_wrong_kind_of_connection_names_the_other_facade(
    async_app: AsyncDurable, dsn: str, engine: sa.Engine
) -> None:
    app = Durable(dsn, workflows=WORKFLOWS)
    run = await async_app.start(wait)
    with psycopg.connect(dsn) as plain, engine.connect() as connection, Session(engine) as session, unchanged(dsn):
        for given in (plain, plain.cursor(), connection, session):
            for call in (
                async_app.start(work, connection=given),
                async_app.start_many(work, [Start(1)], connection=given),
                async_app.signal(run, "go", connection=given),
                async_app.cancel(run, connection=given),
            ):
                with pytest.raises(TypeError, match=r"AsyncDurable takes async connections; .* use Durable"):
                    await call
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        with unchanged(dsn):
            for wrong in (other, other.cursor()):
                with pytest.raises(TypeError, match=r"Durable takes sync connections; .* use AsyncDurable"):
                    app.start(work, connection=wrong)
                with pytest.raises(TypeError, match="use AsyncDurable"):
                    app.signal(run.id, "go", connection=wrong)
                with pytest.raises(TypeError, match="use AsyncDurable"):
                    app.cancel(run.id, connection=wrong)
            for nonsense in (engine, dsn, object()):
                with pytest.raises(TypeError, match="connection of psycopg or SQLAlchemy, or a session"):
                    app.start(work, connection=nonsense)


# ---------------------------------------------------------------- before the commit, and after a rollback


def test_what_is_not_committed_is_seen_by_nobody_and_leaves_nothing(app: Durable, dsn: str) -> None:
    other = app.start(wait)
    with unchanged(dsn), psycopg.connect(dsn) as connection:
        run = app.start(work, connection=connection)
        app.start_many(work, [Start(n) for n in range(3)], connection=connection)
        assert app.signal(other, "go", connection=connection)
        assert app.cancel(other, connection=connection)
        assert app.signal(run, "go", connection=connection)  # within its transaction it is there
        with pytest.raises(RunNotFound):
            run.status()
        assert len(app.list(workflow=work)) == 0
        connection.rollback()
    with pytest.raises(TimeoutError, match="not committed yet, or was rolled back"):
        run.result(timeout=0)


async def test_the_result_of_an_uncommitted_start_is_waited_for(async_app: AsyncDurable, dsn: str) -> None:
    async with AsyncHarness(async_app) as harness:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            run = await async_app.start(work, 1, connection=connection)
            result = asyncio.create_task(run.result(timeout=60))
            await asyncio.to_thread(registered, dsn)
            await harness.drain()
            assert not result.done()
            with pytest.raises(RunNotFound):
                await async_app.result(run.id)  # a mere id may be wrong
        await harness.drain()
        assert await result == {"work": 1}


def registered(dsn: str) -> None:
    """Until somebody waits for the end of a run."""
    end = time.monotonic() + 20
    with psycopg.connect(dsn, autocommit=True) as connection:
        while not rows(connection, "durable.waiters"):
            assert time.monotonic() < end, "nobody waits"


def test_a_cancel_in_a_transaction_waits_for_its_commit(app: Durable, dsn: str) -> None:
    """And does not touch the run's row: nobody waits for the caller's transaction."""
    run = app.start(wait)
    with Harness(app) as harness, psycopg.connect(dsn) as connection:
        assert app.cancel(run, reason="late", connection=connection)
        harness.drain()
        assert run.status().status is Status.SUSPENDED
        connection.commit()
        harness.drain()
        assert (run.status().status, run.status().reason) == (Status.CANCELED, "late")


# ---------------------------------------------------------------- one key, many transactions


@pytest.mark.parametrize("commits", [True, False])
def test_a_start_by_key_waits_for_a_rivals_transaction(app: Durable, dsn: str, commits: bool) -> None:
    with psycopg.connect(dsn) as first, psycopg.connect(dsn) as second, ThreadPoolExecutor() as threads:
        mine = app.start(work, 1, key="k", connection=first)
        waiting = threads.submit(app.start, work, 1, key="k", connection=second)
        wait_until_blocked(dsn, second.info.backend_pid)
        first.commit() if commits else first.rollback()
        theirs = waiting.result(20)
        second.commit()
    assert (theirs.id == mine.id) is commits
    assert [run.id for run in app.list(workflow=work)] == [theirs.id]
    with Harness(app) as harness:
        assert harness.drain() == 1


def test_a_start_by_key_from_many_transactions_is_one_run(app: Durable, dsn: str) -> None:
    """Half of them roll back; whoever commits, commits the same run."""
    together = threading.Barrier(8)

    def one(n: int) -> uuid.UUID | None:
        with psycopg.connect(dsn) as connection:
            together.wait(20)
            run = app.start(work, "same", key="k", connection=connection)
            connection.commit() if n % 2 else connection.rollback()
            return run.id if n % 2 else None

    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(one, range(8))) - {None}
    assert len(found) == 1
    assert {run.id for run in app.list(workflow=work)} == found
    with Harness(app) as harness:
        assert harness.drain() == 1


async def test_a_message_id_from_many_transactions_is_one_message(async_app: AsyncDurable, dsn: str) -> None:
    run = await async_app.start(wait)

    async def one() -> bool:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            return await run.signal("go", 1, id="m", connection=connection)

    assert await asyncio.gather(*(one() for _ in range(8))) == [True] * 8
    with psycopg.connect(dsn) as connection:
        assert len(rows(connection, "durable.inbox")) == 1


# ---------------------------------------------------------------- without this library

START = """
select id, created, same from durable.start_run(
  p_id => %s, p_workflow => 'work', p_version => '1', p_input => %s, p_input_hash => '', p_queue => 'durable',
  p_key => %s)
"""


def test_plain_sql_starts_and_signals(app: Durable, dsn: str) -> None:
    ids = [uuid.uuid4() for _ in range(3)]
    with psycopg.connect(dsn) as connection:
        assert connection.execute(START, [ids[0], '{"from": "sql"}', "k"]).fetchone() == (ids[0], True, True)
        assert connection.execute(START, [ids[1], '{"from": "sql"}', "k"]).fetchone() == (ids[0], False, True)
        connection.commit()
        connection.execute(START, [ids[2], "1", None])
        connection.rollback()
        waiting = app.start(wait)
        sent = connection.execute(
            "select durable.send_message(%s, 'signal', 'go', %s)", [waiting.id, '{"a": 1}']
        ).fetchone()
        assert sent == ("sent",)
    with Harness(app) as harness:
        harness.drain()
    assert app.result(ids[0], timeout=0) == {"work": {"from": "sql"}}
    assert waiting.result(timeout=0) == {"answer": {"a": 1}}
    assert not there(app, ids[1])
    assert not there(app, ids[2])


TRIGGER = """
create table orders (id uuid primary key default gen_random_uuid(), total int);
create function start_order() returns trigger language plpgsql as $$
begin
  perform durable.start_run(
    p_id => new.id, p_workflow => 'work', p_version => '1', p_input => json_build_object('total', new.total),
    p_input_hash => '', p_queue => 'durable', p_key => 'order ' || new.total);
  return null;
end
$$;
create trigger start_order after insert on orders for each row execute function start_order();
"""


def test_a_trigger_starts_a_run_for_each_row(app: Durable, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(TRIGGER.encode())
        connection.commit()
        connection.execute("insert into orders (total) values (99)")
        connection.rollback()
        connection.execute("insert into orders (total) values (1), (2)")
        connection.commit()
        orders = [row[0] for row in connection.execute("select id from orders order by total")]
    with Harness(app) as harness:
        harness.drain()
    assert [app.result(order, timeout=0) for order in orders] == [{"work": {"total": n}} for n in (1, 2)]
    assert len(app.list(workflow=work)) == 2
