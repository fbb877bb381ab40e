"""User code in flight, and the connection that it may ask for.

    attached   it runs under the transaction that locked the run
    lent       it has been given that transaction's connection: its writes commit with the journal, or not at all
    detached   the transaction committed a claim and gave the connection back; the row is free
    lent late  it asked for a connection after that: a second transaction, locked and fenced by the claim's token

The gate keeps two of them apart: whoever detaches and whoever lends never do so at once.
"""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg_pool import PoolTimeout

from durable.core.crash import claimed
from durable.core.settle import Ended
from durable.core.state import Claim, Failure, View
from durable.core.transition import Call, Failed, Interrupted, Outcome
from durable.engine.calls import TransactionLost
from durable.engine.hold import Hold
from durable.engine.points import Point
from durable.engine.slots import Slot
from durable.logs import go_inside
from durable.store.connection import Connection

if TYPE_CHECKING:
    from durable.engine.engine import Engine

LOST = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
UNDER_PRESSURE = 0.05  # seconds that a handler may keep its connection when others wait for one


class Flight:
    """One call to user code that is running. `hold` is the transaction that it runs under, if it has one."""

    def __init__(
        self, engine: Engine, view: View, call: Call, hold: Hold | None, claim: ClaimLock | None = None
    ) -> None:
        self._engine = engine
        self.view, self.call, self.hold = view, call, hold
        self.claim = claim
        self.lent = False
        self.lost: TransactionLost | None = None
        self.said: dict[str, Any] = {}  # by `progress` and `heartbeat`
        self.started_at = hold.now if hold is not None else engine.now()
        self._interrupted_by: Literal["cancel", "shutdown"] | None = None
        self._cancelled = Told()
        self._gate = asyncio.Lock()
        self.task = asyncio.create_task(self._fly(), name=f"{view.run.id_text} {call.step_id}")

    async def ended(self) -> Ended:
        """What it led to. Waits for it, and never abandons a running thread."""
        outcome = self.task.result() if self.task.done() else await asyncio.shield(self.task)
        now = self.hold.now if self.hold is not None else self._engine.now()
        return Ended(self.call, outcome, self.started_at, max(now, self.started_at))

    async def ends_attached(self, slot: Slot) -> bool:
        """Wait while it may hold the row. False: it has been detached and is running still."""
        await asyncio.sleep(0)
        if self.task.done():  # most handlers end at their first go
            return True
        options = self._engine.options
        patience = min(UNDER_PRESSURE, options.detach_after)
        if self.call.work.transactional is True or await self._ends_within(patience):
            return await self._ends_within(None)
        wanted = asyncio.create_task(slot.wanted())
        try:
            await asyncio.wait(
                {self.task, wanted}, timeout=options.detach_after - patience, return_when="FIRST_COMPLETED"
            )
        finally:
            wanted.cancel()
        return self.task.done() or not await self._detach()

    async def borrow(self) -> Connection:
        """The connection of the transaction in which the run's row is locked; a detached step gets a second one."""
        async with self._gate:
            if self.hold is None:
                assert self.claim is not None
                self.hold = await self.claim.lock_for_good(self.call)
            self.lent = self.hold.lent = True
            self.hold.connection.unwatch()
            return self.hold.connection

    def interrupt(self, by: Literal["cancel", "shutdown"]) -> None:
        """End it now if it is async; tell it by ``ctx.cancelled`` and wait for it if it runs in a thread."""
        if not self.task.done() and self._interrupted_by is None:
            self._interrupted_by = by
            self._cancelled.set()
            self.task.cancel()

    async def _ends_within(self, seconds: float | None) -> bool:
        if not self.task.done():
            await asyncio.wait({self.task}, timeout=seconds)
        return self.task.done()

    async def _detach(self) -> bool:
        """Commit a claim and give the connection back, unless it was lent or the handler ended meanwhile."""
        async with self._gate:
            if self.lent or self.task.done():
                await self._ends_within(None)
                return False
            hold, self.hold = self.hold, None
            assert hold is not None
            self._engine.at(Point.BEFORE_CLAIM, self.view)
            self.claim = ClaimLock(self._engine, hold.view.run.id, self._engine.new_claim())
            taken = claimed(hold.view, hold.now, self.claim.claim, (self.call,))
            with self._engine.database_errors_only():  # whether it was committed shows when the outcome is written
                await hold.write(taken)
            self._engine.at(Point.AFTER_CLAIM, self.view)
            return True

    async def _without_transaction(self, lost: TransactionLost) -> Outcome:
        self.lost = lost
        gone = self.hold is None or self.hold.connection.closed
        if self.hold is not None:
            await self.hold.discard()
        if gone:
            return Interrupted(self._interrupted_by or "crash")
        return lost.outcome if isinstance(lost.outcome, Failed) else without_transaction(self.call, lost)

    async def _fly(self) -> Outcome:
        engine, run, call = self._engine, self.view.run, self.call
        # what every log record of the handler says; before the hooks: so they know which step it is
        go_inside(run=run.id_text, workflow=run.workflow, step=call.step_id, attempt=call.attempt)
        engine.at(Point.BEFORE_HANDLER, self.view)
        engine.takes_off(self)
        try:
            said = partial(engine.say, self)
            outcome = await engine.caller.run(
                call, self.view, self, now=engine.now, cancelled=self._cancelled, on_progress=said
            )
        except TransactionLost as lost:
            outcome = await self._without_transaction(lost)
        except asyncio.CancelledError:
            if self._interrupted_by is None:
                raise
            self.task.uncancel()
            outcome = Interrupted(self._interrupted_by)
        finally:
            engine.has_landed(self)
        engine.at(Point.AFTER_HANDLER, self.view)
        return outcome


