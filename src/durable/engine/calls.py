"""From a :class:`Call` to an :class:`Outcome`: the one room where user code with effects runs.

Whatever user code does becomes a value here: what it returns, what it raises (SystemExit too), that it takes too long,
that it returns something that can't be stored, that it leaves the run's transaction aborted. Exceptions leave
:meth:`Caller.run` only for what is not the user's: the task was cancelled, the transaction is lost, the connection
could not be borrowed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from durable.core.failures import brief, failure_of
from durable.core.state import View
from durable.core.transition import Call, Failed, Iterated, Outcome, Purpose, Succeeded, Suspended
from durable.define.nodes import Loop
from durable.define.payload import LOOSE, Schema
from durable.engine.borrow import SAVEPOINT, Engines, Lender, Loan, settle_lent
from durable.engine.context import Flag, Progress, StepContext
from durable.engine.invoke import Ask, Interruption, Raised, Returned, Script, Threads, play
from durable.errors import LoopLimitExceeded, NonRetryable, PayloadError, StepTimeout
from durable.store.connection import Connection
from durable.values import JsonText, Rollback, Suspend

LENT_LIMIT: Final = 30.0
"""Seconds that a handler may go on once it holds the run's transaction."""
RERUNS: Final = 3
"""How often an attempt that was the victim of a deadlock or a serialization failure is run again, uncounted."""

_RERUN_STATES = frozenset({"40P01", "40001"})
_GONE_SAVEPOINT = "3B001"

T = TypeVar("T")


class TransactionLost(Exception):
    """The run's transaction ended under the handler: the connection died, or the handler ended it by SQL of its own.

    Nothing of the step is known to be written, the row is not locked any more, and the connection must not go back to
    the pool as it is. `outcome` is what the attempt came to; a success of it did not reach the database through this
    transaction.
    """

    def __init__(self, outcome: Outcome, why: str) -> None:
        self.outcome = outcome
        super().__init__(why)


class Caller:
    """Calls user code. One per engine: it owns the threads and SQLAlchemy's engines for lent connections. To be made,
    used and closed on one event loop.

    - `max_threads`: sync handlers that can run at once.
    - `app`: what handlers see as ``ctx.app``.
    - `lent_limit`: seconds that a handler may go on once it holds the run's transaction.
    - `check`: called with the text of a value and what it is; raises PayloadError for one that the store would refuse
      (too large, say), so that it fails the attempt before the step's writes are kept.
    """

    def __init__(
        self,
        *,
        max_threads: int,
        app: object | None = None,
        lent_limit: float = LENT_LIMIT,
        check: Callable[[JsonText, str], object] | None = None,
    ) -> None:
        self.threads = Threads(max_threads)
        self.engines = Engines()
        self.app, self.lent_limit, self.check = app, lent_limit, check

    async def run(
        self,
        call: Call,
        view: View,
        lender: Lender | None,
        *,
        now: Callable[[], datetime],
        cancelled: Flag,
        on_progress: Progress | None = None,
    ) -> Outcome:
        """Runs one attempt. Never answers ``Interrupted``: who interrupts knows why.

        If a connection was lent, the transaction is as it was when it was borrowed, plus what a successful handler
        wrote: open, the row locked, the step's savepoint gone, ready for the engine's writes. ``TransactionLost`` says
        that it is not. What ``lender.borrow`` raised is raised here, whatever the handler made of it.

        If the task that awaits this is cancelled:

        - an async handler gets CancelledError. If that ends it, CancelledError is raised here, after the transaction
          was rolled back to the savepoint. If it swallows it and returns, or raises something else, that is the
          outcome, as ever.
        - a sync handler sees `cancelled` set and is awaited to its end, however long it takes and however often the
          task is cancelled; its outcome is answered. CancelledError is raised only if no thread had taken it up yet,
          or if the attempt had more to call before its handler (a loop's `while_` was executing, say).
        - between those, while the outcome is being prepared, the cancellation is noted and the outcome answered.

        In the first case a connection that died is not told by TransactionLost: look at ``conn.closed``. (psycopg
        closes a connection when the statement that it is to cancel fails by itself at that moment.)

        So: an outcome, whenever there is one, is to be journaled; ``CancelledError`` means that the handler did not
        run or ended unfinished. A cancellation that did not end in CancelledError is not taken back from the task:
        ``task.cancelling()`` tells of it. A time limit that passes meanwhile wins over a late value.
        """
        attempt = _Attempt(self, call, view, lender, now, cancelled, on_progress)
        outcome, error = await attempt.run()
        for _ in range(RERUNS):
            if not (attempt.may_run_again and _is_rerun_case(error)):
                break
            outcome, error = await attempt.run()
        return outcome

    async def close(self) -> None:
        """Ends the threads, once the handlers in them have ended."""
        await self.threads.close()


