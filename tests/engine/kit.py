"""For tests of the engine in this process: facts to wait for, points to act at, jobs performed one by one or at once.

Nothing here guesses by the clock: `until` waits for a fact, `Points` acts at an instant of the engine, `Bench` performs
the jobs that a test asks for. A fact that never comes fails the test after `PATIENCE`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

import psycopg
import pytest
from procrastinate.jobs import Job
from psycopg.rows import dict_row

from durable import AsyncDurable
from durable.core.state import View
from durable.define.registry import AnyWorkflow
from durable.engine import recover
from durable.engine.advance import advance
from durable.engine.compensate import compensate
from durable.engine.context import StepContext
from durable.engine.deliver import deliver
from durable.engine.engine import Engine
from durable.engine.points import Point, executing
from durable.store import sweep as queries
from durable.store.flush import Flush
from durable.store.query import Statement
from durable.testing.harness import SimulatedCrash
from durable.worker.jobs import LastingJobManager
from durable.worker.session import Session, open_session

T = TypeVar("T")
Ctx = StepContext[Any]

PATIENCE: Final = 30.0
GATE: Final = 471_100


async def until(fact: Callable[[], Any], what: str = "") -> Any:
    """Wait until `fact()` is true; returns it."""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                found = fact()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"it never came to this: {what or fact}") from None


async def soon(work: Awaitable[T]) -> T:
    """Await what must come to an end."""
    async with asyncio.timeout(PATIENCE):
        return await work


class Points:
    """The engine's hook: counts the points that were passed, and acts at the one that a test names."""

    def __init__(self) -> None:
        self.dead = False
        self.passed: list[tuple[Point, str]] = []
        self._acts: list[tuple[Point, str | None, Callable[[], object]]] = []

    def on(self, point: Point, act: Callable[[], object], *, what: str | None = None) -> None:
        """Call `act` the next time that `point` is passed (while a node of kind `what` executes), once."""
        self._acts.append((point, what, act))

    def count(self, point: Point) -> int:
        return sum(1 for passed, _ in self.passed if passed is point)

    def __call__(self, point: Point, view: View | None) -> None:
        what = executing(view)
        if self.dead:
            raise SimulatedCrash
        self.passed.append((point, what))
        for waiting in self._acts:
            if waiting[0] is point and waiting[1] in (None, what):
                self._acts.remove(waiting)
                waiting[2]()
                return

    def die(self) -> None:
        """Nothing that comes after this instant happens. The worker's lock is still there: see `Bench.crash`."""
        self.dead = True
        raise SimulatedCrash


