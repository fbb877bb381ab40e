"""For tests of the store: runs made quickly, and facts waited for."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Any

import psycopg

from durable.core.state import Run
from durable.core.transition import Transition
from durable.store import codec, operations
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import translated
from durable.store.flush import send
from durable.store.operations import Start
from durable.store.runs import Mode


def new(workflow: str = "order", **more: Any) -> Start:
    run = Start(uuid.uuid4(), workflow, "1", '{"n": 1}', "shop")
    return replace(run, **more)


async def started(store: Store, connection: Connection, **more: Any) -> Run:
    """A run that has just been started."""
    run = new(**more)
    await operations.execute_async(operations.start(store, run), connection)
    return await read(store, connection, run.id)


async def read(store: Store, connection: Connection, run_id: uuid.UUID) -> Run:
    found = await lock(store, connection, run_id)
    assert found is not None
    return found[0]


async def lock(
    store: Store, connection: Connection, run_id: uuid.UUID, mode: Mode = "wait"
) -> tuple[Run, datetime] | None:
    """The run and the engine's time, in the transaction that is open, or for the statement's time if none is. None:
    there is no such run, or it was skipped. Raises RowBusy."""
    with translated():
        answer = await send(connection, store.sql.lock if mode == "wait" else store.sql.lock_free, {"run": run_id})
    row = answer.row
    return None if row is None else (codec.run(row[:-1], store.payloads), row[-1])


def moved(before: Run, **changes: Any) -> Run:
    return replace(before, revision=before.revision + 1, **changes)


def transition(before: Run, *, after: dict[str, Any] | None = None, **parts: Any) -> Transition:
    return Transition(before, moved(before, **(after or {})), **parts)


async def jobs(store: Store, connection: Connection, run_id: uuid.UUID) -> list[tuple[Any, ...]]:
    """(task, revision, priority, queueing_lock) of the jobs of a run, in the order in which they came."""
    cursor = await connection.execute(
        f"select task_name, args -> 'revision', priority, queueing_lock, queue_name, lock, scheduled_at is not null "
        f"from {store.schema}.procrastinate_jobs where args ->> 'run_id' = %s order by id".encode(),
        [str(run_id)],
    )
    return await cursor.fetchall()


async def rows(connection: Connection, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    return await (await connection.execute(sql.encode(), params)).fetchall()


def wait_until_blocked(dsn: str, pid: int, seconds: float = 20) -> None:
    """Until that backend waits for a lock: seen in pg_stat_activity, never guessed by the clock."""
    end = time.monotonic() + seconds
    with psycopg.connect(dsn, autocommit=True) as connection:
        while time.monotonic() < end:
            row = connection.execute("select wait_event_type from pg_stat_activity where pid = %s", [pid]).fetchone()
            if row == ("Lock",):
                return
    raise AssertionError(f"backend {pid} does not wait for a lock")
