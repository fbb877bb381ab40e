"""The queue's side of a worker: procrastinate's app and worker, made to outlast the database.

procrastinate's own loops end at the first error of the database (a fetch that fails ends the worker, a listener or
heartbeat that fails stops it with exit code 0), and a finish that fails leaves its job `doing` for ever. Here each of
them is tried again until the database answers. Jobs are fetched and finished on connections in autocommit mode without
a check on checkout, and commit asynchronously: what gets lost by that is delivered twice, which changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import procrastinate
from procrastinate import exceptions
from procrastinate import jobs as queue_jobs
from procrastinate.manager import JobManager, NotificationCallback
from procrastinate.worker import Worker as QueueWorker
from psycopg import Error as DatabaseError
from psycopg import errors, sql
from psycopg_pool import AsyncConnectionPool

from durable.engine.advance import advance
from durable.engine.compensate import compensate
from durable.engine.deliver import deliver
from durable.engine.engine import Engine
from durable.engine.points import Point
from durable.logs import inside
from durable.queue import ADVANCE, COMPENSATE, RING
from durable.store.db import Connection, Store, connection_settings

log = logging.getLogger(__name__)

POLLING: Final = 1.0
"""Seconds after which the queue is looked at although nobody rang: re-rings, and lost notifications."""
CONNECTIONS: Final = 4


def queue_app(store: Store) -> procrastinate.App:
    """procrastinate on our schema."""

    async def configure(connection: Connection) -> None:
        await connection.set_autocommit(True)  # as a connection setting it would break the listener
        await connection.execute(sql.SQL("set search_path to {}, public").format(sql.Identifier(store.schema)))
        await connection.execute("set synchronous_commit to off")

    def pool(**settings: Any) -> AsyncConnectionPool[Any]:
        settings.pop("check", None)
        return AsyncConnectionPool(**settings)

    connector = procrastinate.PsycopgConnector(
        pool_factory=pool,
        conninfo=store.dsn,
        min_size=1,
        max_size=CONNECTIONS,
        configure=configure,
        kwargs=connection_settings(store.dsn, "durable queue"),
    )
    app = procrastinate.App(connector=connector)
    app.job_manager = LastingJobManager(connector)
    return app


def add_tasks(app: procrastinate.App, engine: Engine, ready: Callable[[], Awaitable[object]]) -> None:
    """The three kinds of job. Each waits until this worker is known to be alive."""

    def add(name: str, job: Callable[..., Awaitable[None]]) -> None:
        async def perform(run_id: str, revision: int | None = None) -> None:
            await ready()
            given = (uuid.UUID(run_id),) if revision is None else (uuid.UUID(run_id), revision)
            with inside(run=run_id):
                try:
                    await job(engine, *given)
                except engine.DATABASE_ERRORS as error:
                    log.warning("run %s: left to recovery after: %s: %s", run_id, type(error).__name__, error)
            engine.at(Point.BEFORE_FINISH, "-")

        app.task(name=name)(perform)

    add(ADVANCE, advance)
    add(COMPENSATE, compensate)
    add(RING, deliver)


class LastingJobManager(JobManager):
    """Tries again where procrastinate's gives up. `worker` is the id under which its jobs are marked `doing`."""

    worker: int | None = None
    registered: Callable[[], Awaitable[None]] | None = None

    async def register_worker(self) -> int:
        self.worker = await super().register_worker()
        if self.registered is not None:
            await self.registered()
        return self.worker

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> queue_jobs.Job | None:
        try:
            return await super().fetch_job(queues=queues, worker_id=self.worker or worker_id)
        except exceptions.ConnectorException as error:
            if isinstance(error.__cause__, errors.ForeignKeyViolation):
                await self._come_back()
                return None
            log.warning("cannot fetch jobs: %s", _cause(error))
            await asyncio.sleep(0.5)
            return None

    async def _come_back(self) -> None:
        """This worker was taken for dead, and forgotten: it had been stopped, or cut off. It goes on under a new id,
        which procrastinate's own worker does not know: hence `self.worker` everywhere."""
        try:
            await self.register_worker()
        except (exceptions.ConnectorException, DatabaseError) as error:
            log.warning("cannot register with the queue again: %s", _cause(error))
            await asyncio.sleep(0.5)

    async def finish_job(self, job: queue_jobs.Job, status: queue_jobs.Status, delete_job: bool) -> None:
        """A row that is gone has been deleted by recovery; one that cannot be reached now is deleted by it later."""
        for pause in (0.1, 0.5, 2.0, 0.0):
            try:
                return await super().finish_job(job=job, status=status, delete_job=delete_job)
            except exceptions.ConnectorException as error:
                if "was not found" in _cause(error):
                    return None
                log.warning("cannot finish job %s: %s", job.id, _cause(error))
                await asyncio.sleep(pause)
        return None

    async def done(self, job: queue_jobs.Job) -> None:
        """Delete a job that has been performed."""
        await self.finish_job(job, queue_jobs.Status.SUCCEEDED, delete_job=True)

    async def update_heartbeat(self, worker_id: int) -> None:
        try:
            await super().update_heartbeat(self.worker or worker_id)
        except exceptions.ConnectorException as error:
            log.warning("cannot update the queue's heartbeat: %s", _cause(error))

    async def listen_for_jobs(
        self, *, on_notification: NotificationCallback, queues: Iterable[str] | None = None
    ) -> None:
        while True:
            try:
                await super().listen_for_jobs(on_notification=on_notification, queues=queues)
            except exceptions.ConnectorException as error:
                log.warning("cannot listen for jobs, polling meanwhile: %s", _cause(error))
            await asyncio.sleep(0.5)

    async def unregister_worker(self, worker_id: int) -> None:
        try:
            await super().unregister_worker(self.worker or worker_id)
        except exceptions.ConnectorException as error:
            log.warning("cannot unregister from the queue: %s", _cause(error))


class LastingWorker(QueueWorker):
    """A worker whose monitor watches the side tasks: without a periodic task its deferrer would end, and with that the
    watch."""

    async def _periodic_deferrer(self) -> None:
        await asyncio.Event().wait()

    def end(self) -> None:
        """Fetch no more; `serve` returns when what runs has ended."""
        self.stop()  # type: ignore[no-untyped-call]

    async def serve(self) -> None:
        await self.run()  # type: ignore[no-untyped-call]

    @property
    def running(self) -> list[int]:
        """The jobs that it executes."""
        return [context.job.id for context in self._running_jobs.values() if context.job.id is not None]


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error)