class Facts:
    """What the database says, on a connection of its own. Its statements never wait for a lock."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)

    def close(self) -> None:
        self.connection.close()

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return self.connection.execute(query.encode(), values).fetchall()

    def value(self, query: str, *values: Any) -> Any:
        row = self.connection.execute(query.encode(), values).fetchone()
        return None if row is None else next(iter(row.values()))

    def execute(self, query: str, *values: Any) -> int:
        return self.connection.execute(query.encode(), values).rowcount

    def run(self, run: Any) -> dict[str, Any]:
        return self.rows("select * from durable.runs where id = %s", _id(run))[0]

    def journal(self, run: Any) -> list[str]:
        """Step ids, in the order in which they were written."""
        rows = self.rows("select step_id from durable.journal where run_id = %s order by seq", _id(run))
        return [row["step_id"] for row in rows]

    def attempts(self, run: Any) -> list[tuple[str, str, int]]:
        """(step, failed or interrupted, attempt) of the attempts that came to nothing."""
        query = "select step_id, kind, attempt from durable.attempts where run_id = %s order by seq"
        found = self.rows(query, _id(run))
        return [(row["step_id"], row["kind"], row["attempt"]) for row in found]

    def jobs(self, run: Any = None) -> list[dict[str, Any]]:
        rows = self.rows("select * from durable.procrastinate_jobs order by id")
        return [row for row in rows if run is None or row["args"]["run_id"] == str(_id(run))]

    def tasks(self, run: Any = None) -> list[str]:
        return [job["task_name"] for job in self.jobs(run)]

    def inbox(self, run: Any) -> list[tuple[str, str | None, str]]:
        rows = self.rows("select kind, name, state from durable.inbox where run_id = %s order by seq", _id(run))
        return [(row["kind"], row["name"], row["state"]) for row in rows]

    def blocked(self) -> int:
        """How many sessions of this database wait for a lock."""
        query = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        return int(self.value(query))

    def free(self, run: Any) -> bool:
        """Whether nobody holds the row: a probe, as recovery makes it."""
        found = self.rows("select id from durable.runs where id = %s for update skip locked", _id(run))
        return bool(found)

    def in_transaction(self) -> int:
        query = (
            "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in trans%%'"
        )
        return int(self.value(query, *()))

    def terminate(self, like: str) -> int:
        """End the sessions whose application name is like this, as a restart of the database would, and await that."""
        query = (
            "select count(*) filter (where pg_terminate_backend(pid, 10000)) from pg_stat_activity "
            "where datname = current_database() and application_name like %s and pid <> pg_backend_pid()"
        )
        return int(self.value(query, like))

    def check_rest(self) -> None:
        """Nothing runs: no job, no event of the queue, no transaction, no claim; messages only for ended runs."""
        assert self.jobs() == []
        assert self.value("select count(*) from durable.procrastinate_events") == 0
        assert self.value("select count(*) from durable.runs where claim_token is not null") == 0
        lost = "select * from durable.inbox i join durable.runs r on r.id = i.run_id where i.state = 'new'"
        assert [row for row in self.rows(lost) if row["status"] not in ("completed", "failed", "canceled")] == []


@dataclass
class Bench:
    """An engine that performs what it is told to."""

    app: AsyncDurable
    session: Session
    points: Points
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def engine(self) -> Engine:
        return self.session.engine

    @property
    def manager(self) -> LastingJobManager:
        manager = self.session.queue.job_manager
        assert isinstance(manager, LastingJobManager)
        return manager

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        return task

    def advance(self, run: Any, revision: int) -> asyncio.Task[None]:
        """The continuation of `run`, as if the queue had delivered it."""
        return self.begin(advance(self.engine, _id(run), revision))

    def compensate(self, run: Any, revision: int) -> asyncio.Task[None]:
        return self.begin(compensate(self.engine, _id(run), revision))

    def deliver(self, run: Any) -> asyncio.Task[None]:
        return self.begin(deliver(self.engine, _id(run)))

    async def fetch(self) -> Job | None:
        assert self.manager.worker is not None
        return await self.manager.fetch_job([self.app.queue], self.manager.worker)

    async def perform(self, job: Job) -> None:
        await self.session.queue.tasks[job.task_name](**job.task_kwargs)
        await self.manager.done(job)

    async def start_jobs(self) -> list[asyncio.Task[None]]:
        """Take up all jobs that wait."""
        started = []
        while (job := await self.fetch()) is not None:
            started.append(self.begin(self.perform(job)))
        return started

    async def idle(self) -> bool:
        async with self.engine.pool.connection() as connection:
            return await queries.idle(self.app.store, connection, self.app.queue)

    async def pump(self) -> None:
        """Take up all that can be taken up now."""
        with self.engine.database_errors_only():  # as a worker's loops do
            await recover.take_over_from_dead(self.engine)
            await recover.put_back_due(self.engine)
            await recover.put_back_known(self.engine, self.engine.registry.known())
        await self.start_jobs()

    async def work_until(self, fact: Callable[[], object]) -> None:
        """Take up whatever comes until `fact()` is true."""

        async def pumped() -> bool:
            await self.pump()
            return bool(fact())

        await until(pumped, str(fact))

    async def drain(self) -> None:
        """Perform all jobs, many at a time, until every run is finished or parked and all that was begun has ended."""
        async with asyncio.timeout(PATIENCE):
            while True:
                await self.pump()
                ended = [task for task in self.tasks if task.done()]
                self.tasks.difference_update(ended)
                for task in ended:
                    task.result()
                with self.engine.database_errors_only():
                    if not self.tasks and await self.idle():
                        return await self._check_pool()
                await asyncio.sleep(0.002)

    async def _check_pool(self) -> None:
        """All connections have been given back."""

        def back() -> bool:
            stats = self.engine.pool.get_stats()
            return stats["pool_available"] == stats["pool_size"]

        await until(back, "all connections are given back")

    async def skip(self, **units: float) -> None:
        async with self.engine.pool.connection() as connection:
            await queries.move_clock(self.app.store, connection, timedelta(**units))

    async def vanish(self) -> None:
        """Lose the worker's lock; what it executes goes on, as a zombie."""
        await self.session.liveness.vanish()

    async def crash(self) -> None:
        """As by `kill -9`: the lock is gone, and nothing is written any more."""
        self.points.dead = True
        await self.vanish()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()


