"""All that executing runs takes, opened and closed together: the worker's lock, its engine, its queue, its loops."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import procrastinate

from durable.engine.engine import Engine, Options
from durable.engine.liveness import Liveness
from durable.engine.points import Hook, nothing
from durable.store import sweep as queries
from durable.worker.jobs import LastingJobManager, add_tasks, queue_app

if TYPE_CHECKING:
    from durable.durable import AsyncDurable
    from durable.waiting import Endings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """An open worker: able to execute, not fetching yet."""

    engine: Engine
    liveness: Liveness
    queue: procrastinate.App
    endings: Endings


@asynccontextmanager
async def open_session(
    app: AsyncDurable, options: Options, *, handlers_app: object, at: Hook = nothing
) -> AsyncIterator[Session]:
    """A worker's parts, registered and locked. `handlers_app` is what handlers see as ``ctx.app``."""
    await app.connect()
    endings = app._connecting.here().endings
    engine: Engine | None = None
    queue = queue_app(app.store)
    manager = queue.job_manager
    assert isinstance(manager, LastingJobManager)

    async def registered(worker: int) -> None:
        """This worker has a (new) id: its claims and its jobs go under it."""
        if engine is not None:
            engine.worker = worker
            async with engine.pool.connection() as connection:
                await queries.set_queue_worker(app.store, connection, worker, manager.worker)

    def heard(run_id: uuid.UUID) -> None:
        if engine is not None:
            engine.look(run_id)

    def lost() -> None:
        if engine is not None:
            engine.look_at_all()

    liveness = Liveness(app.store, app.queue, heard=heard, lost=lost, registered=registered)
    worker = await liveness.start()
    engine = Engine(
        app.store, app.registry, options, worker=worker, queue=app.queue, app=handlers_app, hooks=app.hooks, at=at
    )
    engine.ended = endings.ended
    manager.registered = lambda: registered(liveness.worker)
    try:
        await engine.open()
        add_tasks(queue, engine, liveness.alive.wait, endings)
        async with queue.open_async():
            yield Session(engine, liveness, queue, endings)
    finally:
        await engine.close()
        await liveness.stop()
