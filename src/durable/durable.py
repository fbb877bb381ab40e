"""The app object, async and sync: what app code does to runs.

Each operation is one function of a lower room: `store.operations` writes, `store.read` reads, `engine.requests` applies
cancel, pause and retry at once. `AsyncDurable` checks the arguments and calls them; `Durable` is the same for blocking
code, each call passed on to an `AsyncDurable` on an event loop in a thread of its own.
"""

# ruff: noqa: A002 - input= and id= are the names that users expect

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar, Unpack, assert_never, overload

import psycopg
from psycopg_pool import PoolTimeout
from uuid_utils.compat import uuid7

from durable import arguments
from durable.arguments import RunId, Seconds, Tag
from durable.config import Database, Embedded
from durable.connecting import Connecting, Wanted
from durable.core.state import MessageKind
from durable.define.builder import Builder
from durable.define.function import WorkflowFunction
from durable.define.nodes import WaitForSignal, Workflow
from durable.define.registry import AnyWorkflow
from durable.define.results import load_run_result
from durable.definitions import Defining, Definitions, required, total_steps
from durable.engine import recover as recovery
from durable.engine import requests
from durable.engine.desk import Desk
from durable.engine.engine import Options
from durable.errors import (
    ConfigurationError,
    PayloadError,
    RequestTimeout,
    RetryRefused,
    RunCanceled,
    RunExists,
    RunFailed,
    RunNotFound,
    SchemaMismatch,
)
from durable.handles import AsyncRun, ResumeResult, Run, Start, StartOptions
from durable.portal import Portal, close_at_exit, refuse_running_loop
from durable.queue import ADVANCE, RING
from durable.snapshots import ErrorInfo, HistoryEvent, Page, RunSnapshot
from durable.store import operations, read, sweep
from durable.store.codec import MAX_PAYLOAD, Codec
from durable.store.connection import Connection
from durable.store.db import Pool, Store
from durable.store.operations import Query, Started
from durable.values import Status
from durable.working import in_background, new_worker, until_started, work, work_and_close, work_in_background

if TYPE_CHECKING:
    from durable.worker import Worker
    from durable.worker.takeup import TakeUp

In = TypeVar("In")
Out = TypeVar("Out")
Beginning = TypeVar("Beginning", operations.Started, operations.Sent)
T = TypeVar("T")
Handle: TypeAlias = RunId | AsyncRun[Any] | Run[Any]
Statuses: TypeAlias = Status | str | Collection[Status | str] | None
AsyncRuns: TypeAlias = list[AsyncRun[Any]]
Runs: TypeAlias = list[Run[Any]]
Events: TypeAlias = list[HistoryEvent]

BUSY_TRIES: Final = 10  # looks at a run that somebody else holds
BUSY_PAUSE: Final = 0.1  # seconds between them


