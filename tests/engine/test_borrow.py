"""The run's own transaction, lent to a step: what commits, what does not, and that nobody can end it but the engine."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import Integer, select, text
from sqlalchemy.exc import IntegrityError, InterfaceError, InvalidRequestError, OperationalError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tests.engine.test_calls import a_call, a_view

from durable.core.transition import Failed, Outcome, Succeeded
from durable.engine.borrow import Gate
from durable.engine.calls import Caller, TransactionLost
from durable.engine.context import StepContext
from durable.errors import NonRetryable, PayloadError
from durable.store.connection import Connection

Ctx = StepContext[Any]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "t"
    x: Mapped[int] = mapped_column(Integer, primary_key=True)


class Bench:
    """An engine in miniature: a connection that holds a run's row in an open transaction, and lends it."""

    def __init__(self, dsn: str, caller: Caller, conn: Connection, other: Any) -> None:
        self.dsn, self.caller, self.conn, self.other = dsn, caller, conn, other
        self.borrowed = 0
        self.cancelled = threading.Event()
        self.when_borrowed: Callable[[], Awaitable[None] | None] = lambda: None

    async def borrow(self) -> Connection:
        self.borrowed += 1
        answer = self.when_borrowed()
        if answer is not None:
            await answer
        return self.conn

    async def begin(self) -> None:
        await self.conn.execute("begin")
        await self.conn.execute("set local lock_timeout = '1s'")
        await self.conn.execute("select id from run for update")

    async def call(self, handler: Callable[..., Any], **facts: Any) -> Outcome:
        """An attempt, with the transaction still open at its end."""
        call = a_call(handler, **facts)
        return await self.caller.run(call, a_view(), self, now=lambda: datetime.now(UTC), cancelled=self.cancelled)

    async def step(self, handler: Callable[..., Any], **facts: Any) -> Outcome:
        """An attempt, and the engine's write and commit after it, on the connection as it was given back."""
        await self.begin()
        outcome = await self.call(handler, **facts)
        assert self.conn.info.transaction_status is TransactionStatus.INTRANS
        await self.conn.execute("insert into journal values (%s)", [type(outcome).__name__])
        await self.conn.execute("commit")
        return outcome

    async def rows(self) -> list[int]:
        return [x for (x,) in await (await self.other.execute("select x from t order by x")).fetchall()]

    async def journal(self) -> list[str]:
        return [x for (x,) in await (await self.other.execute("select outcome from journal")).fetchall()]


SETUP = """
create table t (x int primary key, parent int references t deferrable initially deferred);
create table run (id int); insert into run values (1);
create table journal (outcome text);
"""


@pytest.fixture
async def bench(empty_dsn: str) -> AsyncIterator[Bench]:
    async with await psycopg.AsyncConnection.connect(empty_dsn, autocommit=True) as other:
        await other.execute(SETUP)
        async with await Connection.connect(empty_dsn, autocommit=True) as conn:
            caller = Caller(max_threads=8)
            try:
                yield Bench(empty_dsn, caller, conn, other)
            finally:
                await caller.close()
                gc.collect()


def insert(conn: Any, *xs: int) -> None:
    for x in xs:
        conn.execute(text("insert into t values (:x)"), {"x": x})


async def insert_async(conn: Any, *xs: int) -> None:
    for x in xs:
        await conn.execute(text("insert into t values (:x)"), {"x": x})


# ---------------------------------------------------------------- writing


async def test_a_sync_handlers_writes_commit_with_the_journal(bench: Bench) -> None:
    def handler(ctx: Ctx) -> int:
        conn = ctx.connection()
        insert(conn, 1)
        with conn.begin_nested():
            insert(conn, 2)
        with pytest.raises(ZeroDivisionError), conn.begin_nested():
            insert(conn, 3)
            raise ZeroDivisionError
        with conn.begin():
            insert(conn, 4)
        assert ctx.connection() is conn
        return conn.execute(text("select count(*) from t")).scalar_one()  # type: ignore[no-any-return]

    assert await bench.step(handler) == Succeeded("3")
    assert await bench.rows() == [1, 2, 4]
    assert await bench.journal() == ["Succeeded"]
    assert bench.borrowed == 1