@asynccontextmanager
async def bench(app: AsyncDurable, *, concurrency: int = 20) -> AsyncIterator[Bench]:
    """A worker without loops of its own."""
    points = Points()
    options = replace(app.options, concurrency=concurrency)
    async with open_session(app, options, handlers_app=app, at=points) as session:
        await session.queue.job_manager.register_worker()
        made = Bench(app, session, points)
        try:
            yield made
        finally:
            for task in made.tasks:
                task.cancel()
            await asyncio.gather(*made.tasks, return_exceptions=True)


def an_app(dsn: str, *workflows: AnyWorkflow, **arguments: Any) -> AsyncDurable:
    """By default no step is detached by the clock."""
    return AsyncDurable(dsn, workflows=workflows, **{"detach_after": 1_000.0, **arguments})


@asynccontextmanager
async def working(dsn: str, *workflows: AnyWorkflow, concurrency: int = 20, **arguments: Any) -> AsyncIterator[Bench]:
    """A bench of an app of its own."""
    async with an_app(dsn, *workflows, **arguments) as app, bench(app, concurrency=concurrency) as made:
        yield made


class Held:
    """A step that notes the inputs it began with, and ends when it is told to: with `result`, or with its input."""

    def __init__(self, result: Any = None) -> None:
        self._result = result
        self.began: list[Any] = []
        self.go_on = asyncio.Event()

    async def __call__(self, ctx: Ctx) -> Any:
        self.began.append(ctx.input)
        await self.go_on.wait()
        return ctx.input if self._result is None else self._result


def note_flushes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What this process sends from here on, statement by statement."""
    flushes: list[list[str]] = []
    add = Flush.add

    def noted(self: Flush, statement: Any, *values: Any) -> Any:
        if not self._queued:
            flushes.append([])
        flushes[-1].append(statement.decode())
        return add(self, statement, *values)

    monkeypatch.setattr(Flush, "add", noted)
    return flushes


class Gate:
    """Stops bursts between COMMIT and the next lock, where the row is free for a moment: both are one flush else.

    `wait` until one stands there; `open` lets it, and all that come later, through.
    """

    def __init__(self, app: AsyncDurable, facts: Facts) -> None:
        self._facts = facts
        statement = app.store.sql.relock.decode()
        assert "where id = %(run)s for update" in statement
        waits = f"(select count(*) from (select pg_advisory_xact_lock_shared({GATE})) gate) = 1"
        statement = statement.replace("where id = %(run)s", f"where {waits} and id = %(run)s")
        app.store.sql.__dict__["relock"] = Statement.of(statement)
        facts.value(f"select pg_advisory_lock({GATE})")

    async def wait(self) -> None:
        here = "database = (select oid from pg_database where datname = current_database())"
        query = f"select 1 from pg_locks where locktype = 'advisory' and objid = {GATE} and not granted and {here}"
        await until(lambda: self._facts.rows(query), "a burst stands at the gate")

    def open(self) -> None:
        self._facts.value(f"select pg_advisory_unlock({GATE})")


def _id(run: Any) -> uuid.UUID:
    found = getattr(run, "id", run)
    return found if isinstance(found, uuid.UUID) else uuid.UUID(str(found))
