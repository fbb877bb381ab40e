"""Locking, letting go, and the jobs. The flush with COMMIT in its middle: test_apply.py."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from tests.store.kit import jobs, lock, read, rows, started, wait_until_blocked

from durable.core.state import MessageKind, Run
from durable.queue import RERING, RING
from durable.store import operations
from durable.store.connection import Connection
from durable.store.db import Store, connection_settings
from durable.store.errors import RowBusy
from durable.store.flush import Flush
from durable.store.inbox import load_inbox, mark_seen
from durable.store.jobs import queue_continuation, ring_later
from durable.store.journal import load_journal
from durable.store.runs import abandon, begin_and_lock, commit

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


async def test_with_the_journal(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    columns = "run_id, step_id, seq, kind, status, result, attempt, finished_at"
    for seq, name in enumerate(("b", "a")):
        insert = f"insert into durable.journal ({columns}) values (%s, %s, %s, 'step', 'completed', '1', 1, now())"
        await connection.execute(insert.encode(), [run.id, name, seq])
    for with_journal in (False, True, True):
        locked = await begin_and_lock(store, connection, run.id, with_journal=with_journal)
        assert locked is not None
        if with_journal:
            assert locked.journal == await load_journal(store, connection, run.id)
            assert list(locked.journal) == ["b", "a"]
        else:
            assert locked.journal is None
        await abandon(connection)
    assert await begin_and_lock(store, connection, uuid.uuid4(), with_journal=True) is None
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
                await begin_and_lock(store, connection, run.id, with_journal=True)
            assert state(connection) is IDLE
            assert await begin_and_lock(store, connection, run.id, "skip", with_journal=True) is None
            assert state(connection) is IDLE
    assert await begin_and_lock(store, connection, run.id) is not None
    await connection.rollback()


async def test_what_happened_while_it_waited_is_seen(module_dsn: str, store: Store) -> None:
    """A signal that commits between the holder's inbox read and its park: the next holder reads it, and the time is
    that of the lock, not of the question."""
    with psycopg.connect(module_dsn) as holder, ThreadPoolExecutor() as threads:
        async with await Connection.connect(module_dsn, autocommit=True) as mine:
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


async def test_a_wait_for_the_lock_that_is_cancelled(module_dsn: str, store: Store, rival: Connection) -> None:
    """Nobody knows how far the server has come, so the connection is closed; the server lets go of the lock by itself,
    which it may be given still."""
    run = await started(store, rival)
    for _ in range(3):
        async with await Connection.connect(module_dsn, autocommit=True) as mine:
            pid = mine.info.backend_pid
            async with rival.transaction():
                await read(store, rival, run.id)
                waiting = asyncio.create_task(begin_and_lock(store, mine, run.id))
                with ThreadPoolExecutor() as threads:
                    await asyncio.wrap_future(threads.submit(wait_until_blocked, module_dsn, pid))
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert mine.closed
        async with await Connection.connect(module_dsn, autocommit=True) as another:
            assert await begin_and_lock(store, another, run.id) is not None  # there is no lock_timeout: it may wait
            await commit(store, another)


async def test_a_commit_that_is_none(store: Store, connection: Connection) -> None:
    await connection.execute("begin")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.execute("select 1 / 0")
    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        await commit(store, connection)
    assert state(connection) is IDLE


async def test_abandoned(store: Store, connection: Connection) -> None:
    run = await started(store, connection)
    await abandon(connection)  # there is nothing to roll back
    assert state(connection) is IDLE
    await begin_and_lock(store, connection, run.id)
    await connection.execute("update durable.runs set reason = 'x' where id = %s", [run.id])
    await abandon(connection)
    assert state(connection) is IDLE
    assert await read(store, connection, run.id) == run
    await connection.close()
    await abandon(connection)
    assert connection.closed


async def test_a_connection_that_is_lost(store: Store, connection: Connection, module_dsn: str) -> None:
    run = await started(store, connection)
    for attempt in (commit, abandon):
        async with await Connection.connect(module_dsn, autocommit=True) as mine:
            await begin_and_lock(store, mine, run.id)
            await connection.execute("select pg_terminate_backend(%s, 10000)", [mine.info.backend_pid])
            if attempt is commit:
                with pytest.raises(psycopg.OperationalError):
                    await commit(store, mine)
            else:
                await abandon(mine)
            assert mine.closed
    assert await begin_and_lock(store, connection, run.id) is not None
    await connection.rollback()


async def enqueue(
    store: Store, connection: Connection, task: str, run: Run, revision: int, *, quiet: bool = False
) -> None:
    flush = Flush(connection)
    queue_continuation(store, flush, task, replace(run, revision=revision), quiet=quiet)
    await flush.send()


async def ring(connection: Connection, run: Run) -> None:
    await connection.execute("select durable.enqueue(%s, %s, null, %s, %s)", [RING, run.id, run.queue, run.priority])


async def test_jobs(store: Store, connection: Connection) -> None:
    run = await started(store, connection, priority=-3)
    await enqueue(store, connection, "durable.advance", run, 4)
    await enqueue(store, connection, "durable.advance", run, 4)  # the same revision once
    await enqueue(store, connection, "durable.compensate", run, 5)
    await ring(connection, run)
    await ring(connection, run)  # never collapsed
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


async def test_a_quiet_job_is_not_announced(store: Store, connection: Connection, module_dsn: str) -> None:
    """Whatever is behind it tells that nothing was said before."""
    run = await started(store, connection)
    async with await Connection.connect(module_dsn, autocommit=True) as listener:
        await listener.execute('listen "procrastinate_queue_v1#shop"')
        for quiet in (True, False):
            await enqueue(store, connection, "durable.advance", run, 4 + quiet, quiet=quiet)
            await connection.execute("select pg_notify('procrastinate_queue_v1#shop', 'behind')")
        heard = [notification.payload async for notification in listener.notifies(timeout=20, stop_after=3)]
    assert [payload == "behind" for payload in heard] == [True, False, True]
    assert len(await jobs(store, connection, run.id)) == 3


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