class Told:
    """Whether a handler was told to end: set on the loop, read in the handler's thread."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told = False

    def set(self) -> None:
        self._told = True

    def is_set(self) -> bool:
        return self._told


class ClaimLock:
    """A claim, and the way to its run's row: those who work under it queue here, before they take a connection."""

    def __init__(self, engine: Engine, run_id: uuid.UUID, claim: Claim) -> None:
        self._engine, self.run_id, self.claim = engine, run_id, claim
        self.row = asyncio.Lock()

    async def lock_for_good(self, call: Call) -> Hold:
        """Lock the row and keep others under this claim out until `settled`. Raises ClaimLost, also if `call` is not to
        run any more: its branch has lost a race."""
        await self.row.acquire()
        try:
            hold = await self._engine.take_claimed(self)
        except BaseException:
            self.row.release()
            raise
        if hold is None:
            self.row.release()
            raise ClaimLost(f"run {self.run_id} was taken over by another worker")
        if not is_running(hold.view, call):
            await hold.drop()
            self.row.release()
            raise Discarded(f"run {self.run_id}: {call.step_id!r} is not needed any more")
        return hold


class ClaimLost(Exception):
    """The claim has ended or was taken over: whatever the handler still brings is discarded."""


class Discarded(ClaimLost):
    """The claim stands, but the handler's branch has lost a race."""


def without_transaction(call: Call, error: BaseException) -> Outcome:
    """What an attempt came to whose own transaction is gone, and with it what it wrote. A lost connection is nothing
    that the step did: it was interrupted, as by a crash. What the server refused is a failed attempt."""
    if isinstance(error, LOST):
        return Interrupted("crash")
    message = f"the step's transaction was lost, and with it what the step wrote: {error}"
    failure = Failure("durable.engine.calls.TransactionLost", message, "error", call.step_id, call.attempt)
    return Failed(failure, retryable=True)


def is_running(view: View, call: Call) -> bool:
    """Whether the run still waits for this call: False for a branch that lost a race, and if an uncertain COMMIT of its
    outcome did go through."""
    begun = view.run.frame.get(call.step_id)
    return begun is not None and begun.running
