"""The run's own transaction, lent to a step as a SQLAlchemy connection.

The engine holds a psycopg connection with a transaction open and the run's row locked. A step that asks for a
connection gets SQLAlchemy over a second psycopg object on the *same* libpq connection: what it writes commits with its
journal entry or not at all. The second object is what makes lending safe and simple: it is sync for a handler in a
thread (no event loop runs there, so that the handler may use ``asyncio.run``, or a sync facade) and async for one on
the loop; it refuses to end the transaction; and it goes dead when the handler ends, whoever still holds it, while the
engine's own object has kept its adapters, row factory and settings.

Savepoints, outermost first: ``durable_step``, which only the engine touches, so that a failed attempt can be undone and
recorded in the transaction that it failed in; then one of SQLAlchemy's, opened at once, for two reasons: a plain
``Session(bind=conn)`` joins a connection that is in a savepoint by a savepoint of its own, so that its ``commit()`` and
``rollback()`` mean its own work; and ``conn.rollback()`` has something to go back to.

While a connection is lent, nobody but the handler may use it: not even the engine's loop, which is another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final, NoReturn, Protocol

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, NestedTransaction, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from durable.store.connection import Connection as EngineConnection

SAVEPOINT: Final = "durable_step"

# These are the engine's, for its own statements; SET LOCAL before the savepoint survives a rollback to it.
_LEND: Final = f"SET LOCAL lock_timeout TO DEFAULT; SET LOCAL plan_cache_mode TO auto; SAVEPOINT {SAVEPOINT}"
_KEEP: Final = f"SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT {SAVEPOINT}"
_DROP: Final = f"ROLLBACK TO SAVEPOINT {SAVEPOINT}; RELEASE SAVEPOINT {SAVEPOINT}"
# What a step may have SET LOCAL and would hurt the engine's own writes. (A rollback to the savepoint undoes these.)
_RESET: Final = "; ".join(
    f"SET LOCAL {setting} TO DEFAULT"
    for setting in ("role", "search_path", "statement_timeout", "lock_timeout", "synchronous_commit")
)

_COMMITS = "the transaction of {0} is the run's: it commits when the handler returns, with the step's journal entry"


class Lender(Protocol):
    """Implemented by the engine, one per executing call."""

    async def borrow(self) -> EngineConnection:
        """The connection on which the run's row is locked and a transaction is open, not in pipeline mode.

        Called at most once per call, on the engine's loop, when the handler first asks. A detached step begins its
        second transaction here. It may wait, it may be cancelled, and whatever it raises comes out of ``Caller.run``.
        """
        ...


# ---------------------------------------------------------------- psycopg: the second object


class Gate:
    """Whether a lent connection may be used; why not; and the last error that the database answered through it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.in_use = False
        self.closed: str | None = None
        self.last_error: psycopg.Error | None = None

    def close(self) -> None:
        """The handler has ended."""
        self.closed = self.closed or f"{self.where} has ended: its connection can't be used any more"

    def check(self) -> None:
        if self.closed is not None:
            raise psycopg.InterfaceError(self.closed)

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequestError(_COMMITS.format(self.where))


class LentConnection(psycopg.Connection[Any]):
    """The sync psycopg connection of a handler in a thread."""

    _pool = None  # psycopg: it is not ours to close, so don't warn that nobody did

    def __init__(self, owner: EngineConnection, gate: Gate) -> None:
        super().__init__(owner.pgconn)
        self._owner = owner
        self._prepared = owner._prepared  # prepared statements belong to the session, which both objects speak to
        self.gate = gate

    def wait(self, *args: Any, **kwargs: Any) -> Any:  # everything that psycopg says to the server goes through here
        self.gate.check()
        try:
            return super().wait(*args, **kwargs)
        except psycopg.Error as error:
            self.gate.last_error = error
            raise

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if name is None:  # all, also those of the engine
            self._owner.prepared.clear()
        return super()._deallocate(name)

    def commit(self) -> None:
        self.gate.refuse()

    rollback = commit

    def close(self) -> None:
        """Harmless."""


class LentAsyncConnection(psycopg.AsyncConnection[Any]):
    """The async psycopg connection of a handler on the loop."""

    _pool = None

    def __init__(self, owner: EngineConnection, gate: Gate) -> None:
        super().__init__(owner.pgconn)
        self._owner = owner
        self._prepared = owner._prepared
        self.gate = gate

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        self.gate.check()
        try:
            return await _cancelled_once(super().wait(*args, **kwargs))
        except psycopg.Error as error:
            self.gate.last_error = error
            raise

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if name is None:
            self._owner.prepared.clear()
        return super()._deallocate(name)

    async def commit(self) -> None:
        self.gate.refuse()

    rollback = commit

    async def close(self) -> None:
        """Harmless."""


async def _cancelled_once(statement: Coroutine[Any, Any, Any]) -> Any:
    """psycopg answers a cancellation by cancelling the statement on the server, and a second one that comes meanwhile
    (a time limit and a cancel, say) by closing the connection: so it sees only the first."""
    task = asyncio.create_task(statement)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            if cancelled is None:
                task.cancel()
            cancelled = error
    if cancelled is None:
        return task.result()
    _ = task.cancelled() or task.exception()
    raise cancelled