class AsyncDurable(Defining):
    """Durable workflows for async app code: FastAPI, Litestar, scripts with ``asyncio.run``.

    - `dsn`: where the database is. Default: ``DURABLE_DATABASE_URL``, ``DATABASE_URL``, else an embedded PostgreSQL.
    - `schema`: durable's own schema there; several apps may share a database by different ones.
    - `queue`: which workers execute the runs that this app starts, and whose its own workers are. Default: `schema`.
    - `workflows`, `imports`: what to register: definitions, and names of modules that have some at their top level
      (imported when a workflow is first looked for).
    - `embedded`: ``auto``: if no database is configured; ``always``; ``never``.
    - `auto_migrate`: bring the database to the schema that this code needs at the first use. Default: only the embedded
      one; for any other, SchemaMismatch says to run ``durable migrate``.
    - `pool_size`: connections at most of this app's pool, and of each worker's.
    - `detach_after`: seconds after which an executing step lets go of its transaction; `max_crashes`: how often it may
      kill its worker before it fails.
    - `max_payload`: bytes of JSON that an input, a result or a signal may have.
    - `codec`: encrypts, compresses or offloads payloads.

    It connects at its first use, so it may be made when a module is imported. Several event loops may use it, and
    forked processes. Raises ConfigurationError for arguments that make no sense.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str = "durable",
        queue: str | None = None,
        workflows: Iterable[AnyWorkflow] = (),
        imports: Iterable[str] = (),
        embedded: Embedded = "auto",
        auto_migrate: bool | None = None,
        pool_size: int = 10,
        detach_after: float = 2.0,
        max_crashes: int = 5,
        max_payload: int = MAX_PAYLOAD,
        codec: Codec | None = None,
    ) -> None:
        wanted = Wanted(
            dsn=arguments.dsn(dsn),
            schema=arguments.schema(schema),
            queue=arguments.queue(schema if queue is None else queue),
            embedded=arguments.embedded(embedded),
            auto_migrate=auto_migrate,
            pool_size=arguments.at_least(pool_size, 1, "pool_size"),
            max_crashes=arguments.at_least(max_crashes, 1, "max_crashes"),
        )
        self.schema, self.queue = wanted.schema, wanted.queue
        self.options = Options(
            pool_size=wanted.pool_size,
            detach_after=arguments.at_least(detach_after, 0, "detach_after", whole=False),
            max_crashes=wanted.max_crashes,
        )
        limit = arguments.at_least(max_payload, 1, "max_payload")
        self.store = Store("", schema=wanted.schema, codec=arguments.codec(codec), max_payload=limit)
        self._definitions = Definitions(workflows, imports)
        self._connecting = Connecting(wanted, self.store, self._definitions.known, self.hooks)
        self._taking_up: dict[asyncio.AbstractEventLoop, TakeUp] = {}

    # ---------------------------------------------------------------- life

    @property
    def database(self) -> Database | None:
        """The database that was taken; None before the first use."""
        return self._connecting.database

    @property
    def pool(self) -> Pool:
        """The connections that this event loop uses. Raises ConfigurationError before it has connected."""
        return self._connecting.here().pool

    async def connect(self) -> None:
        """Connect now, on this event loop, instead of at the first use. Idempotent.

        Raises ConfigurationError if it can't be reached, SchemaMismatch if it is not what this code needs.
        """
        await self._connecting.link()

    async def migrate(self) -> None:
        """Bring the database to the schema that this code needs, as ``durable migrate`` does. Idempotent."""
        await self._connecting.migrate()

    async def close(self) -> None:
        """Give all connections back. Idempotent; a later use connects anew."""
        await self._connecting.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        where = self.database if self.database is not None else "not connected yet"
        return f"<{type(self).__name__} schema {self.schema!r}, queue {self.queue!r}, {where}>"

    # ---------------------------------------------------------------- starting

    @overload
    async def start(
        self,
        workflow: WorkflowFunction[In, Out],
        input: In | Mapping[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> AsyncRun[Out]: ...
    @overload
    async def start(
        self,
        workflow: Builder[In] | Workflow | str,
        input: In | Mapping[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> AsyncRun[Any]: ...
    async def start(
        self,
        workflow: AnyWorkflow | str,
        input: Any = None,
        *,
        version: str | None = None,
        id: RunId | None = None,
        key: str | None = None,
        tags: Mapping[str, Tag] | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        timeout: Seconds | None = None,
        connection: Any = None,
    ) -> AsyncRun[Any]:
        """Start a run; a worker takes it up. Returns its handle.

        - `input`: of the workflow's input type, or plain JSON that matches it. `version`: default: the one added last.
        - `id`: the run's UUID; `key`: an id of your own, unique among the runs of this workflow until they are purged.
          A used one returns the run that has it if workflow, version and input are the same, so that a start may be
          repeated.
        - `tags`: for ``list``. `priority`: higher goes first.
        - `delay`: seconds (or a timedelta) until it begins; `timeout`: how long it may take from then, before it fails.
        - `connection`: an async connection of psycopg or SQLAlchemy, or a session: the run is started exactly if your
          transaction commits.

        Raises WorkflowNotRegistered, PayloadError, RunExists, ConfigurationError.
        """
        options = Start(input, key, tags, id, priority, delay, timeout)
        run = self._starting(required(self.registry, workflow, version), options)
        if connection is not None:
            found = await self._write(operations.start(self.store, run), connection)
        else:
            found = await self._begin(partial(operations.start, self.store, run), ADVANCE, run.id, repeat=True)
        return AsyncRun(self, _same(found, run), uncommitted=connection is not None)

    async def start_many(
        self,
        workflow: AnyWorkflow | str,
        runs: Iterable[Start],
        *,
        version: str | None = None,
        connection: Any = None,
    ) -> AsyncRuns:
        """Start many runs of one workflow in one round trip: all of them, or none. Returns their handles in order.

        See `start`. Raises what it raises, then none is started (with `connection=`: if you roll back).
        """
        asked = self._starting_many(workflow, runs, version)
        query = operations.start_many(self.store, asked)
        if connection is not None:
            found = await self._write(query, connection)
            return [AsyncRun(self, _same(f, a), uncommitted=True) for f, a in zip(found, asked, strict=True)]

        async def all_or_none(its: Connection) -> AsyncRuns:
            async with its.transaction():
                found = await operations.execute_async(query, its)
                return [AsyncRun(self, _same(f, a)) for f, a in zip(found, asked, strict=True)]

        return await self._on_connection(all_or_none, repeat=True)

    def get(self, run_id: Handle) -> AsyncRun[Any]:
        """The handle of a run. Does not ask the database. Raises RunNotFound for what can't be an id."""
        return AsyncRun(self, _id(run_id))

    # ---------------------------------------------------------------- messages

    async def signal(
        self,
        run_id: Handle,
        name: str,
        payload: Any = None,
        *,
        id: str | uuid.UUID | None = None,
        connection: Any = None,
    ) -> bool:
        """Send a signal. It is kept until a wait for `name` takes it, whether that has begun or not.

        `id`: the same one twice is one signal. `connection=`: it is sent exactly if your transaction commits.
        False: the run has ended. Raises RunNotFound, PayloadError.
        """
        id_ = _id(run_id)
        query = self._signaling(id_, name, payload, id)
        if connection is not None:
            return _delivered(await self._write(query(), connection), id_)
        return _delivered(await self._begin(query, RING, id_, repeat=id is not None), id_)

    async def request(
        self,
        run_id: Handle,
        name: str,
        payload: Any = None,
        timeout: Seconds = 5.0,
        *,
        id: str | uuid.UUID | None = None,
    ) -> Any:
        """Send a message that the run receives with ``completable=True``, and wait for what it is completed with: plain
        JSON.

        `timeout`: seconds or a timedelta. `id`: the same one twice is one request, and has one reply.
        Raises RequestTimeout; RunFailed, RunCanceled if the run ends without a reply; RunNotFound, PayloadError.
        """
        id_, limit = _id(run_id), arguments.span(timeout, "timeout")
        if limit is None:
            raise ConfigurationError("timeout=None: a request waits a time of its own, in seconds")
        message = arguments.message_id(id) or str(uuid.uuid4())
        query = self._signaling(id_, name, payload, message, wants_reply=True)
        sent = await self._begin(query, RING, id_, repeat=True)
        if not _delivered(sent, id_):
            link = await self._connecting.link()
            raise _unanswered(await link.endings.outcome(id_, 0), name)
        link = await self._connecting.link()
        answer = await link.endings.answer(id_, message, limit.total_seconds())
        if answer.replied:
            return json.loads(answer.reply or "null")
        if answer.too_late:
            raise _unanswered(answer.run, name)
        raise RequestTimeout(name, run_id=answer.run.id, timeout=limit.total_seconds(), workflow=answer.run.workflow)

    async def resume(self, run_id: Handle, name: str | None = None, data: Any = None) -> ResumeResult:
        """Answer a run that waits now for the signal `name`, or on the step `name` that returned ``Suspend``.

        Strict: unless it waits for exactly this (or is busy for a second) nothing is written, and it is not
        ``accepted``. Without a name: the other half of `pause`.
        Raises RunNotFound; PayloadError if `data` is not what the wait declares.
        """
        id_ = _id(run_id)
        if name is None:
            if data is not None:
                raise TypeError("resume() takes data only with the name of what the run waits for")
            unpaused = await self._request_at_end(id_, requests.unpause)
            return ResumeResult(unpaused, (await self._outcome(id_)).status)
        where = f"the data of resume {name!r}"
        body = arguments.payload(data, where)
        query = operations.resume(self.store, id_, arguments.name(name, "the name to resume"), body)
        await self._check_awaited(id_, name, body, where)
        answer = await self._write(query, None)
        if answer == "unknown":
            raise RunNotFound(id_)
        return ResumeResult(answer == "accepted", (await self._outcome(id_)).status)

    async def pause(self, run_id: Handle) -> bool:
        """Hold a run after the step in progress. Messages wait meanwhile, deadlines run on. `resume` takes it up again.

        False: it is paused already, rolls back, or has ended. Raises RunNotFound.
        """
        return await self._request_at_end(_id(run_id), requests.pause)

    async def cancel(
        self, run_id: Handle, *, reason: str | None = None, compensate: bool = False, connection: Any = None
    ) -> bool:
        """Stop a run and its descendants now; an executing async handler is interrupted.

        `compensate`: roll back first what it has done. `connection=`: it is asked exactly if your transaction commits.
        False: it has ended already. Raises RunNotFound.
        """
        id_, why = _id(run_id), arguments.reason(reason)
        if connection is not None:
            return _delivered(await self._write(self._canceling(id_, why, compensate), connection), id_)
        return await self._request_at_end(id_, partial(requests.cancel, reason=why, compensate=compensate))

    async def retry(self, run_id: Handle) -> AsyncRun[Any]:
        """Take a failed run up again at the step that failed, with fresh attempts; or look anew at one that is parked
        for a person. Raises RunNotFound; RetryRefused if it has not failed, or entries of it were undone.
        """
        id_ = await self._end_of_chain(_id(run_id))
        for look in range(BUSY_TRIES):
            if look:
                await asyncio.sleep(BUSY_PAUSE)
            answer = await self._request(lambda desk: requests.retry(desk, id_))
            if answer == "accepted":
                return AsyncRun(self, id_)
            if answer == "undone":
                raise RetryRefused(
                    f"run {str(id_)!r} can't be retried: entries of it were undone, and nobody knows what it would "
                    "go on from. Start it anew"
                )
            if answer == "refused":
                break
        status = await self._status_of(id_)
        raise RetryRefused(
            f"run {str(id_)!r} can't be retried: it is {status.value}. Only a run that has failed, or is parked for a "
            f"person, can be{'; `resume` ends a pause' if status is Status.PAUSED else ''}"
        )

    async def fork(
        self, run_id: Handle, from_step: str | None = None, input: Any = None, *, connection: Any = None
    ) -> AsyncRun[Any]:
        """Start a run that has passed what this one had passed when it came to `from_step`, and goes on from there.
        This one stays as it is, in whatever status. Returns the new run's handle.

        - `from_step`: a step's id, as `status` shows it. If it stands in a branch, a loop or a block, all of that runs
          again. None: everything does.
        - `input`: another input; None: the same.
        - `connection=`: it is started exactly if your transaction commits.

        The new run has the same workflow, version, queue, tags and priority; no key, no parent, no deadline. Its
        rollback does not undo what was copied.
        Raises RunNotFound, PayloadError; ConfigurationError if there is no such step, or steps before it were undone.
        """
        origin, new = _id(run_id), uuid7()
        text: str | None = None
        if input is not None:
            found = await self._write(operations.definition_of(self.store, origin), connection, repeat=True)
            text = self._other_input(origin, found, input)
        forked = await self._write(operations.fork(self.store, origin, new, from_step, text), connection)
        return AsyncRun(self, _new_fork(forked, origin, new, from_step), uncommitted=connection is not None)

    # ---------------------------------------------------------------- looking

    async def status(self, run_id: Handle, children: int = 100) -> RunSnapshot:
        """The run as it stands: its steps and results, and up to `children` of the runs that it started, and theirs.

        Never waits for an executing step. Raises RunNotFound.
        """
        id_, most = _id(run_id), arguments.at_least(children, 0, "children")
        return await self._on_connection(
            lambda its: read.snapshot(self.store, its, id_, most, totals=self._total_steps), repeat=True
        )

    async def list(
        self,
        *,
        status: Statuses = None,
        workflow: AnyWorkflow | str | None = None,
        version: str | None = None,
        tags: Mapping[str, Tag] | None = None,
        parent: Handle | None = None,
        key: str | None = None,
        started_after: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page[RunSnapshot]:
        """A page of runs that match all filters, the newest first; without their steps, results and children.

        `status` may also be ``retrying``, ``sleeping``, ``waiting_for_signal`` ..., or several; all `tags` must be
        there; a run that went on as another one has left its `key` to that. `after`: the ``next`` of the page before.
        Raises ConfigurationError for what makes no sense.
        """
        filters: dict[str, Any] = {
            "status": status,
            "workflow": workflow.name if isinstance(workflow, Builder | WorkflowFunction | Workflow) else workflow,
            "version": version,
            "tags": arguments.tags(tags),
            "parent": None if parent is None else _id(parent),
            "key": arguments.key(key),
            "started_after": started_after,
            "limit": arguments.at_least(limit, 1, "limit"),
            "after": after,
        }
        return await self._on_connection(
            lambda its: read.page(self.store, its, totals=self._total_steps, **filters), repeat=True
        )

    async def history(self, run_id: Handle) -> Events:
        """All that happened to the run, in order. Raises RunNotFound."""
        id_ = _id(run_id)
        return await self._on_connection(lambda its: read.history(self.store, its, id_), repeat=True)

    async def watch(self, run_id: Handle) -> AsyncGenerator[RunSnapshot, None]:
        """The run as it stands now, and again after each change, until it has ended. Changes that follow each other
        within a quarter of a second may be seen as one; the last snapshot is always that of the end. A run that goes on
        as another one (``continue_as_new``) is followed there. Raises RunNotFound.
        """
        id_, shown = _id(run_id), None
        while (shown := await self._next_snapshot(id_, shown)) is not None:
            yield shown

    async def result(self, run_id: Handle, timeout: Seconds | None = None) -> Any:
        """Wait for the end of the run, and for its result: as the types that its workflow declares where that is
        registered here, else as plain JSON. A run that goes on as another one (``continue_as_new``) ends with that.

        `timeout`: seconds or a timedelta. Raises RunFailed, RunCanceled, TimeoutError; RunNotFound.
        """
        id_, limit = _id(run_id), arguments.span(timeout, "timeout")
        uncommitted = not isinstance(run_id, RunId) and run_id.uncommitted
        link = await self._connecting.link()
        seconds = None if limit is None else limit.total_seconds()
        outcome = await link.endings.outcome(id_, seconds, uncommitted=uncommitted)
        if outcome.status is not Status.COMPLETED:
            raise _not_completed(outcome)
        assert outcome.result is not None
        definition = self.registry.find(outcome.workflow, outcome.version)
        if definition is None:
            return json.loads(outcome.result)
        try:
            return load_run_result(definition, outcome.result)
        except PayloadError as error:
            raise error.at(f"the result of workflow {outcome.workflow!r}, run {str(outcome.id)!r}") from None

    # ---------------------------------------------------------------- upkeep

    async def recover(self) -> int:
        """Put back what crashed, fell due or was never heard of, as every worker does once a second. Returns how many
        runs."""
        link = await self._connecting.link()
        recovered = await recovery.sweep(link.desk, self.registry.known())
        return recovered.runs

    async def purge(self, older_than: Seconds) -> int:
        """Delete runs that ended longer ago than `older_than` (seconds or a timedelta), each with its whole tree, once
        all of that has ended. Returns how many runs. Their keys can be used again."""
        age = arguments.span(older_than, "older_than")
        assert age is not None
        count = 0
        while gone := await self._on_connection(lambda its: sweep.purge(self.store, its, age), repeat=True):
            count += gone
        return count

    # ---------------------------------------------------------------- working

    async def run_worker(self, concurrency: int = 20, until_idle: bool = False) -> None:
        """Execute runs of this app's queue, until SIGTERM or Ctrl-C: then running steps may end within a grace time.

        - `concurrency`: handlers in flight at once.
        - `until_idle`: return when every run is finished or parked.
        """
        await work(self, self, concurrency, until_idle)

    @asynccontextmanager
    async def worker(self, concurrency: int = 20) -> AsyncIterator[Worker]:
        """A worker in the background of this block, on this event loop: ``async with app.worker(): ...``."""
        worker = new_worker(self, self, concurrency)
        working = in_background(worker)
        try:
            await until_started(worker, working)
            yield worker
        finally:
            worker.stop()
            await working

    # ---------------------------------------------------------------- between the operations and the lower rooms

    def _starting(self, definition: Workflow, asked: Start) -> operations.Start:
        return operations.Start(
            id=uuid7() if asked.id is None else arguments.new_id(asked.id),
            workflow=definition.name,
            version=definition.version,
            input=_input(definition, asked.input),
            queue=self.queue,
            key=arguments.key(asked.key),
            tags=arguments.tags(asked.tags),
            priority=arguments.priority(asked.priority),
            delay=arguments.span(asked.delay, "delay"),
            timeout=arguments.span(asked.timeout, "timeout"),
        )

    def _starting_many(
        self, workflow: AnyWorkflow | str, runs: Iterable[Start], version: str | None
    ) -> tuple[operations.Start, ...]:
        definition = required(self.registry, workflow, version)
        return tuple(self._starting(definition, run) for run in runs)

    def _signaling(
        self, run_id: Handle, name: str, payload: Any, id_: str | uuid.UUID | None, *, wants_reply: bool = False
    ) -> Callable[..., Query[operations.Sent]]:
        arguments.name(name, "the signal's name")
        body = arguments.payload(payload, f"the payload of signal {name!r}")
        message = arguments.message_id(id_)
        id_ = _id(run_id)
        return partial(
            operations.send, self.store, id_, MessageKind.SIGNAL, name, body, message, wants_reply=wants_reply
        )

    def _other_input(self, run_id: uuid.UUID, found: tuple[str, str] | None, given: Any) -> str:
        """The input of a fork: of the type that the run's workflow takes, where that is registered here."""
        if found is None:
            raise RunNotFound(run_id)
        definition = self.registry.find(*found)
        if definition is None:
            return arguments.payload(given, f"the input of workflow {found[0]!r}")
        return _input(definition, given)

    async def _next_snapshot(self, run_id: uuid.UUID, shown: RunSnapshot | None) -> RunSnapshot | None:
        """What a watcher of `run_id` who was shown this is to be shown next; None: that was the end."""
        if shown is None:
            return await self.status(run_id)
        if shown.ended:
            return None if shown.successor is None else await self.status(shown.successor)
        link = await self._connecting.link()
        await link.endings.change(shown.id, shown.revision)
        return await self.status(shown.id)

    def _canceling(self, id_: uuid.UUID, reason: str | None, compensate: bool) -> Query[operations.Sent]:
        body = json.dumps({"reason": reason, "compensate": compensate})
        return operations.send(self.store, id_, MessageKind.CANCEL, body=body)

    async def _write(self, query: Query[T], connection: Any, *, repeat: bool = False) -> T:
        """Execute on the caller's connection, or on one of the pool."""
        if connection is not None:
            with _explained(self.schema):
                return await operations.execute_async(query, connection)
        return await self._on_connection(lambda its: operations.execute_own(query, its), repeat=repeat)

    async def _begin(
        self, query: Callable[..., Query[Beginning]], task: str, run_id: uuid.UUID, *, repeat: bool
    ) -> Beginning:
        """Execute what puts a job of `task` for a run into the queue. If a worker of this app has nothing else to do on
        this event loop, it begins with the job at once."""
        take_up = self._taking_up.get(asyncio.get_running_loop())
        if take_up is not None:
            with suppress(*((psycopg.OperationalError,) if repeat else ())):
                if (found := await take_up.begin(query, task, run_id)) is not None:
                    return found
        return await self._on_connection(lambda its: operations.execute_own(query(), its), repeat=repeat)

    @contextmanager
    def _worked_by(self, take_up: TakeUp) -> Iterator[None]:
        """In this block a worker takes up what this app starts on this event loop."""
        loop = asyncio.get_running_loop()
        self._taking_up[loop] = take_up
        try:
            yield
        finally:
            if self._taking_up.get(loop) is take_up:
                del self._taking_up[loop]

    async def _on_connection(self, do: Callable[[Connection], Awaitable[T]], *, repeat: bool) -> T:
        """With a connection of the pool. `repeat`: once more if it was lost, for what may be done twice."""
        link = await self._connecting.link()
        try:
            async with link.connection() as connection:
                return await do(connection)
        except psycopg.OperationalError as error:
            if not repeat or isinstance(error, PoolTimeout):
                raise
        async with link.connection() as connection:
            return await do(connection)

    async def _request(self, ask: Callable[[Desk], Awaitable[T]]) -> T:
        """Cancel, pause and the like: asked anew if the connection was lost; they say what is to be, not a change."""
        link = await self._connecting.link()
        try:
            return await ask(link.desk)
        except psycopg.OperationalError as error:
            if isinstance(error, PoolTimeout):
                raise
            await link.pool.check()
            return await ask(link.desk)

    async def _request_at_end(self, id_: uuid.UUID, ask: Callable[[Desk, uuid.UUID], Awaitable[bool]]) -> bool:
        """A run that goes on as another one (``continue_as_new``), also just now, is asked there."""

        async def asked(desk: Desk) -> bool:
            return await ask(desk, id_)

        while not await self._request(asked):
            if (end := await self._end_of_chain(id_)) == id_:
                return False
            id_ = end
        return True

    async def _end_of_chain(self, id_: uuid.UUID) -> uuid.UUID:
        return await self._on_connection(lambda its: read.end_of_chain(self.store, its, id_), repeat=True)

    async def _status_of(self, id_: uuid.UUID) -> Status:
        status = await self._on_connection(lambda its: read.status_of(self.store, its, id_), repeat=True)
        if status is None:
            raise RunNotFound(id_)
        return status

    async def _outcome(self, id_: uuid.UUID) -> read.Outcome:
        """How the run stands, or the one that it went on as. Raises RunNotFound."""
        return await self._on_connection(lambda its: read.outcome(self.store, its, id_), repeat=True)

    async def _check_awaited(self, id_: uuid.UUID, name: str, body: str, where: str) -> None:
        """Whether the data is what the wait declares, where that is known here. Which wait it is is asked only if one
        that it could be refuses the data."""
        run = await self._outcome(id_)
        definition = self.registry.find(run.workflow, run.version)
        refusals: dict[int, PayloadError] = {}
        for place, node in enumerate(definition.nodes if definition is not None else ()):
            if isinstance(node, WaitForSignal) and (node.signal == name or not isinstance(node.signal, str)):
                try:
                    node.payload.load(body)
                except PayloadError as error:
                    refusals[place] = error.at(f"{where}, for node {node.name!r} of workflow {run.workflow!r}")
        if refusals:
            now = await self.status(run.id, 0)
            if now.waiting_name == name and now.cursor in refusals:
                raise refusals[now.cursor]

    def _total_steps(self, workflow: str, version: str) -> int | None:
        return total_steps(self.registry, workflow, version) or None  # nobody knows how many a function takes


class Durable(Defining):
    """Durable workflows for blocking app code: Django, Flask, scripts. See :class:`AsyncDurable` for the arguments.

    May be shared by threads, and used after a fork. Inside a running event loop it says "use AsyncDurable"; there only
    the calls with ``connection=`` work, which run on that connection alone.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str = "durable",
        queue: str | None = None,
        workflows: Iterable[AnyWorkflow] = (),
        imports: Iterable[str] = (),
        embedded: Embedded = "auto",
        auto_migrate: bool | None = None,
        pool_size: int = 10,
        detach_after: float = 2.0,
        max_crashes: int = 5,
        max_payload: int = MAX_PAYLOAD,
        codec: Codec | None = None,
    ) -> None:
        self.async_app = AsyncDurable(
            dsn,
            schema=schema,
            queue=queue,
            workflows=workflows,
            imports=imports,
            embedded=embedded,
            auto_migrate=auto_migrate,
            pool_size=pool_size,
            detach_after=detach_after,
            max_crashes=max_crashes,
            max_payload=max_payload,
            codec=codec,
        )
        self.schema, self.queue, self.options = (
            self.async_app.schema,
            self.async_app.queue,
            self.async_app.options,
        )
        self.store = self.async_app.store
        self._definitions = self.async_app._definitions
        self._portal = Portal()
        self.async_app._connecting.at_exit = lambda: close_at_exit(self.close)

    # ---------------------------------------------------------------- life

    @property
    def database(self) -> Database | None:
        return self.async_app.database

    def connect(self) -> None:
        self._portal.call(self.async_app.connect)

    def migrate(self) -> None:
        self._portal.call(self.async_app.migrate)

    def close(self) -> None:
        self._portal.close(self.async_app.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self.async_app).replace("<AsyncDurable", f"<{type(self).__name__}", 1)

    # ---------------------------------------------------------------- starting

    @overload
    def start(
        self,
        workflow: WorkflowFunction[In, Out],
        input: In | Mapping[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> Run[Out]: ...
    @overload
    def start(
        self,
        workflow: Builder[In] | Workflow | str,
        input: In | Mapping[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> Run[Any]: ...
    def start(
        self,
        workflow: AnyWorkflow | str,
        input: Any = None,
        *,
        version: str | None = None,
        id: RunId | None = None,
        key: str | None = None,
        tags: Mapping[str, Tag] | None = None,
        priority: int = 0,
        delay: Seconds | None = None,
        timeout: Seconds | None = None,
        connection: Any = None,
    ) -> Run[Any]:
        app = self.async_app
        options = Start(input, key, tags, id, priority, delay, timeout)
        run = app._starting(required(self.registry, workflow, version), options)
        found = self._write(operations.start(self.store, run), connection, repeat=True)
        return Run(self, _same(found, run), uncommitted=connection is not None)

    def start_many(
        self,
        workflow: AnyWorkflow | str,
        runs: Iterable[Start],
        *,
        version: str | None = None,
        connection: Any = None,
    ) -> Runs:
        if connection is None:
            started = self._portal.call(self.async_app.start_many, workflow, runs, version=version)
            return [Run(self, run.id) for run in started]
        asked = self.async_app._starting_many(workflow, runs, version)
        found = self._write(operations.start_many(self.store, asked), connection)
        return [Run(self, _same(f, a), uncommitted=True) for f, a in zip(found, asked, strict=True)]

    def get(self, run_id: Handle) -> Run[Any]:
        return Run(self, _id(run_id))

    # ---------------------------------------------------------------- messages

    def signal(
        self,
        run_id: Handle,
        name: str,
        payload: Any = None,
        *,
        id: str | uuid.UUID | None = None,
        connection: Any = None,
    ) -> bool:
        query = self.async_app._signaling(run_id, name, payload, id)
        return _delivered(self._write(query(), connection, repeat=id is not None), run_id)

    def request(
        self,
        run_id: Handle,
        name: str,
        payload: Any = None,
        timeout: Seconds = 5.0,
        *,
        id: str | uuid.UUID | None = None,
    ) -> Any:
        return self._portal.call(self.async_app.request, run_id, name, payload, timeout, id=id)

    def resume(self, run_id: Handle, name: str | None = None, data: Any = None) -> ResumeResult:
        return self._portal.call(self.async_app.resume, run_id, name, data)

    def pause(self, run_id: Handle) -> bool:
        return self._portal.call(self.async_app.pause, run_id)

    def cancel(
        self, run_id: Handle, *, reason: str | None = None, compensate: bool = False, connection: Any = None
    ) -> bool:
        if connection is None:
            return self._portal.call(self.async_app.cancel, run_id, reason=reason, compensate=compensate)
        query = self.async_app._canceling(_id(run_id), arguments.reason(reason), compensate)
        return _delivered(self._write(query, connection), run_id)

    def retry(self, run_id: Handle) -> Run[Any]:
        return Run(self, self._portal.call(self.async_app.retry, run_id).id)

    def fork(
        self, run_id: Handle, from_step: str | None = None, input: Any = None, *, connection: Any = None
    ) -> Run[Any]:
        app, origin, new = self.async_app, _id(run_id), uuid7()
        text: str | None = None
        if input is not None:
            found = self._write(operations.definition_of(self.store, origin), connection, repeat=True)
            text = app._other_input(origin, found, input)
        forked = self._write(operations.fork(self.store, origin, new, from_step, text), connection)
        return Run(self, _new_fork(forked, origin, new, from_step), uncommitted=connection is not None)

    # ---------------------------------------------------------------- looking

    def status(self, run_id: Handle, children: int = 100) -> RunSnapshot:
        return self._portal.call(self.async_app.status, run_id, children)

    def list(
        self,
        *,
        status: Statuses = None,
        workflow: AnyWorkflow | str | None = None,
        version: str | None = None,
        tags: Mapping[str, Tag] | None = None,
        parent: Handle | None = None,
        key: str | None = None,
        started_after: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page[RunSnapshot]:
        return self._portal.call(
            self.async_app.list,
            status=status,
            workflow=workflow,
            version=version,
            tags=tags,
            parent=parent,
            key=key,
            started_after=started_after,
            limit=limit,
            after=after,
        )

    def history(self, run_id: Handle) -> Events:
        return self._portal.call(self.async_app.history, run_id)

    def watch(self, run_id: Handle) -> Generator[RunSnapshot, None, None]:
        id_, shown = _id(run_id), None
        while (shown := self._portal.call(self.async_app._next_snapshot, id_, shown)) is not None:
            yield shown

    def result(self, run_id: Handle, timeout: Seconds | None = None) -> Any:
        return self._portal.call(self.async_app.result, run_id, timeout)

    # ---------------------------------------------------------------- upkeep

    def recover(self) -> int:
        return self._portal.call(self.async_app.recover)

    def purge(self, older_than: Seconds) -> int:
        return self._portal.call(self.async_app.purge, older_than)

    # ---------------------------------------------------------------- working

    def run_worker(self, concurrency: int = 20, until_idle: bool = False) -> None:
        refuse_running_loop()
        asyncio.run(work_and_close(self.async_app, self, concurrency, until_idle))

    @contextmanager
    def worker(self, concurrency: int = 20) -> Iterator[None]:
        """A worker in the background of this block, in a thread of its own: ``with app.worker(): ...``."""
        refuse_running_loop()
        portal = Portal("durable worker")
        ready, stop = threading.Event(), asyncio.Event()
        working = portal.submit(work_in_background, self.async_app, self, concurrency, ready, stop)
        working.add_done_callback(lambda _: ready.set())
        try:
            ready.wait()
            if not working.done():
                yield
        finally:
            portal.post(stop.set)
            try:
                working.result()
            finally:
                portal.close(self.async_app.close)

    def _write(self, query: Query[T], connection: Any, *, repeat: bool = False) -> T:
        """Execute on the caller's connection, in the caller's thread; or on one of the pool."""
        if connection is None:
            return self._portal.call(self.async_app._write, query, None, repeat=repeat)
        with _explained(self.schema):
            return operations.execute(query, connection)


# ---------------------------------------------------------------- answers


def _id(given: Handle) -> uuid.UUID:
    return given.id if isinstance(given, AsyncRun | Run) else arguments.run_id(given)


def _same(found: Started, asked: operations.Start) -> uuid.UUID:
    """The id of the run that is there now. Raises RunExists if it was started differently."""
    if not found.created and not found.same:
        by_id = found.id == asked.id
        raise RunExists(run_id=found.id, workflow=None if by_id else asked.workflow, key=None if by_id else asked.key)
    return found.id


def _delivered(sent: operations.Sent, run_id: Handle) -> bool:
    if sent.answer == "unknown":
        raise RunNotFound(_id(run_id))
    return sent.answer != "finished"


def _input(definition: Workflow, given: Any) -> str:
    try:
        return definition.input.dump(given)
    except PayloadError as error:
        raise error.at(f"the input of workflow {definition.name!r}") from error.__cause__


def _new_fork(forked: operations.Forked, origin: uuid.UUID, new: uuid.UUID, step: str | None) -> uuid.UUID:
    """The id of the run that is there now. Raises RunNotFound; ConfigurationError, which says where to fork instead."""
    refused = f"run {str(origin)!r} can't be forked from step {step!r}: "
    match forked.answer:
        case "forked":
            return new
        case "unknown":
            raise RunNotFound(origin)
        case "no_step":
            there = f"it has {', '.join(map(repr, forked.steps))}" if forked.steps else "it has not come to any yet"
            raise ConfigurationError(f"{refused}there is no such step in it; {there}")
        case "undone":
            undone = ", ".join(map(repr, forked.steps))
            raise ConfigurationError(
                f"{refused}before it stands what was undone ({undone}): fork from there, or earlier"
            )
        case "rolled_back":
            raise ConfigurationError(
                f"{refused}it went back to a checkpoint before it came there: fork from an earlier step, or from none"
            )
        case never:
            assert_never(never)


def _not_completed(outcome: read.Outcome) -> RunFailed | RunCanceled:
    """How a run ended that did not end well."""
    if outcome.status is Status.CANCELED:
        return RunCanceled(outcome.reason, run_id=outcome.id, workflow=outcome.workflow)
    return RunFailed(outcome.id, _facts(outcome.error), _not_undone(outcome), workflow=outcome.workflow)


def _unanswered(outcome: read.Outcome, name: str) -> RunFailed | RunCanceled:
    """Why nobody replies to a request any more."""
    if outcome.status is not Status.COMPLETED:
        return _not_completed(outcome)
    error = {"type": "NoReply", "message": f"it completed without a reply to the request {name!r}"}
    return RunFailed(outcome.id, error, workflow=outcome.workflow)


def _facts(error: ErrorInfo | None) -> dict[str, Any]:
    return {} if error is None else {field.name: getattr(error, field.name) for field in fields(error)}


def _not_undone(outcome: read.Outcome) -> tuple[str, ...]:
    """The steps, of what the engine says of each."""
    left: tuple[Any, ...] = outcome.not_undone
    return tuple(str(one["step"]) if isinstance(one, Mapping) else str(one) for one in left)


@contextmanager
def _explained(schema: str) -> Iterator[None]:
    """On a connection of the caller's, whose database nobody has checked: say it if our functions are not there."""
    try:
        yield
    except Exception as error:
        original = getattr(error, "orig", error)
        if isinstance(original, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedFunction):
            raise SchemaMismatch(
                f'the database of this connection has no functions of durable in a schema "{schema}": is it the right '
                "database, and the right schema=? Then run `durable migrate`"
            ) from error
        raise


def _share_docs() -> None:
    """What a method of Durable does says the one of AsyncDurable."""
    for name, method in vars(Durable).items():
        if not name.startswith("_") and callable(method) and not method.__doc__:
            method.__doc__ = getattr(AsyncDurable, name).__doc__


_share_docs()
