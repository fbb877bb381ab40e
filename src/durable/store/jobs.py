"""Put a job for a run into the queue. Which jobs there are says :mod:`durable.queue`."""

from __future__ import annotations

import uuid
from datetime import timedelta

from durable.core.state import Run
from durable.store.db import Connection, Store


async def enqueue(
    db: Store, connection: Connection, task: str, run: Run, revision: int | None = None, delay: timedelta | None = None
) -> None:
    """In the caller's transaction, and last in it: a rival that is not committed makes this wait.

    A continuation has the run's `revision`, and is enqueued under its lock. A doorbell has none, and only a doorbell
    may have a `delay`: then it is a re-ring, of which the queue keeps one for a run.
    """
    job = {"task": task, "run": run.id, "revision": revision, "queue": run.queue, "priority": run.priority}
    await connection.execute(db.sql.enqueue, job | {"delay": delay})


async def ring_later(db: Store, connection: Connection, run_id: uuid.UUID, delay: timedelta) -> None:
    """The doorbell found the row busy: ring once more. Reads the run without a lock."""
    await connection.execute(db.sql.ring_later, {"run": run_id, "delay": delay})