class _Attempt(Interruption):
    """One attempt, with its reruns: they share the time limit and the borrowed connection."""

    def __init__(
        self,
        caller: Caller,
        call: Call,
        view: View,
        lender: Lender | None,
        now: Callable[[], datetime],
        cancelled: Flag,
        on_progress: Progress | None,
    ) -> None:
        self._caller, self._call, self._view, self._lender = caller, call, view, lender
        self._cancelled, self._on_progress = cancelled, on_progress
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None
        self.task, self._cancelling = task, task.cancelling()
        self._where = f"step {call.step_id!r} of run {view.run.id_text}"
        self._owner: Connection | None = None
        self._timeout = ""  # what is said of the limit that holds
        self._seconds = _seconds(call, now)
        self._until = None if self._seconds is None else self._loop.time() + self._seconds
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._loan: Loan | None = None  # while user code runs: no longer, so that no cycle is left to the collector

    @property
    def may_run_again(self) -> bool:
        """Whether a rerun is possible and wanted: it was lent, and nobody has interrupted it."""
        interrupted = self._cancelled.is_set() or self.task.cancelling() > self._cancelling
        return self._owner is not None and not interrupted and not self._call.work.at_most_once

    async def run(self) -> tuple[Outcome, BaseException | None]:
        """The outcome, and the error behind it. Raises as Caller.run says."""
        loan = Loan(self._caller.engines, self._lender, self._where, on_lent=self._lent, owner=self._owner)
        ended: Returned[Outcome] | Raised = Raised(_TimedOut())
        if self._begins_in_time(loan):
            try:
                ended = await play(self._script(loan), self._caller.threads, self)
            finally:
                self._end_limit()
        outcome, error = self._checked(self._in_time(ended))
        cancelled = isinstance(error, _Cancelled)
        if not loan.asked:
            loan.gate.close()
        else:
            try:
                outcome, error = await _uncancelled(self._settle(loan, outcome, error))
            except TransactionLost:
                if not cancelled:
                    raise
        if cancelled:
            raise asyncio.CancelledError
        if loan.error is not None:
            raise loan.error
        return outcome, error

    # -- running

    def _begins_in_time(self, loan: Loan) -> bool:
        """Whether there is time left for the user's code; its limit holds from here on. (asyncio.timeout() could not be
        given one later by another task, as lending does.)"""
        if self._until is not None:
            if self._until <= self._loop.time():
                return False
            self._set_timer(self._until)
        self._loan = loan
        return True

    def _set_timer(self, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(until, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self.task.cancel()

    def _end_limit(self) -> None:
        self._loan = None
        if self._timer is not None:
            self._timer.cancel()
        if self._expired:
            self.task.uncancel()

    def _in_time(self, ended: Returned[Outcome] | Raised) -> Returned[Outcome] | Raised:
        """What the user's code came to. A time limit is Raised(_TimedOut), a cancelled task Raised(_Cancelled)."""
        if self._expired:
            return Raised(_TimedOut())
        cancelled = isinstance(ended, Raised) and isinstance(ended.error, asyncio.CancelledError)
        return Raised(_Cancelled()) if cancelled and self.task.cancelling() > self._cancelling else ended

    def _script(self, loan: Loan) -> Script[Outcome]:
        ctx: StepContext[Any] = StepContext(
            self._call,
            self._view,
            lending=loan,
            cancelled=self._cancelled,
            app=self._caller.app,
            on_progress=self._on_progress,
            loop=self._loop,
        )
        return _iteration(self._call, ctx) if self._call.purpose is Purpose.ITERATION else _single(self._call, ctx)

    def _lent(self, loan: Loan) -> None:
        """From now on a limit holds, for all reruns together."""
        first, self._owner = self._owner is None, loan.owner
        until = self._loop.time() + self._caller.lent_limit
        if first and (self._until is None or until < self._until):
            self._until, self._seconds = until, self._caller.lent_limit
            self._timeout = " with the run's transaction in its hands: take the connection last"
            if self._loan is not None and not self._expired:
                self._set_timer(until)

    def tell(self) -> None:
        """A thread is to end. Out of time, nothing that it does counts: its SQL ends too."""
        self._cancelled.set()
        if self._loan is not None and self._expired:
            self._loan.revoke(f"{self._where} is out of time")

    def _checked(self, ended: Returned[Outcome] | Raised) -> tuple[Outcome, BaseException | None]:
        if isinstance(ended, Raised):
            return self._failed(ended.error), ended.error
        try:
            for text, what in _texts(ended.value):
                if self._caller.check is not None:
                    self._caller.check(text, f"the {what} of step {self._call.step_id!r}")
        except PayloadError as refused:
            return self._failed(refused), refused
        return ended.value, None

    def _failed(self, error: BaseException) -> Failed:
        if not isinstance(error, _TimedOut):
            return failed_attempt(self._call, error)
        timeout = StepTimeout(self._call.step_id, timeout=self._seconds, attempts=self._call.attempt)
        failed = failed_attempt(self._call, timeout, kind="timeout")
        if self._timeout:
            text = f"attempt {self._call.attempt} went on for {self._seconds:g} s{self._timeout}"
            failed = replace(failed, failure=replace(failed.failure, message=f"step {self._call.step_id!r}: {text}"))
        return failed

    # -- the transaction

    async def _settle(
        self, loan: Loan, outcome: Outcome, error: BaseException | None
    ) -> tuple[Outcome, BaseException | None]:
        """The lent transaction ended rightly for this outcome, or for the one that it turns into."""
        await loan.take_back()
        if loan.owner is None:
            return outcome, error
        if not loan.is_lent:
            raise TransactionLost(outcome, f"{self._where}: the transaction could not be made ready for it")
        return await self._settle_lent(loan.owner, loan.gate.last_error, outcome, error)

    async def _settle_lent(
        self,
        conn: Connection,
        last: psycopg.Error | None,
        outcome: Outcome,
        error: BaseException | None,
    ) -> tuple[Outcome, BaseException | None]:
        self._check_alive(conn, outcome)
        if not isinstance(outcome, Failed):
            error = await self._keep(conn, last, outcome)
            if error is None:
                return outcome, None
            outcome = self._failed(error)
            self._check_alive(conn, outcome)
        try:
            await settle_lent(conn, False)
        except psycopg.Error as lost:
            raise TransactionLost(outcome, f"{self._where}: the rollback to its savepoint failed: {lost}") from lost
        return outcome, error

    async def _keep(self, conn: Connection, last: psycopg.Error | None, outcome: Outcome) -> BaseException | None:
        """Keeps what a successful handler wrote; or the error that says why that is impossible."""
        if conn.pgconn.transaction_status == TransactionStatus.INERROR:
            return _aborted(last)
        try:
            await settle_lent(conn, True)
        except psycopg.Error as refused:
            if refused.sqlstate == _GONE_SAVEPOINT:
                self._ended_by_handler()
            if conn.closed:
                raise TransactionLost(outcome, f"{self._where}: the connection was lost: {refused}") from refused
            return refused
        return None

    def _check_alive(self, conn: Connection, outcome: Outcome) -> None:
        if conn.closed:
            raise TransactionLost(outcome, f"{self._where}: its connection was lost")
        if conn.pgconn.transaction_status == TransactionStatus.IDLE:
            self._ended_by_handler()

    def _ended_by_handler(self) -> None:
        why = f"{self._where} ended the run's transaction, or its savepoint {SAVEPOINT}, by SQL of its own"
        error = NonRetryable(f"{why}: leave COMMIT and ROLLBACK out; conn.begin_nested() is a transaction inside")
        raise TransactionLost(self._failed(error), why)


class _Cancelled(BaseException):
    """The task was cancelled, and that ended the handler."""


class _TimedOut(BaseException):
    """The time limit passed before the handler ended."""


async def _uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end even if the current task is cancelled meanwhile, which is then spent."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def _seconds(call: Call, now: Callable[[], datetime]) -> float | None:
    """How long the attempt may take: its own limit, or what is left until its deadline."""
    if call.deadline is None:
        return call.work.timeout
    left = max(0.0, (call.deadline - now()).total_seconds())
    return left if call.work.timeout is None else min(call.work.timeout, left)


def _texts(outcome: Outcome) -> Iterator[tuple[JsonText, str]]:
    """What of it is to be stored."""
    match outcome:
        case Succeeded(value):
            yield value, "result"
        case Suspended(snapshot):
            yield snapshot, "snapshot"
        case Iterated(value, _, item):
            yield from ((text, what) for text, what in ((value, "result"), (item, "feedback")) if text is not None)


# ---------------------------------------------------------------- scripts: what is called, in which order


def _single(call: Call, ctx: StepContext[Any]) -> Script[Outcome]:
    value = yield Ask(call.work.handler, (ctx,))
    snapshot = _suspension(value)
    if snapshot is None:
        return Succeeded(_dump(call.work.result, value, call.step_id))
    if call.purpose not in (Purpose.STEP, Purpose.BRANCH):
        raise _cannot_suspend(call)
    return Suspended(_dump(LOOSE, snapshot.snapshot, call.step_id, "snapshot"))


def _iteration(call: Call, ctx: StepContext[Any]) -> Script[Outcome]:
    loop, i = call.loop, call.iteration
    assert loop is not None
    assert i is not None
    if loop.map_input is not None and call.item is None:
        ctx.give_item((yield Ask(loop.map_input, (ctx,))))
    if loop.while_ is not None and not (yield Ask(loop.while_, (ctx, i))):
        return Iterated(None, stop=True)
    if loop.conditional and i >= loop.max_iterations:
        raise LoopLimitExceeded(loop.name, loop.max_iterations)
    value = yield Ask(call.work.handler, (ctx,))
    if _suspension(value) is not None:
        raise _cannot_suspend(call)
    text = _dump(call.work.result, value, call.step_id)
    return (yield from _after(loop, i, text, call))


def _after(loop: Loop, i: int, text: JsonText, call: Call) -> Script[Outcome]:
    """The handler has finished: is the loop over, and what does the next iteration get? Asked with the result as it
    comes back from the journal, so that a replay asks the same."""
    result = call.work.result.load(text)
    stop = loop.until is not None and bool((yield Ask(loop.until, (result, i), late=True)))
    if stop or loop.feedback is None:
        return Iterated(text, stop)
    item = yield Ask(loop.feedback, (result,), late=True)
    return Iterated(text, stop, _dump(LOOSE, item, call.step_id, "feedback"))


def _dump(schema: Schema, value: Any, step_id: str, what: str = "result") -> JsonText:
    try:
        return schema.dump(value)
    except PayloadError as error:
        raise error.at(f"the {what} of step {step_id!r}") from None


def _suspension(value: Any) -> Suspend | None:
    """`value` as a Suspend, if it is one or has the shape of one."""
    if value is None or isinstance(value, _NEVER_SUSPENDED):
        return None
    if isinstance(value, Suspend):
        return value
    status = _field(value, "status")
    if not isinstance(status, str) or status != "suspended":
        return None
    calls = _field(value, "pending_tool_calls")
    calls = _field(value, "pendingToolCalls") if calls is _ABSENT else calls
    state = _field(value, "state")
    if calls is _ABSENT or state is _ABSENT:
        return None
    return Suspend({"status": "suspended", "state": state, "pending_tool_calls": calls})


_ABSENT: Final[Any] = object()
_NEVER_SUSPENDED: Final = (str, int, float, list)


def _field(value: Any, name: str) -> Any:
    if isinstance(value, (dict, Mapping)):
        return value.get(name, _ABSENT)
    try:
        return getattr(value, name, _ABSENT)
    except Exception:  # a property of the user's: then it is not of this shape
        return _ABSENT


def _cannot_suspend(call: Call) -> NonRetryable:
    what = {Purpose.ITERATION: "a loop's handler", Purpose.UNDO: "a compensator"}.get(call.purpose, "this function")
    return NonRetryable(f"{call.step_id!r} returned Suspend: {what} can't suspend; steps and branches can")


# ---------------------------------------------------------------- failures: what user code raised


def failed_attempt(call: Call, error: BaseException, kind: str | None = None) -> Failed:
    """`error` as a failed attempt of `call`. Asks the work's Retry whether, and a backoff function of the user's when,
    to try again; never raises, whatever the exception's own methods do."""
    kind = kind or _kind(error)
    failure = failure_of(error, kind, call.step_id, call.attempt)
    if isinstance(error, Rollback):
        return Failed(replace(failure, details={"to": error.to}), retryable=False)
    if kind == "critical" or not call.work.retry.takes(error):
        return Failed(failure, retryable=False)
    if call.work.retry.exhausted(call.attempt):
        return Failed(failure, retryable=True)
    try:
        return Failed(failure, retryable=True, delay=call.work.retry.custom_delay(call.attempt))
    except BaseException as wrong:
        details = {**(failure.details or {}), "backoff": brief(wrong)}
        return Failed(replace(failure, details=details), retryable=False)


def _kind(error: BaseException) -> str:
    if isinstance(error, Rollback):
        return "rollback"
    critical = isinstance(error, NonRetryable | PayloadError | LoopLimitExceeded) or not isinstance(error, Exception)
    return "critical" if critical else "error"


def _aborted(last: psycopg.Error | None) -> psycopg.Error:
    """The handler returned, but a statement had failed before, and the transaction with it."""
    why = f"{type(last).__name__}: {last}" if last is not None else "a statement failed"
    error = psycopg.errors.InFailedSqlTransaction(
        f"the step's transaction was aborted: {why}. The handler returned as if nothing had happened: wrap what may "
        "fail in conn.begin_nested(), or call conn.rollback()"
    )
    error.__cause__ = last
    return error


def _is_rerun_case(error: BaseException | None) -> bool:
    """Whether the database made the attempt the victim of a deadlock or a serialization failure, and the handler did
    not make something else of it."""
    for _ in range(10):
        if error is None or isinstance(error, NonRetryable):
            return False
        if isinstance(error, psycopg.Error) and error.sqlstate in _RERUN_STATES:
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False
