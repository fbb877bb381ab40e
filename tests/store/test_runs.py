"""Locking, and the flush with COMMIT in its middle."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from tests.store.kit import jobs, read, rows, started, wait_until_blocked

from durable.core.state import MessageKind
from durable.queue import RERING, RING
from durable.store import operations
from durable.store.db import Connection, Store, connection_settings
from durable.store.errors import RowBusy
from durable.store.inbox import load_inbox, mark_seen
from durable.store.jobs import enqueue, ring_later
from durable.store.runs import Mode, begin_and_lock, commit, commit_and_lock, lock

IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS


def state(connection: Connection) -> TransactionStatus:
    return connection.info.transaction_status


async def signal(store: Store, connection: Connection, run_id: uuid.UUID, name: str = "a") -> None:
    await operations.execute_async(operations.send(store, run_id, MessageKind.SIGNAL, name), connection)


async def test_begin_and_lock(store: Store, connection: Connection, rival: Connection) -> None:
    run = await started(store, connection)
    await signal(store, connection, run.id)
    locked = await begin_and_lock(store, connection, run.id)
    assert locked is not None
    assert locked.run == run
    assert [(m.name, m.fresh) for m in locked.inbox] == [("a", True)]
    assert state(connection) is INTRANS
    assert await rows(connection, "show transaction_isolation") == [("read committed",)]
    assert await lock(store, rival, run.id, "skip") is None
    await mark_seen(store, connection, run.id, [m.seq for m in locked.inbox])
    await connection.rollback()
    assert (await load_inbox(store, connection, run.id))[0].fresh


@pytest.mark.parametrize("mode", ["wait", "skip"])
async def test_no_such_run(store: Store, connection: Connection, mode: Any) -> None:
    assert await lock(store, connection, uuid.uuid4(), mode) is None
    assert await begin_and_lock(store, connection, uuid.uuid4(), mode) is None
    assert state(connection) is IDLE


async def test_a_held_row(store: Store, connection: Connection, rival: Connection) -> None:
    run = await started(store, connection)
    async with rival.transaction():
        await read(store, rival, run.id)
        with pytest.raises(RowBusy):
            await lock(store, connection, run.id)
        assert state(connection) is IDLE
        for _ in range(8):  # also once the statements are prepared
            with pytest.raises(RowBusy):
                await begin_and_lock(store, connection, run.id)
            assert state(connection) is IDLE
            assert await begin_and_lock(store, connection, run.id, "skip") is None
            assert state(connection) is IDLE
    assert await begin_and_lock(store, connection, run.id) is not None
    await connection.rollback()


async def test_what_happened_while_it_waited_is_seen(module_dsn: str, store: Store) -> None:
    """A signal that commits between the holder's inbox read and its park: the next holder reads it, and the time is
    that of the lock, not of the question."""
    with psycopg.connect(module_dsn) as holder, ThreadPoolExecutor() as threads:
        async with await psycopg.AsyncConnection.connect(module_dsn, autocommit=True) as mine:
            run = await started(store, mine)
            holder.execute("select 1 from durable.runs where id = %s for update", [run.id])
            waiting = asyncio.create_task(begin_and_lock(store, mine, run.id))
            blocked = threads.submit(wait_until_blocked, module_dsn, mine.info.backend_pid)
            await asyncio.wrap_future(blocked)
            with psycopg.connect(module_dsn) as sender:
                operations.execute(operations.send(store, run.id, MessageKind.SIGNAL, "late"), sender)
            row = holder.execute("select durable.engine_now()").fetchone()
            holder.commit()
            locked = await waiting
            assert locked is not None
            assert row is not None
            assert [m.name for m in locked.inbox] == ["late"]
            assert locked.now >= row[0]
            await mine.rollback()


async def test_commit_and_lock(store: Store, connection: Connection, rival: Connection) -> None:
    run = await started(store, connection)
    await begin_and_lock(store, connection, run.id)
    await connection.execute("update durable.runs set reason = 'x' where id = %s", [run.id])
    await signal(store, rival, run.id, "meanwhile")
    committed = await commit_and_lock(store, connection, run.id)
    assert committed.locked is not None
    assert committed.locked.run.reason == "x"
    assert [m.name for m in committed.locked.inbox] == ["meanwhile"]
    assert await lock(store, rival, run.id, "skip") is None
    await connection.rollback()


async def test_a_relock_that_fails_after_commit_went_through(
    store: Store, connection: Connection, rival: Connection
) -> None:
    """Another run's row stands for the rival that was quicker: after COMMIT this one is held by somebody else."""
    mine, held = await started(store, connection), await started(store, connection)
    async with rival.transaction():
        await read(store, rival, held.id)
        modes: list[Mode] = ["wait", "skip"] * 7
        for mode in modes:
            await begin_and_lock(store, connection, mine.id)
            await connection.execute("update durable.runs set retries = retries + 1 where id = %s", [mine.id])
            committed = await commit_and_lock(store, connection, held.id, mode)
            assert committed.locked is None
            assert isinstance(committed.error, RowBusy) if mode == "wait" else committed.error is None
            assert state(connection) is IDLE
    assert (await read(store, connection, mine.id)).retries == 14


