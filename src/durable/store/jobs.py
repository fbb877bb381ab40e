"""Put a job for a run into the queue. Which jobs there are says :mod:`durable.queue`."""

from __future__ import annotations

import uuid
from datetime import timedelta

from durable.core.state import Run
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Flush


def queue_continuation(db: Store, flush: Flush, task: str, run: Run, *, quiet: bool) -> None:
    """The job that goes on with the run from its revision: enqueued under its lock, and last in its transaction, for a
    rival that is not committed makes it wait. `quiet`: who enqueues it looks for it, others need not be told."""
    job = {"task": task, "run": run.id, "revision": run.revision, "queue": run.queue, "priority": run.priority}
    flush.add(db.sql.enqueue, job | {"quiet": quiet})


async def ring_later(db: Store, connection: Connection, run_id: uuid.UUID, delay: timedelta) -> None:
    """The doorbell found the row busy: ring once more. Reads the run without a lock."""
    await connection.execute(db.sql.ring_later, {"run": run_id, "delay": delay})
