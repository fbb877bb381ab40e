"""``connection=``: what happens lives and dies with the caller's transaction, and touches nothing else."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from durable import AsyncDurable, Durable, RunExists, RunNotFound, SchemaMismatch, Start, Status, define

work = define("work").step("work", lambda ctx: ctx.input)


def url(dsn: str) -> str:
    return dsn.replace("postgresql://", "postgresql+psycopg://", 1)


# ---------------------------------------------------------------- how callers connect


@contextmanager
def psycopg_connection(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        yield connection


@contextmanager
def psycopg_cursor(dsn: str) -> Iterator[psycopg.Cursor[Any]]:
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        yield cursor


@contextmanager
def core_connection(dsn: str) -> Iterator[sa.Connection]:
    with sa.create_engine(url(dsn), poolclass=NullPool).connect() as connection, connection.begin():
        yield connection


@contextmanager
def orm_session(dsn: str) -> Iterator[Session]:
    with Session(sa.create_engine(url(dsn), poolclass=NullPool)) as session, session.begin():
        yield session


Sync: TypeAlias = Callable[[str], AbstractContextManager[Any]]
SYNC = [psycopg_connection, psycopg_cursor, core_connection, orm_session]


@asynccontextmanager
async def async_psycopg_connection(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection


@asynccontextmanager
async def async_core_connection(dsn: str) -> AsyncIterator[Any]:
    async with create_async_engine(url(dsn), poolclass=NullPool).begin() as connection:
        yield connection


@asynccontextmanager
async def async_orm_session(dsn: str) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(create_async_engine(url(dsn), poolclass=NullPool)) as session, session.begin():
        yield session


Async: TypeAlias = Callable[[str], AbstractAsyncContextManager[Any]]
ASYNC = [async_psycopg_connection, async_core_connection, async_orm_session]


class Stop(Exception):
    """Rolls back."""


@pytest.fixture
def app(module_dsn: str) -> Iterator[Durable]:
    with Durable(module_dsn, workflows=[work]) as app:
        yield app


# ---------------------------------------------------------------- sync


@pytest.mark.parametrize("connected", SYNC)
def test_what_is_done_in_a_transaction_commits_with_it(app: Durable, module_dsn: str, connected: Sync) -> None:
    outsider = Durable("postgresql://nobody@localhost:1/nowhere", workflows=[work])  # no pool of its own is touched
    other = app.start(work)
    with connected(module_dsn) as connection:
        run = outsider.start(work, 1, connection=connection)
        many = outsider.start_many(work, [Start(2), Start(3)], connection=connection)
        assert outsider.signal(other.id, "hello", connection=connection)
        assert outsider.cancel(many[0].id, reason="no", connection=connection)
        with pytest.raises(RunNotFound):
            app.status(run.id)
    assert app.status(run.id).status is Status.PENDING
    assert [app.status(one).input for one in many] == [2, 3]
    assert "message_received" in [event.kind for event in other.history()]
    app.run_worker(until_idle=True)
    assert app.result(run) == {"work": 1}
    assert app.status(many[0]).reason == "no"


@pytest.mark.parametrize("connected", SYNC)
def test_what_is_done_in_a_transaction_rolls_back_with_it(app: Durable, module_dsn: str, connected: Sync) -> None:
    other = app.start(work)
    with pytest.raises(Stop), connected(module_dsn) as connection:
        run = app.start(work, connection=connection)
        app.signal(other.id, "hello", connection=connection)
        app.cancel(other.id, connection=connection)
        raise Stop
    with pytest.raises(RunNotFound):
        run.status()
    assert [event.kind for event in other.history()] == ["created"]
    assert other.status().status is Status.PENDING


@pytest.mark.parametrize("connected", SYNC)
def test_errors_leave_the_callers_transaction_alone(app: Durable, module_dsn: str, connected: Sync) -> None:
    key = f"key-{uuid.uuid4()}"
    with connected(module_dsn) as connection:
        run = app.start(work, 1, key=key, connection=connection)
        assert app.start(work, 1, key=key, connection=connection) == run
        with pytest.raises(RunExists):
            app.start(work, 2, key=key, connection=connection)
        with pytest.raises(RunNotFound):
            app.signal(uuid.uuid4(), "x", connection=connection)
    assert run.status().input == 1


async def test_sync_calls_with_a_connection_need_no_loop(app: Durable, module_dsn: str) -> None:
    """As inside ``await session.run_sync(...)``: an event loop runs, but not one of ours."""
    async with create_async_engine(url(module_dsn), poolclass=NullPool).begin() as connection:
        run = await connection.run_sync(lambda sync: app.start(work, connection=sync))
    async with AsyncDurable(module_dsn) as other:
        assert (await other.status(run.id)).status is Status.PENDING


# ---------------------------------------------------------------- async


@pytest.mark.parametrize("connected", ASYNC)
async def test_async_commits_and_rolls_back(module_dsn: str, connected: Async) -> None:
    outsider = AsyncDurable("postgresql://nobody@localhost:1/nowhere", workflows=[work])
    async with AsyncDurable(module_dsn, workflows=[work]) as app:
        other = await app.start(work)
        with pytest.raises(Stop):
            async with connected(module_dsn) as connection:
                gone = await outsider.start(work, connection=connection)
                raise Stop
        with pytest.raises(RunNotFound):
            await app.status(gone.id)
        async with connected(module_dsn) as connection:
            run = await outsider.start(work, 1, connection=connection)
            many = await outsider.start_many(work, [Start(2), Start(3)], connection=connection)
            assert await outsider.signal(other.id, "hello", connection=connection)
            assert await outsider.cancel(other.id, connection=connection)
        assert [(await app.status(one.id)).input for one in [run, *many]] == [1, 2, 3]


# ---------------------------------------------------------------- the wrong ones


async def test_the_other_kind_of_connection_names_the_other_app(app: Durable, module_dsn: str) -> None:
    asynchronous = AsyncDurable(module_dsn, workflows=[work])
    run_id = uuid.uuid4()
    for connected in ASYNC:
        async with connected(module_dsn) as connection:
            with pytest.raises(TypeError, match="use AsyncDurable"):
                app.start(work, connection=connection)
            with pytest.raises(TypeError, match="use AsyncDurable"):
                app.signal(run_id, "a", connection=connection)
            with pytest.raises(TypeError, match="use AsyncDurable"):
                app.cancel(run_id, connection=connection)
    for sync_connected in SYNC:
        with sync_connected(module_dsn) as connection:
            with pytest.raises(TypeError, match="use Durable"):
                await asynchronous.start(work, connection=connection)
            with pytest.raises(TypeError, match="use Durable"):
                await asynchronous.start_many(work, [], connection=connection)
    with pytest.raises(TypeError, match=r"this is a builtins\.str"):
        app.start(work, connection=module_dsn)


@pytest.mark.parametrize("connected", SYNC)
def test_a_database_without_the_schema_says_so(app: Durable, empty_dsn: str, connected: Sync) -> None:
    with (
        pytest.raises(SchemaMismatch, match=r'schema "durable".*`durable migrate`'),
        connected(empty_dsn) as connection,
    ):
        app.start(work, connection=connection)
