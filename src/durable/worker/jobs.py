"""The queue's side of a worker: procrastinate's app and job manager, made to outlast the database.

procrastinate's own loops end at the first error of the database (a fetch that fails ends the worker, a listener or
heartbeat that fails stops it with exit code 0), and a finish that fails leaves its job `doing` for ever. Here each of
them is tried again until the database answers. Jobs are fetched and finished many at a time, by one statement, on
connections in autocommit mode without a check on checkout, and commit asynchronously: what gets lost by that is
delivered twice, which changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Final

import procrastinate
from procrastinate import exceptions
from procrastinate import jobs as queue_jobs
from procrastinate.manager import JobManager, NotificationCallback
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
from durable.queue_schema import NOT_FOR_FETCH
from durable.store.connection import Connection
from durable.store.db import Store, connection_settings

log = logging.getLogger(__name__)

CONNECTIONS: Final = 4
FINISH_TRIES: Final = 4
"""How often a job that was performed is finished until that is left to recovery."""

# What procrastinate's own functions for a fetch and a finish do, for many jobs, in one round trip. `done` and the fetch
# see the queue as it was before: a job whose lock one of `performed` had is seen by the next fetch.
EXCHANGE: Final = """
-- finish jobs that were performed, and fetch others
with done as (
  delete from procrastinate_jobs where id in (
    select job.id from procrastinate_jobs job
    join unnest(%(performed)s::bigint[], %(performers)s::bigint[]) as performed (id, worker) on performed.id = job.id
    where job.status = 'doing' and (job.worker_id = performed.worker or job.worker_id is null)
    for update of job skip locked)
), next as (
  select job.id from procrastinate_jobs job
  where job.status = 'todo'
    and (%(queues)s::varchar[] is null or job.queue_name = any (%(queues)s::varchar[]))
    and (job.scheduled_at is null or job.scheduled_at <= now())
    and not exists (
      select from procrastinate_jobs other
      where job.lock is not null and other.lock = job.lock
        and (other.status = 'doing' or other.status = 'todo'
             and (other.priority > job.priority or other.priority = job.priority and other.id < job.id)))
  order by job.priority desc, job.id
  limit %(wanted)s::int
  for update of job skip locked
)
update procrastinate_jobs job set status = 'doing', worker_id = %(worker)s from next where job.id = next.id
returning job.*
"""

# For the statement above, as in the queue's own functions: nothing of it may cost more when more jobs wait.
SETTINGS: Final = {"synchronous_commit": "off", "plan_cache_mode": "force_generic_plan", "jit": "off"} | dict.fromkeys(
    NOT_FOR_FETCH, "off"
)


def queue_app(store: Store) -> procrastinate.App:
    """procrastinate on our schema."""

    async def configure(connection: Connection) -> None:
        await connection.set_autocommit(True)  # as a connection setting it would break the listener
        path = {"search_path": f"{sql.Identifier(store.schema).as_string()}, public"}
        settings = (sql.SQL("set_config({}, {}, false)").format(*item) for item in (path | SETTINGS).items())
        await connection.execute(sql.SQL("select {}").format(sql.SQL(", ").join(settings)))

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

    async def exchange(
        self, performed: Collection[queue_jobs.Job], wanted: int, queues: Iterable[str] | None = None
    ) -> list[queue_jobs.Job] | None:
        """Finish jobs that were performed, and fetch up to `wanted` others, the most urgent first.

        Finished is deleted, but only what still is in the hands that it was fetched by, or in nobody's since this
        worker was taken for dead. None: the database did not answer, a moment ago; nothing is known of either.
        """
        try:
            rows = await self.connector.execute_query_all_async(
                EXCHANGE,
                performed=[job.id for job in performed],
                performers=[job.worker_id for job in performed],
                queues=list(queues) if queues is not None else None,
                wanted=wanted,
                worker=self.worker,
            )
        except exceptions.ConnectorException as error:
            if isinstance(error.__cause__, errors.ForeignKeyViolation):
                await self._come_back()
                return None
            log.warning("cannot fetch or finish jobs: %s", _cause(error))
            await asyncio.sleep(0.5)
            return None
        return sorted(map(queue_jobs.Job.from_row, rows), key=lambda job: (-job.priority, job.id))

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> queue_jobs.Job | None:
        """One job, if there is one and the database answers."""
        found = await self.exchange([], 1, queues)
        return found[0] if found else None

    async def done(self, job: queue_jobs.Job) -> None:
        """Finish one job that was performed."""
        for _ in range(FINISH_TRIES):
            if await self.exchange([job], 0) is not None:
                return

    async def _come_back(self) -> None:
        """This worker was taken for dead, and forgotten: it had been stopped, or cut off. It goes on under a new id,
        which procrastinate's own worker does not know: hence `self.worker` everywhere."""
        try:
            await self.register_worker()
        except (exceptions.ConnectorException, DatabaseError) as error:
            log.warning("cannot register with the queue again: %s", _cause(error))
            await asyncio.sleep(0.5)

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


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error)