async def test_an_async_handlers_writes_commit_with_the_journal(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> int:
        conn = await ctx.async_connection()
        await insert_async(conn, 1)
        async with conn.begin_nested():
            await insert_async(conn, 2)
        with pytest.raises(ZeroDivisionError):
            async with conn.begin():
                await insert_async(conn, 3)
                raise ZeroDivisionError
        await conn.run_sync(insert, 4)
        assert await ctx.async_connection() is conn
        return (await conn.execute(text("select count(*) from t"))).scalar_one()  # type: ignore[no-any-return]

    assert await bench.step(handler) == Succeeded("3")
    assert await bench.rows() == [1, 2, 4]
    assert bench.borrowed == 1


async def test_nothing_is_visible_to_others_before_the_engine_commits(bench: Bench) -> None:
    await bench.begin()
    assert isinstance(await bench.call(lambda ctx: insert(ctx.connection(), 1)), Succeeded)
    assert await bench.rows() == []
    await bench.conn.execute("rollback")
    assert await bench.rows() == []


@pytest.mark.parametrize("error", [ValueError("no"), NonRetryable("no"), SystemExit(3)])
async def test_a_failed_handler_leaves_nothing_and_the_failure_can_be_recorded(
    bench: Bench, error: BaseException
) -> None:
    def handler(ctx: Ctx) -> None:
        insert(ctx.connection(), 1)
        raise error

    async def on_loop(ctx: Ctx) -> None:
        await insert_async(await ctx.async_connection(), 1)
        raise error

    assert isinstance(await bench.step(handler), Failed)
    assert isinstance(await bench.step(on_loop), Failed)
    assert await bench.rows() == []
    assert await bench.journal() == ["Failed", "Failed"]


async def test_orm_session_commit_and_rollback_are_the_sessions_own(bench: Bench) -> None:
    def handler(ctx: Ctx) -> list[int]:
        conn = ctx.connection()
        insert(conn, 1)
        with Session(bind=conn) as session:
            session.add(Row(x=2))
            session.commit()
            session.add(Row(x=3))
            session.flush()
            session.rollback()
            session.add(Row(x=4))
            session.commit()
            with session.begin_nested():
                session.add(Row(x=5))
            session.commit()
        with Session(bind=conn) as session:
            session.add(Row(x=6))
            session.flush()  # closed without commit: undone
        with Session(bind=conn) as session, session.begin():
            session.add(Row(x=7))
        return list(Session(bind=conn).scalars(select(Row.x).order_by(Row.x)))

    assert await bench.step(handler) == Succeeded("[1,2,4,5,7]")
    assert await bench.rows() == [1, 2, 4, 5, 7]


async def test_async_orm_session(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> None:
        conn = await ctx.async_connection()
        async with AsyncSession(bind=conn) as session:
            session.add(Row(x=1))
            await session.commit()
            session.add(Row(x=2))
            await session.flush()
            await session.rollback()
        async with AsyncSession(bind=conn) as session, session.begin():
            session.add(Row(x=3))

    assert await bench.step(handler) == Succeeded("null")
    assert await bench.rows() == [1, 3]


async def test_the_result_is_dumped_while_the_connection_is_alive(bench: Bench) -> None:
    class Lazy:
        def __init__(self, conn: Any) -> None:
            self.conn = conn

        @property
        def status(self) -> str:
            return str(self.conn.execute(text("select 'suspended'")).scalar_one())

        @property
        def state(self) -> int:
            return int(self.conn.execute(text("select 42")).scalar_one())

        pending_tool_calls = ()

    outcome = await bench.step(lambda ctx: Lazy(ctx.connection()))
    assert '"state":42' in outcome.snapshot  # type: ignore[union-attr]


async def test_raw_psycopg_of_the_same_transaction(bench: Bench) -> None:
    """As ``app.start(..., connection=ctx.connection())`` takes it."""

    def handler(ctx: Ctx) -> str:
        raw = ctx.connection().connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        with raw.transaction():
            raw.execute("insert into t values (1)")
        for end in (raw.commit, raw.rollback):
            with pytest.raises(InvalidRequestError):
                end()
        raw.close()
        return raw.execute("select 'open'").fetchone()[0]  # type: ignore[index,no-any-return]

    async def on_loop(ctx: Ctx) -> str:
        raw = (await (await ctx.async_connection()).get_raw_connection()).driver_connection
        assert isinstance(raw, psycopg.AsyncConnection)
        async with raw.transaction():
            await raw.execute("insert into t values (2)")
        for end in (raw.commit, raw.rollback):
            with pytest.raises(InvalidRequestError):
                await end()
        await raw.close()
        return (await (await raw.execute("select 'open'")).fetchone())[0]  # type: ignore[index,no-any-return]

    assert await bench.step(handler) == Succeeded('"open"')
    assert await bench.step(on_loop) == Succeeded('"open"')
    assert await bench.rows() == [1, 2]


async def test_a_sync_handler_may_run_a_loop_of_its_own(bench: Bench) -> None:
    def handler(ctx: Ctx) -> int:
        conn = ctx.connection()

        async def inner() -> int:
            insert(conn, 1)
            return 7

        return asyncio.run(inner())

    assert await bench.step(handler) == Succeeded("7")
    assert await bench.rows() == [1]


async def test_prepared_statements_are_shared_with_the_engines_object(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        raw = ctx.connection().connection.driver_connection
        for _ in range(7):
            raw.execute("select %s::int", [1], prepare=True)  # type: ignore[union-attr]

    for _ in range(3):
        await bench.conn.execute("select %s::text", ["a"], prepare=True)
        assert isinstance(await bench.step(handler), Succeeded)
    names = await (await bench.conn.execute("select count(*) from pg_prepared_statements")).fetchone()
    assert names is not None
    assert names[0] >= 2


async def test_the_engines_object_keeps_its_settings(bench: Bench) -> None:
    notices: list[str] = []
    bench.conn.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
    seen: list[str] = []

    def handler(ctx: Ctx) -> None:
        raw = ctx.connection().connection.driver_connection
        raw.add_notice_handler(lambda diagnostic: seen.append(str(diagnostic.message_primary)))  # type: ignore[union-attr]
        raw.execute("do $$ begin raise notice 'user'; end $$")  # type: ignore[union-attr]
        raw.row_factory = psycopg.rows.dict_row  # type: ignore[union-attr]

    await bench.step(handler)
    await bench.conn.execute("do $$ begin raise notice 'engine'; end $$")
    assert (seen, notices) == (["user"], ["engine"])
    assert await (await bench.conn.execute("select 1")).fetchone() == (1,)


# ---------------------------------------------------------------- ending it is refused


async def test_commit_is_refused_and_close_is_harmless(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        with ctx.connection() as conn:
            insert(conn, 1)
            with pytest.raises(InvalidRequestError, match="commits when the handler returns"):
                conn.commit()
        conn.close()
        insert(ctx.connection(), 2)

    async def on_loop(ctx: Ctx) -> None:
        async with await ctx.async_connection() as conn:
            await insert_async(conn, 3)
            with pytest.raises(InvalidRequestError, match="commits when the handler returns"):
                await conn.commit()
        await conn.close()
        await insert_async(await ctx.async_connection(), 4)

    assert await bench.step(handler) == Succeeded("null")
    assert await bench.step(on_loop) == Succeeded("null")
    assert await bench.rows() == [1, 2, 3, 4]


async def test_sqlalchemys_own_transaction_object_cannot_end_it_either(bench: Bench) -> None:
    for end in ("commit", "rollback"):
        outcome = await bench.step(lambda ctx, end=end: getattr(ctx.connection().get_transaction(), end)())
        assert isinstance(outcome, Failed)
        assert "commits when the handler returns" in outcome.failure.message


async def test_rollback_undoes_what_the_step_wrote_and_it_goes_on(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        conn = ctx.connection()
        insert(conn, 1)
        conn.rollback()
        insert(conn, 2)
        with pytest.raises(IntegrityError):
            insert(conn, 2)
        conn.rollback()
        insert(conn, 3)

    async def on_loop(ctx: Ctx) -> None:
        conn = await ctx.async_connection()
        await insert_async(conn, 4)
        await conn.rollback()
        await insert_async(conn, 5)

    assert await bench.step(handler) == Succeeded("null")
    assert await bench.step(on_loop) == Succeeded("null")
    assert await bench.rows() == [3, 5]


@pytest.mark.parametrize("sql", ["commit", "rollback", "commit; begin", "rollback; begin", "release durable_step"])
async def test_a_transaction_ended_by_sql_is_lost_and_says_so(bench: Bench, sql: str) -> None:
    await bench.begin()
    with pytest.raises(TransactionLost) as lost:
        await bench.call(lambda ctx: ctx.connection().connection.driver_connection.execute(sql) and None)
    outcome = lost.value.outcome
    assert isinstance(outcome, Failed)
    assert not outcome.retryable
    assert outcome.failure.kind == "critical"
    assert "leave COMMIT and ROLLBACK out" in outcome.failure.message
    await bench.conn.execute("rollback")


async def test_a_failure_after_that_is_carried_by_the_loss(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        ctx.connection().connection.driver_connection.execute("commit; begin")  # type: ignore[union-attr]
        raise ValueError("and then")

    await bench.begin()
    with pytest.raises(TransactionLost, match="the rollback to its savepoint failed") as lost:
        await bench.call(handler)
    assert isinstance(lost.value.outcome, Failed)
    assert lost.value.outcome.failure.message == "and then"
    await bench.conn.execute("rollback")


async def test_the_connection_is_dead_after_the_handler(bench: Bench) -> None:
    kept: list[Any] = []

    def handler(ctx: Ctx) -> None:
        conn = ctx.connection()
        kept.extend([ctx, conn, conn.connection.driver_connection, Session(bind=conn)])

    async def on_loop(ctx: Ctx) -> None:
        conn = await ctx.async_connection()
        kept.extend([ctx, conn, (await conn.get_raw_connection()).driver_connection])

    await bench.begin()
    await bench.call(handler)
    ctx, conn, raw, session = kept
    for use in (
        lambda: conn.execute(text("select 1")),
        conn.rollback,
        lambda: session.execute(text("select 1")),
        lambda: raw.execute("select 1"),
        ctx.connection,
    ):
        with pytest.raises((ResourceClosedError, psycopg.InterfaceError, InvalidRequestError)):
            await asyncio.to_thread(use)
    kept.clear()
    await bench.call(on_loop)
    ctx, conn, raw = kept
    for use_async in (
        lambda: conn.execute(text("select 1")),
        conn.rollback,
        lambda: raw.execute("select 1"),
        ctx.async_connection,
    ):
        with pytest.raises((ResourceClosedError, psycopg.InterfaceError)):
            await use_async()
    await bench.conn.execute("commit")


async def test_a_task_left_behind_cannot_use_it(bench: Bench) -> None:
    left: list[asyncio.Task[Any]] = []

    async def handler(ctx: Ctx) -> None:
        conn = await ctx.async_connection()
        left.append(asyncio.create_task(conn.execute(text("select pg_sleep(60)"))))
        while bench.conn.info.transaction_status is not TransactionStatus.ACTIVE:
            await asyncio.sleep(0)

    await bench.begin()
    outcome = await bench.call(handler)
    assert isinstance(outcome, Failed)  # its statement was cut off: the transaction was aborted
    assert "aborted" in outcome.failure.message
    with pytest.raises(OperationalError):
        await left[0]
    await bench.conn.execute("commit")


async def test_a_thread_left_behind_cannot_use_it(bench: Bench) -> None:
    errors: list[BaseException] = []

    def left(conn: Any) -> None:
        for _ in range(2):
            try:
                conn.execute("select pg_sleep(60)")
            except psycopg.Error as error:
                errors.append(error)

    def handler(ctx: Ctx) -> None:
        raw = ctx.connection().connection.driver_connection
        threads.append(threading.Thread(target=left, args=[raw]))
        threads[0].start()
        while bench.conn.info.transaction_status is not TransactionStatus.ACTIVE:
            pass

    threads: list[threading.Thread] = []
    await bench.begin()
    assert isinstance(await bench.call(handler), Failed)
    await bench.conn.execute("commit")
    threads[0].join(30)
    assert [type(error) for error in errors] == [psycopg.errors.QueryCanceled, psycopg.InterfaceError]


async def test_nobody_gets_it_for_the_first_time_after_the_end(bench: Bench) -> None:
    """It may be in the middle of the run's next step then."""
    contexts: list[Ctx] = []

    async def handler(ctx: Ctx) -> None:
        contexts.append(ctx)

    await bench.begin()
    assert isinstance(await bench.call(handler), Succeeded)
    with pytest.raises(psycopg.InterfaceError, match="has ended"):
        _ = await contexts[0].async_connection()
    with pytest.raises(psycopg.InterfaceError, match="has ended"):
        await asyncio.to_thread(contexts[0].connection)
    assert bench.borrowed == 0
    await bench.conn.execute("commit")


async def test_the_wrong_kind_says_which_is_right(bench: Bench) -> None:
    async def on_loop(ctx: Ctx) -> None:
        with pytest.raises(InvalidRequestError, match=r"use `await ctx.async_connection\(\)`"):
            ctx.connection()
        _ = await ctx.async_connection()
        with pytest.raises(InvalidRequestError, match="one connection, one kind"):
            await asyncio.to_thread(ctx.connection)

    def handler(ctx: Ctx) -> None:
        with pytest.raises(InvalidRequestError, match=r"use `ctx.connection\(\)`"):
            asyncio.run(_await(ctx))
        with pytest.raises(InvalidRequestError, match=r"use `ctx.connection\(\)`"):
            _ = ctx.async_connection()

    def first(ctx: Ctx) -> Any:
        ctx.connection()
        return then(ctx)

    async def then(ctx: Ctx) -> None:
        with pytest.raises(InvalidRequestError, match="one connection, one kind"):
            _ = await ctx.async_connection()

    assert await bench.step(on_loop) == Succeeded("null")
    assert await bench.step(handler) == Succeeded("null")
    assert await bench.step(first) == Succeeded("null")


async def _await(ctx: Ctx) -> None:
    _ = await ctx.async_connection()


async def test_a_call_without_a_lender_says_so(bench: Bench) -> None:
    call = a_call(lambda ctx: ctx.connection())
    outcome = await bench.caller.run(call, a_view(), None, now=lambda: datetime.now(UTC), cancelled=threading.Event())
    assert isinstance(outcome, Failed)
    assert "no transaction" in outcome.failure.message


# ---------------------------------------------------------------- aborted, refused, lost


async def test_an_aborted_transaction_is_a_failed_attempt(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        conn = ctx.connection()
        insert(conn, 1)
        with pytest.raises(IntegrityError):
            insert(conn, 1)

    outcome = await bench.step(handler)
    assert isinstance(outcome, Failed)
    assert outcome.retryable
    assert "the step's transaction was aborted: UniqueViolation" in outcome.failure.message
    assert await bench.rows() == []


async def test_a_deferred_constraint_fails_the_attempt(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        ctx.connection().execute(text("insert into t values (1, 99)"))

    outcome = await bench.step(handler)
    assert isinstance(outcome, Failed)
    assert outcome.failure.type == "psycopg.errors.ForeignKeyViolation"
    assert outcome.retryable
    assert await bench.rows() == []
    assert await bench.journal() == ["Failed"]


async def test_a_dead_connection_is_a_lost_transaction_that_carries_the_outcome(bench: Bench) -> None:
    async def kill() -> None:
        await bench.other.execute("select pg_terminate_backend(%s)", [bench.conn.info.backend_pid])

    def handler(ctx: Ctx) -> int:
        insert(ctx.connection(), 1)
        asyncio.run_coroutine_threadsafe(kill(), loop).result()
        with pytest.raises(OperationalError):
            insert(ctx.connection(), 2)
        with pytest.raises(InvalidRequestError):
            insert(ctx.connection(), 3)
        return 5

    loop = asyncio.get_running_loop()
    await bench.begin()
    with pytest.raises(TransactionLost) as lost:
        await bench.call(handler)
    assert lost.value.outcome == Succeeded("5")
    assert bench.conn.closed


async def test_a_connection_that_dies_unseen_is_lost_at_the_settlement(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> None:
        await insert_async(await ctx.async_connection(), 1)
        await bench.other.execute("select pg_terminate_backend(%s)", [bench.conn.info.backend_pid])

    await bench.begin()
    with pytest.raises(TransactionLost) as lost:
        await bench.call(handler)
    assert lost.value.outcome == Succeeded("null")


async def test_a_connection_that_dies_before_it_is_lent_is_lost(bench: Bench) -> None:
    async def kill() -> None:
        await bench.other.execute("select pg_terminate_backend(%s)", [bench.conn.info.backend_pid])

    bench.when_borrowed = kill
    await bench.begin()
    with pytest.raises(TransactionLost, match="could not be made ready") as lost:
        await bench.call(lambda ctx: insert(ctx.connection(), 1))
    assert isinstance(lost.value.outcome, Failed)


async def test_a_connection_that_cannot_be_opened_leaves_nothing_open(bench: Bench) -> None:
    await bench.step(lambda ctx: insert(ctx.connection(), 1))
    gate = Gate("step 'x'")
    gate.closed = "over"
    with pytest.raises(InterfaceError, match="over"):
        bench.caller.engines.open_sync(bench.conn, gate)
    gc.collect()  # SQLAlchemy would warn


async def test_what_borrow_raises_comes_out_whatever_the_handler_makes_of_it(bench: Bench) -> None:
    class ClaimLost(Exception):
        pass

    def refuse() -> None:
        raise ClaimLost

    def handler(ctx: Ctx) -> str:
        with pytest.raises(ClaimLost):
            ctx.connection()
        return "never mind"

    async def on_loop(ctx: Ctx) -> str:
        with pytest.raises(ClaimLost):
            _ = await ctx.async_connection()
        return "never mind"

    bench.when_borrowed = refuse
    with pytest.raises(ClaimLost):
        await bench.call(handler)
    with pytest.raises(ClaimLost):
        await bench.call(on_loop)


async def test_a_value_that_the_store_refuses_undoes_what_the_step_wrote(bench: Bench) -> None:
    def check(value: str, what: str) -> None:
        raise PayloadError(f"{value} is too large", where=what)

    async with _caller(bench, check=check):
        outcome = await bench.step(lambda ctx: insert(ctx.connection(), 1))
    assert isinstance(outcome, Failed)
    assert (outcome.failure.kind, outcome.retryable) == ("critical", False)
    assert outcome.failure.message == "the result of step 'charge': null is too large"
    assert await bench.rows() == []


# ---------------------------------------------------------------- settings


async def test_lock_timeout_is_not_the_steps(bench: Bench) -> None:
    def handler(ctx: Ctx) -> str:
        return str(ctx.connection().execute(text("show lock_timeout")).scalar_one())

    assert await bench.step(handler) == Succeeded('"0"')


async def test_set_local_of_the_step_does_not_reach_the_engines_writes(bench: Bench) -> None:
    names = ("role", "search_path", "statement_timeout", "lock_timeout", "synchronous_commit")

    async def settings() -> list[Any]:
        return [(await (await bench.conn.execute(f"show {name}")).fetchone())[0] for name in names]  # type: ignore[index]

    def handler(ctx: Ctx) -> None:
        conn = ctx.connection()
        values = ("pg_monitor", "nowhere", "1234", "4321", "off")
        for name, value in zip(names, values, strict=True):
            conn.execute(text(f"set local {name} = '{value}'"))

    before = await settings()
    await bench.begin()
    await bench.call(handler)
    assert await settings() == before
    await bench.conn.execute("commit")


# ---------------------------------------------------------------- reruns


async def test_a_serialization_failure_reruns_the_attempt_uncounted(bench: Bench) -> None:
    runs: list[int] = []

    def handler(ctx: Ctx) -> int:
        conn = ctx.connection()
        insert(conn, 1)
        runs.append(ctx.attempt)
        if len(runs) < 3:
            conn.execute(text("do $$ begin raise exception using errcode = '40001'; end $$"))
        return len(runs)

    assert await bench.step(handler) == Succeeded("3")
    assert runs == [1, 1, 1]
    assert bench.borrowed == 1
    assert await bench.rows() == [1]


async def test_reruns_end(bench: Bench) -> None:
    runs: list[int] = []

    async def handler(ctx: Ctx) -> None:
        runs.append(1)
        conn = await ctx.async_connection()
        await conn.execute(text("do $$ begin raise exception using errcode = '40P01'; end $$"))

    outcome = await bench.step(handler)
    assert len(runs) == 4
    assert isinstance(outcome, Failed)
    assert outcome.retryable
    await bench.step(handler, work={"at_most_once": True})
    assert len(runs) == 5


async def test_a_deadlock_reruns_the_victim(bench: Bench) -> None:
    await bench.other.execute("insert into t values (1), (2)")
    await bench.conn.execute("set deadlock_timeout = '10ms'")
    runs: list[int] = []
    async with await psycopg.AsyncConnection.connect(bench.dsn) as rival:
        await rival.execute("set deadlock_timeout = '10min'")
        await rival.execute("update t set parent = 1 where x = 1")
        blocked = asyncio.Event()

        async def block() -> None:
            blocked.set()
            await rival.execute("update t set parent = 2 where x = 2")
            await rival.commit()

        async def handler(ctx: Ctx) -> None:
            runs.append(1)
            conn = await ctx.async_connection()
            await conn.execute(text("update t set parent = null where x = 2"))
            if len(runs) == 1:
                tasks.append(asyncio.create_task(block()))
                await _until_waiting(bench)
            await conn.execute(text("update t set parent = null where x = 1"))

        tasks: list[asyncio.Task[None]] = []
        assert isinstance(await bench.step(handler), Succeeded)
        await tasks[0]
    assert len(runs) == 2
    rows = await (await bench.other.execute("select parent from t order by x")).fetchall()
    assert rows == [(None,), (None,)]


async def _until_waiting(bench: Bench, event: str = "wait_event_type = 'Lock'") -> None:
    """Until a session of this database waits for that."""
    ours = f"select 1 from pg_stat_activity where datname = current_database() and {event}"
    while await (await bench.other.execute(ours)).fetchone() is None:
        pass


# ---------------------------------------------------------------- limits and interruption


async def test_the_lent_limit_begins_with_the_loan_async(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> None:
        await insert_async(await ctx.async_connection(), 1)
        await asyncio.Event().wait()

    async with _caller(bench, lent_limit=0.02):
        outcome = await bench.step(handler)
    assert isinstance(outcome, Failed)
    assert (outcome.failure.kind, outcome.failure.type) == ("timeout", "durable.errors.StepTimeout")
    assert "take the connection last" in outcome.failure.message
    assert await bench.rows() == []


async def test_a_connection_that_comes_after_the_handlers_end_sets_no_limit(bench: Bench) -> None:
    borrowed = asyncio.Event()
    asking: list[asyncio.Task[Any]] = []

    async def handler(ctx: Ctx) -> str:
        async def ask() -> None:
            _ = await ctx.async_connection()

        asking.append(asyncio.create_task(ask()))
        await borrowed.wait()
        return "done"

    bench.when_borrowed = borrowed.set
    async with _caller(bench, lent_limit=0.0):
        assert await bench.step(handler) == Succeeded('"done"')
        await asyncio.sleep(0)  # a limit would be over by now
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.wait(asking)


async def test_out_of_time_the_sql_of_a_sync_handler_ends_too(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    def handler(ctx: Ctx) -> str:
        conn = ctx.connection()
        insert(conn, 1)
        try:
            conn.execute(text("select pg_sleep(600)"))
        except OperationalError as error:
            seen.append(type(error.orig))  # type: ignore[arg-type]
        assert ctx.cancelled
        with pytest.raises(psycopg.InterfaceError, match="out of time"):
            conn.rollback()
        return "late"

    async with _caller(bench, lent_limit=0.02):
        outcome = await bench.step(handler)
    assert seen == [psycopg.errors.QueryCanceled]
    assert isinstance(outcome, Failed)
    assert outcome.failure.kind == "timeout"
    assert await bench.rows() == []


async def test_a_cancelled_async_handler_is_rolled_back_and_raises(bench: Bench) -> None:
    at = asyncio.Event()

    async def handler(ctx: Ctx) -> None:
        conn = await ctx.async_connection()
        await insert_async(conn, 1)
        at.set()
        await conn.execute(text("select pg_sleep(600)"))

    await bench.begin()
    task = asyncio.create_task(bench.call(handler))
    await at.wait()
    await _until_waiting(bench, "wait_event = 'PgSleep'")  # a cancel that is ahead of its statement ends nothing
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.conn.info.transaction_status is TransactionStatus.INTRANS
    await bench.conn.execute("commit")
    assert await bench.rows() == []


async def test_a_cancelled_sync_handler_ends_and_what_it_wrote_counts(bench: Bench) -> None:
    loop, at = asyncio.get_running_loop(), asyncio.Event()

    def handler(ctx: Ctx) -> str:
        conn = ctx.connection()
        insert(conn, 1)
        loop.call_soon_threadsafe(at.set)
        assert bench.cancelled.wait(30)
        insert(conn, 2)
        return "late"

    await bench.begin()
    task = asyncio.create_task(bench.call(handler))
    await at.wait()
    task.cancel()
    assert await task == Succeeded('"late"')
    await bench.conn.execute("commit")
    assert await bench.rows() == [1, 2]


async def test_a_cancelled_wait_for_the_connection_ends_the_borrowing(bench: Bench) -> None:
    at, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        at.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def handler(ctx: Ctx) -> None:
        _ = await ctx.async_connection()

    bench.when_borrowed = wait
    task = asyncio.create_task(bench.call(handler))
    await at.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_eight_sync_steps_at_once_do_not_block_the_loop(bench: Bench) -> None:
    barrier = threading.Barrier(9)  # the loop is the ninth: it comes once all eight are inside

    def handler(ctx: Ctx) -> None:
        conn = ctx.connection()
        insert(conn, ctx.attempt)
        barrier.wait(30)
        barrier.wait(30)

    benches = []
    for _ in range(8):
        conn = await Connection.connect(bench.dsn, autocommit=True)
        await conn.execute("begin")
        benches.append(Bench(bench.dsn, bench.caller, conn, bench.other))
    steps = [asyncio.create_task(b.call(handler, attempt=i)) for i, b in enumerate(benches, start=1)]
    while barrier.n_waiting < 8:
        await asyncio.sleep(0)
    barrier.wait(30)
    while barrier.n_waiting < 8:
        await asyncio.sleep(0)
    barrier.wait(30)
    assert await asyncio.gather(*steps) == [Succeeded("null")] * 8
    for b in benches:
        await b.conn.execute("commit")
        await b.conn.close()
    assert await bench.rows() == [1, 2, 3, 4, 5, 6, 7, 8]


@asynccontextmanager
async def _caller(bench: Bench, **options: Any) -> AsyncIterator[None]:
    before, bench.caller = bench.caller, Caller(max_threads=1, **options)
    try:
        yield
    finally:
        await bench.caller.close()
        bench.caller = before