# ---------------------------------------------------------------- SQLAlchemy: dialect, engines, connections


class _Lent:
    """What both dialects leave out: a lent connection's transaction and its end are not SQLAlchemy's business."""

    supports_statement_cache = True

    def do_begin(self, dbapi_connection: Any) -> None:
        pass

    def do_rollback(self, dbapi_connection: Any) -> None:
        """SQLAlchemy does that when it has first looked at the server, and when it closes a connection."""
        gate = dbapi_connection.driver_connection.gate
        if gate.in_use and gate.closed is None:
            gate.refuse()

    def do_commit(self, dbapi_connection: Any) -> None:
        dbapi_connection.driver_connection.gate.refuse()

    def do_close(self, dbapi_connection: Any) -> None:
        pass

    def do_terminate(self, dbapi_connection: Any) -> None:
        pass


class LentDialect(_Lent, PGDialect_psycopg):
    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[LentAsyncDialect]:
        return LentAsyncDialect


class LentAsyncDialect(_Lent, PGDialectAsync_psycopg):
    supports_statement_cache = True


registry.register("postgresql.durable_lent", __name__, "LentDialect")

_lent: ContextVar[Any] = ContextVar("durable_lent")


def _take() -> Any:
    lent = _lent.get(None)
    if lent is None:
        raise InvalidRequestError("the connection of this step is lost, and cannot be made anew within its transaction")
    return lent


async def _take_async() -> Any:
    return _take()


class StepConnection(Connection):
    """A SQLAlchemy connection in the run's own transaction.

    ``begin()`` and ``begin_nested()`` open savepoints. ``rollback()`` undoes all that this step has written, and the
    connection goes on. ``commit()`` is refused. ``close()`` does nothing, so that ``with ctx.connection() as conn:``
    reads as usual and the next ``ctx.connection()`` is the same.
    """

    def __init__(self, engine: Any, lent: LentConnection | LentAsyncConnection) -> None:
        token = _lent.set(lent)
        try:
            super().__init__(engine)
        finally:
            _lent.reset(token)
        self._gate = lent.gate
        try:
            self._mark: NestedTransaction = self.begin_nested()
        except BaseException:
            super().close()
            raise
        self._gate.in_use = True

    def begin(self) -> Any:  # SQLAlchemy's autobegin comes here too
        return self.begin_nested() if self.in_transaction() else super().begin()

    def commit(self) -> None:
        self._gate.refuse()

    def rollback(self) -> None:
        self._gate.check()
        if self._mark.is_active:
            self._mark.rollback()
        self._mark = self.begin_nested()

    def close(self) -> None:
        """Harmless: the engine ends it when the handler has ended."""

    def end(self) -> None:
        """Closes it for SQLAlchemy, after its gate was closed: nothing is said to the server."""
        super().close()


class StepAsyncConnection(AsyncConnection):
    """The async face of a :class:`StepConnection`."""

    async def start(self, is_ctxmanager: bool = False) -> AsyncConnection:
        return self


class Engines:
    """SQLAlchemy's engines for lent connections: they hold no connection, but what SQLAlchemy learns of the server and
    the statements that it has compiled. One per Caller; the async one belongs to its loop."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"poolclass": NullPool, "pool_reset_on_return": None, "use_native_hstore": False}
        self._sync = create_engine("postgresql+durable_lent://", creator=_take, **options)
        self._async = create_async_engine("postgresql+durable_lent://", async_creator=_take_async, **options)

    def open_sync(self, owner: EngineConnection, gate: Gate) -> tuple[StepConnection, LentConnection]:
        """Called in the handler's thread."""
        lent = LentConnection(owner, gate)
        return StepConnection(self._sync, lent), lent

    async def open_async(
        self, owner: EngineConnection, gate: Gate
    ) -> tuple[StepConnection, StepAsyncConnection, LentAsyncConnection]:
        """Called on the loop."""
        lent = LentAsyncConnection(owner, gate)
        step = await greenlet_spawn(StepConnection, self._async.sync_engine, lent)
        return step, StepAsyncConnection(self._async, step), lent


# ---------------------------------------------------------------- lending, and taking back


async def lend(conn: EngineConnection) -> None:
    """Makes an open transaction ready for a step: the step's savepoint, and no lock timeout but the user's own."""
    await conn.execute(_LEND)


async def settle_lent(conn: EngineConnection, ok: bool) -> None:
    """Ends the step's savepoint: the transaction stays open, the row locked, and the engine may write.

    `ok`: what the step wrote is kept. Deferred constraints are checked now; the error of one is raised (it is the
    step's), and ``settle_lent(conn, False)`` is to follow. ``SET LOCAL`` of role, search_path, statement_timeout,
    lock_timeout and synchronous_commit is taken back; other settings of the step last until the end of the
    transaction, and what it SET for the session until the connection is reset.
    Not `ok`: what the step wrote, and what it SET, is undone, also in an aborted transaction.
    """
    await conn.execute(f"{_KEEP}; {_RESET}" if ok else _DROP)