async def test_a_commit_that_is_refused_is_an_error(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await connection.execute("create table if not exists late (n int unique deferrable initially deferred)")
    for _ in range(7):
        await begin_and_lock(store, connection, run.id)
        await connection.execute("insert into late values (1), (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await commit_and_lock(store, connection, run.id)
        assert state(connection) is IDLE
    await begin_and_lock(store, connection, run.id)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("select 1 / 0")
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await commit_and_lock(store, connection, run.id)  # answered with ROLLBACK, without an error
    assert state(connection) is IDLE
    assert await rows(connection, "select * from late") == []


async def test_a_wait_for_the_lock_that_is_cancelled(module_dsn: str, store: Store, rival: Connection) -> None:
    async with await psycopg.AsyncConnection.connect(module_dsn, autocommit=True) as mine:
        run = await started(store, mine)
        for _ in range(7):
            async with rival.transaction():
                await read(store, rival, run.id)
                waiting = asyncio.create_task(begin_and_lock(store, mine, run.id))
                with ThreadPoolExecutor() as threads:
                    blocked = threads.submit(wait_until_blocked, module_dsn, mine.info.backend_pid)
                    await asyncio.wrap_future(blocked)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert state(mine) is IDLE
            assert await begin_and_lock(store, mine, run.id) is not None
            await commit(store, mine)


async def test_a_commit_that_is_none(store: Store, connection: Connection) -> None:
    await connection.execute("begin")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("select 1 / 0")
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await commit(store, connection)
    assert state(connection) is IDLE


async def test_a_connection_that_is_lost(store: Store, connection: Connection, module_dsn: str) -> None:
    run = await started(store, connection)
    async with await psycopg.AsyncConnection.connect(module_dsn, autocommit=True) as mine:
        await begin_and_lock(store, mine, run.id)
        await connection.execute("select pg_terminate_backend(%s, 10000)", [mine.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            await commit_and_lock(store, mine, run.id)
        assert mine.closed
    assert await begin_and_lock(store, connection, run.id) is not None
    await connection.rollback()


async def test_jobs(store: Store, connection: Connection) -> None:
    run = await started(store, connection, priority=-3)
    await enqueue(store, connection, "durable.advance", run, 4)
    await enqueue(store, connection, "durable.advance", run, 4)  # the same revision once
    await enqueue(store, connection, "durable.compensate", run, 5)
    await enqueue(store, connection, RING, run)
    await enqueue(store, connection, RING, run)  # never collapsed
    await ring_later(store, connection, run.id, RERING)
    await ring_later(store, connection, run.id, RERING)  # re-rings are one
    assert await jobs(store, connection, run.id) == [
        ("durable.advance", 0, -3, f"{run.id}:0", "shop", None, False),
        ("durable.advance", 4, 999_997, f"{run.id}:4", "shop", None, False),
        ("durable.compensate", 5, 999_997, f"{run.id}:5", "shop", None, False),
        ("durable.ring", None, 1_999_997, None, "shop", None, False),
        ("durable.ring", None, 1_999_997, None, "shop", None, False),
        ("durable.ring", None, 1_999_997, f"ring:{run.id}", "shop", None, True),
    ]


async def test_bands_never_touch(store: Store, connection: Connection) -> None:
    low, high = (
        await started(store, connection, priority=-(2**31)),
        await started(store, connection, priority=2**31 - 1),
    )
    await enqueue(store, connection, "durable.advance", low, 1)
    start, (_, continuation) = await jobs(store, connection, high.id), await jobs(store, connection, low.id)
    assert start[0][2] < continuation[2]


async def test_a_pool_sets_what_it_says(store: Store) -> None:
    pool = store.open_pool(2, application_name="mine", lock_timeout_ms=700, idle_in_transaction_ms=31_000)
    async with pool, pool.connection() as connection:
        assert connection.autocommit
        await connection.execute("set lock_timeout = 0")
        await connection.execute("reset all")
        assert await rows(connection, "select current_setting('lock_timeout'), "
                              "current_setting('idle_in_transaction_session_timeout'), "
                              "current_setting('application_name')") == [("700ms", "31s", "mine")]  # fmt: skip


def test_the_dsn_wins_over_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c e=f")
    assert connection_settings("host=x", "d", ["-c c=d"])["options"] == "-c e=f -c c=d"
    settings = connection_settings("host=x options='-c a=b' keepalives_idle=3 application_name=app", "d", ["-c c=d"])
    assert settings["options"] == "-c a=b -c c=d"
    assert "keepalives_idle" not in settings
    assert "application_name" not in settings
    assert settings["tcp_user_timeout"] == 10_000
