"""What the engine asks and says outside a run's own transaction: each in one statement, on any free connection."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final

from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Flush
from durable.store.query import Statements, statement

LATER: Final = timedelta(seconds=1)
"""When a job that found its run's row busy comes again."""


class NudgeSql(Statements):
    """Statements of this room."""

    enqueue = statement("""
-- a continuation for the revision that was written, or was found busy; harmless if the run has moved on
select {schema}.enqueue(%(task)s, id, %(revision)s, queue, priority, %(delay)s) from {schema}.runs where id = %(run)s
""")

    cancel_asked = statement("""
-- whether an executing handler is to be interrupted
select 1 from {schema}.inbox where run_id = %(run)s and kind = 'cancel' and state <> 'taken' limit 1
""")

    tell_owner = statement("""
-- the worker that has the claim should look at the run
select pg_notify(%(channel)s, %(run)s)
""")

    report = statement("""
-- what an executing step says of itself
insert into {schema}.progress (run_id, step_id, body, at) values (%(run)s, %(step)s, %(body)s, {schema}.engine_now())
on conflict (run_id, step_id) do update set body = excluded.body, at = excluded.at
""")


@lru_cache
def statements(schema: str) -> NudgeSql:
    """The statements for one schema."""
    return NudgeSql(schema)


async def enqueue_again(
    db: Store, connection: Connection, run_id: uuid.UUID, revision: int, task: str, delay: timedelta | None = None
) -> None:
    """A continuation that nobody enqueued with the run's own write. Reads the run without a lock."""
    values = {"task": task, "run": run_id, "revision": revision, "delay": delay}
    await connection.execute(statements(db.schema).enqueue, values)


async def cancel_asked(db: Store, connection: Connection, run_id: uuid.UUID) -> bool:
    """Whether a cancel lies in the run's inbox. Reads without the run's lock."""
    cursor = await connection.execute(statements(db.schema).cancel_asked, {"run": run_id})
    return await cursor.fetchone() is not None


async def tell_owner(db: Store, connection: Connection, run_id: uuid.UUID) -> None:
    """Announce that the row or the inbox of a claimed run has news."""
    await connection.execute(statements(db.schema).tell_owner, {"channel": db.control_channel, "run": str(run_id)})


async def report(db: Store, connection: Connection, said: Mapping[tuple[uuid.UUID, str], Mapping[str, Any]]) -> None:
    """Keep what executing steps last said of themselves, for `status`. In one flush."""
    flush = Flush(connection)
    for (run_id, step_id), body in said.items():
        values = {"run": run_id, "step": step_id, "body": db.payloads.dump(body)}
        flush.add(statements(db.schema).report, values)
    await flush.send()
