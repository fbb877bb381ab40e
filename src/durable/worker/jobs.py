"""The queue's side of a worker: procrastinate's app and job manager, made to outlast the database.

procrastinate's own loops end at the first error of the database (a fetch that fails ends the worker, a listener or
heartbeat that fails stops it with exit code 0), and a finish that fails leaves its job `doing` for ever. Here each of
them is tried again until the database answers. Jobs are fetched and finished many at a time, by one statement, on a
connection of the worker's own, which commits asynchronously: what gets lost by that is delivered twice, which changes
nothing. Heartbeats and the listener have procrastinate's connections: in autocommit mode, without a check on checkout.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
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
from durable.engine.slots import Slot
from durable.logs import inside
from durable.queue import ADVANCE, COMPENSATE, RING
from durable.queue_schema import NOT_FOR_FETCH
from durable.store.connection import Connection
from durable.store.db import Store, connection_settings
from durable.store.flush import Row, send
from durable.store.query import Statement
from durable.waiting import Endings

log = logging.getLogger(__name__)

NAME: Final = "durable queue"
"""What the queue's connections call themselves."""
CONNECTIONS: Final = 3
"""Of procrastinate's, at most: one listens."""
FINISH_TRIES: Final = 4
"""How often a job that was performed is finished until that is left to recovery."""

# What procrastinate's own functions for a fetch and a finish do, for many jobs, in one round trip. `done` and the fetch
# see the queue as it was before: a job whose lock one of `performed` had is seen by the next fetch.
#
# Planned once for a connection's life, maybe while the queue is empty. Joins would then be made as for no rows at all,
# and read thousands of jobs for each that they want once thousands wait. So there are none: ids come in arrays, and who
# has the same lock is asked for one job at a time, and only where there is one.
EXCHANGE: Final = Statement.of("""
-- finish jobs that were performed, and fetch others
with done as (
  delete from procrastinate_jobs where id = any (array(
    select job.id from procrastinate_jobs job
    where job.id = any (%(performed)s::bigint[]) and job.status = 'doing'
      and (job.worker_id is null
           or job.worker_id = (%(performers)s::bigint[])[array_position(%(performed)s::bigint[], job.id)])
    for update of job skip locked))
), next as (
  select job.id from procrastinate_jobs job
  where job.status = 'todo'
    and (%(queues)s::varchar[] is null or job.queue_name = any (%(queues)s::varchar[]))
    and (job.scheduled_at is null or job.scheduled_at <= now())
    and (job.lock is null or not exists (
      select from procrastinate_jobs other
      where other.lock = job.lock
        and (other.status = 'doing' or other.status = 'todo'
             and (other.priority > job.priority or other.priority = job.priority and other.id < job.id))))
  order by job.priority desc, job.id
  limit %(wanted)s::int
  for update of job skip locked
)
update procrastinate_jobs job set status = 'doing', worker_id = %(worker)s
where job.id = any (array(select id from next))
returning job.id, job.priority, job.queue_name, job.task_name, job.args, job.worker_id
""")

# For the statement above, as in the queue's own functions: nothing of it may cost more when more jobs wait.
SETTINGS: Final = {"synchronous_commit": "off", "plan_cache_mode": "force_generic_plan", "jit": "off"} | dict.fromkeys(
    NOT_FOR_FETCH, "off"
)


def queue_app(store: Store) -> procrastinate.App:
    """procrastinate on our schema."""

    async def configure(connection: Connection) -> None:
        await _configure(store, connection)

    def pool(**settings: Any) -> AsyncConnectionPool[Any]:
        settings.pop("check", None)
        return AsyncConnectionPool(**settings)

    connector = Connector(
        store,
        pool_factory=pool,
        conninfo=store.dsn,
        min_size=1,
        max_size=CONNECTIONS,
        configure=configure,
        kwargs=connection_settings(store.dsn, NAME),
    )
    app = procrastinate.App(connector=connector)
    app.job_manager = LastingJobManager(connector)
    return app