class Loan:
    """One handler's use of the connection: lent when first asked for, the same at every call, taken back at the end.

    `owner` of an earlier loan of the same call (a rerun) is used again, since ``borrow`` is called only once.
    """

    def __init__(
        self,
        engines: Engines,
        lender: Lender | None,
        where: str,
        *,
        on_lent: Callable[[Loan], None],
        owner: EngineConnection | None,
    ) -> None:
        self._engines, self._lender, self._on_lent = engines, lender, on_lent
        self._loop = asyncio.get_running_loop()
        self._lending: asyncio.Task[EngineConnection] | None = None
        self._opening: asyncio.Task[StepAsyncConnection] | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self._mutex = threading.Lock()
        self._step: StepConnection | None = None
        self._lent: LentConnection | LentAsyncConnection | None = None
        self._handlers: tuple[Any, Any] = (None, None)
        self.gate = Gate(where)
        self.owner = owner
        self.is_lent = False
        self.error: BaseException | None = None  # what `borrow` raised

    @property
    def asked(self) -> bool:
        """Whether the handler asked for the connection at all."""
        return self._lending is not None or self._opening is not None

    # -- the handler's side

    def connection(self) -> StepConnection:
        """For a sync handler, in its thread."""
        if _running_loop() is self._loop:
            raise InvalidRequestError(f"{self.gate.where} runs on the event loop: use `await ctx.async_connection()`")
        with self._mutex:
            self.gate.check()
            if self._opening is not None:
                raise InvalidRequestError(f"{self.gate.where} has taken async_connection(): one connection, one kind")
            if self._step is None:
                owner = asyncio.run_coroutine_threadsafe(self._shared(), self._loop).result()
                self._step, self._lent = self._engines.open_sync(owner, self.gate)
            return self._step

    def async_connection(self) -> Awaitable[StepAsyncConnection]:
        """For an async handler, on the engine's loop."""
        if _running_loop() is not self._loop:
            raise InvalidRequestError(f"{self.gate.where} does not run on the engine's loop: use `ctx.connection()`")
        self.gate.check()
        return self._async_connection()

    async def _async_connection(self) -> StepAsyncConnection:
        if self._opening is None:
            if self._lending is not None:
                raise InvalidRequestError(f"{self.gate.where} has taken connection(): one connection, one kind")
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def _open(self) -> StepAsyncConnection:
        owner = await self._shared()
        self._step, conn, self._lent = await self._engines.open_async(owner, self.gate)
        return conn

    async def _shared(self) -> EngineConnection:
        self.gate.check()
        if self._lending is None:
            self._lending = asyncio.create_task(self._lend())
        return await asyncio.shield(self._lending)

    async def _lend(self) -> EngineConnection:
        if self.owner is None:
            self.owner = await self._borrow()
        await lend(self.owner)
        self._handlers = self.owner.pgconn.notice_handler, self.owner.pgconn.notify_handler
        self.is_lent = True
        self._on_lent(self)
        return self.owner

    async def _borrow(self) -> EngineConnection:
        if self._lender is None:
            raise InvalidRequestError(f"{self.gate.where} has no transaction to take a connection in")
        try:
            return await self._lender.borrow()
        except BaseException as error:
            self.error = error
            raise

    # -- the engine's side

    def revoke(self, why: str) -> None:
        """No new statement from now on; a statement that runs, and a wait for the connection, end with an error."""
        self.gate.closed = self.gate.closed or why
        self._end_statements()

    def _end_statements(self) -> None:
        if self.owner is None and self._lending is not None:
            self._lending.cancel()  # it still waits for the connection; once it has come, its savepoint must stand
        if self.is_lent and self.owner is not None and _active(self.owner) and self._cancelling is None:
            self._cancelling = asyncio.create_task(_cancel_statement(self.owner))

    async def take_back(self) -> None:
        """After this nobody but the engine uses the connection, even if the handler left threads or tasks behind."""
        self.gate.close()
        self._end_statements()
        tasks = {t for t in (self._opening, self._lending, self._cancelling) if t is not None}
        if tasks:
            await asyncio.wait(tasks)
            for task in tasks:
                _ = task.cancelled() or task.exception()  # seen
        await self._silence()
        if self._step is not None:
            self._step.end()
        if self.is_lent and self.owner is not None:
            self.owner.pgconn.notice_handler, self.owner.pgconn.notify_handler = self._handlers

    async def _silence(self) -> None:
        """Waits for the end of a statement that somebody still runs: the gate lets no other through."""
        match self._lent:
            case LentConnection(lock=lock):
                if not lock.acquire(blocking=False):
                    await asyncio.to_thread(lock.acquire)
                lock.release()
            case LentAsyncConnection(lock=lock):
                async with lock:
                    pass


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _active(conn: EngineConnection) -> bool:
    return conn.pgconn.transaction_status == TransactionStatus.ACTIVE


async def _cancel_statement(conn: EngineConnection) -> None:
    with contextlib.suppress(psycopg.Error):  # the connection is gone, or nobody answers: taking back will see
        await conn.cancel_safe(timeout=5.0)