async def _configure(store: Store, connection: Connection) -> None:
    await connection.set_autocommit(True)  # as a connection setting it would break the listener
    path = {"search_path": f"{sql.Identifier(store.schema).as_string()}, public"}
    settings = (sql.SQL("set_config({}, {}, false)").format(*item) for item in (path | SETTINGS).items())
    await connection.execute(sql.SQL("select {}").format(sql.SQL(", ").join(settings)))


class Connector(procrastinate.PsycopgConnector):
    """procrastinate's, and beside its pool one connection that stays open, for the exchange of jobs."""

    def __init__(self, store: Store, **settings: Any) -> None:
        super().__init__(**settings)
        self._store = store
        self._own: Connection | None = None
        self._turn = asyncio.Lock()  # a connection answers one at a time

    async def exchange(self, values: Mapping[str, Any]) -> list[Row]:
        """What EXCHANGE answers. Raises what the server refuses; a connection that was lost is made anew next time."""
        async with self._turn:
            if self._own is None or self._own.closed:
                self._own = await self.connect()
            return (await send(self._own, EXCHANGE, values)).rows

    async def close_async(self) -> None:
        if self._own is not None:
            await self._own.close()
        await super().close_async()

    async def connect(self) -> Connection:
        """One for the exchange."""
        connection = await Connection.connect(self._store.dsn, **connection_settings(self._store.dsn, NAME))
        try:
            await _configure(self._store, connection)
        except BaseException:
            await connection.close()
            raise
        return connection


def add_tasks(app: procrastinate.App, engine: Engine, ready: Callable[[], Awaitable[object]], endings: Endings) -> None:
    """The three kinds of job. Each waits until this worker is known to be alive. `taken`: the slot of whoever
    took the job up without a fetch, and did not have to wait for that."""

    def add(name: str, job: Callable[..., Awaitable[None]]) -> None:
        async def perform(run_id: str, revision: int | None = None, taken: Slot | None = None) -> None:
            if taken is None:
                await ready()
            run = uuid.UUID(run_id)
            given = (run,) if revision is None else (run, revision)
            endings.hold(run)
            with inside(run=run_id):
                try:
                    await job(engine, *given, taken)
                except engine.DATABASE_ERRORS as error:
                    log.warning("run %s: left to recovery after: %s: %s", run_id, type(error).__name__, error)
                finally:
                    endings.let_go(run)
            engine.at(Point.BEFORE_FINISH, None)

        app.task(name=name)(perform)

    add(ADVANCE, advance)
    add(COMPENSATE, compensate)
    add(RING, deliver)


class LastingJobManager(JobManager):
    """Tries again where procrastinate's gives up. `worker` is the id under which its jobs are marked `doing`."""

    connector: Connector
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
        values = {
            "performed": [job.id for job in performed],
            "performers": [job.worker_id for job in performed],
            "queues": list(queues) if queues is not None else None,
            "wanted": wanted,
            "worker": self.worker,
        }
        try:
            return _urgent_first(await self.connector.exchange(values))
        except errors.ForeignKeyViolation:
            await self._come_back()
        except DatabaseError as error:
            log.warning("cannot fetch or finish jobs: %s", error)
            await asyncio.sleep(0.5)
        return None

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


def _urgent_first(rows: list[Row]) -> list[queue_jobs.Job]:
    """The jobs that EXCHANGE fetched."""
    return [
        in_hands(number, queue, task, given, worker)
        for number, _, queue, task, given, worker in sorted(rows, key=lambda row: (-row[1], row[0]))
    ]


def in_hands(number: int, queue: str, task: str, given: Mapping[str, Any], worker: int) -> queue_jobs.Job:
    """A job that is marked as this worker's."""
    return queue_jobs.Job(
        id=number,
        queue=queue,
        task_name=task,
        task_kwargs=dict(given),
        worker_id=worker,
        status="doing",
        lock=None,
        queueing_lock=None,
    )


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error)
