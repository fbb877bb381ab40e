"""The heart: one job takes a run further.

    lock the run's row -> plan -> run user code -> settle -> write journal, cursor and next job -> commit

all in one transaction; then the next step, in the next. What happens next (`plan`) and what a call led to (`settle`)
is decided by the pure core; this file holds the row while user code runs, and writes what was decided.

A step that is still running after `detach_after` is detached: the transaction, which holds nothing but the lock,
commits a claim instead, and `claims.py` goes on without holding the row.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from durable.core.crash import postponed
from durable.core.plan import plan
from durable.core.settle import defer, settle
from durable.core.transition import Call, Fanout, Next, Transition
from durable.engine import claims
from durable.engine.flight import Flight
from durable.engine.hold import Hold, take
from durable.engine.points import Point
from durable.engine.slots import Slot
from durable.store.errors import InboxNews, RowBusy

if TYPE_CHECKING:
    from durable.engine.engine import Engine

SUSPECT_RETRY = 1.0  # seconds until a step that was running in a crash asks again whether it may run alone


async def advance(engine: Engine, run_id: uuid.UUID, revision: int, taken: Slot | None = None) -> None:
    """The continuation of a run at `revision`: does nothing when the run has moved on, or is claimed. `taken`: a slot
    that was had before the job has begun, maybe with the run locked."""
    await continue_run(engine, run_id, revision, Next.ADVANCE, taken)


async def continue_run(engine: Engine, run_id: uuid.UUID, revision: int, kind: Next, taken: Slot | None = None) -> None:
    """Take the run at `revision` further, forward or back."""
    parked = await continue_burst(engine, run_id, revision, kind, taken)
    await after_naps(engine, parked)


async def after_naps(engine: Engine, parked: Transition | None) -> None:
    """A run that goes on in a moment needs no job for that."""
    while parked is not None and (seconds := engine.nap(parked)) is not None:
        await asyncio.sleep(seconds)
        after = parked.after
        parked = await continue_burst(engine, after.id, after.revision, Next.of(after.status))


async def continue_burst(
    engine: Engine, run_id: uuid.UUID, revision: int, kind: Next, taken: Slot | None = None
) -> Transition | None:
    """Lock the run and take it as far as it goes; what was written last."""
    async with taken or engine.slots.one(run_id, revision) as slot:
        try:
            hold = slot.hold or await lock(engine, run_id, revision)
        except RowBusy:  # whoever holds the row may end without moving the run on
            await engine.enqueue_later(run_id, revision, kind)
            return None
        if hold is None:
            return None
        if hold.view.run.revision != revision or hold.view.run.claim is not None:
            await hold.drop()  # not planned: what is new in the inbox stays new
            return None
        return await burst(engine, hold, slot, kind)


async def lock(engine: Engine, run_id: uuid.UUID, revision: int | None = None) -> Hold | None:
    """As `take`, at a point where a test may kill this process."""
    engine.at(Point.BEFORE_LOCK, None)
    return await take(engine, run_id, revision=revision)


async def burst(engine: Engine, hold: Hold | None, slot: Slot, kind: Next) -> Transition | None:
    """Step after step, each its own transaction, until the run parks, ends, is claimed, or others have their turn.

    Returns the transition that was written last, if it was this burst that wrote it."""
    budget = Budget(engine, kind)
    while hold is not None:
        async with hold:
            engine.at(Point.AFTER_LOCK, hold.view)
            match plan(hold.view, hold.now, engine.limits()):
                case Transition() as transition:
                    hold = await write(hold, transition, budget, slot)
                case Call() | Fanout() as work:
                    with engine.suspects.admit(hold.view.run.id, work) as admitted:
                        if admitted:
                            hold = await execute(engine, hold, work, slot, budget)
                        else:
                            hold = await hold.write(postponed(hold.view, hold.now, work, SUSPECT_RETRY))
                case None:
                    hold = await hold.release()
    return budget.last


async def execute(engine: Engine, hold: Hold, work: Call | Fanout, slot: Slot, budget: Budget) -> Hold | None:
    """Run user code: one call while holding the row, if it may; branches, and what is long, by a claim."""
    if isinstance(work, Fanout) or work.claims_first:
        slot.give_back()
        return await claims.execute(engine, hold, work)
    return await execute_attached(engine, hold, work, slot, budget)


async def execute_attached(engine: Engine, hold: Hold, call: Call, slot: Slot, budget: Budget) -> Hold | None:
    """Run one call under the row's lock, and write what it led to in the same transaction."""
    flight = Flight(engine, hold.view, call, hold)
    if not await flight.ends_attached(slot):
        slot.give_back()
        return await claims.go_on(engine, flight)
    ended = await flight.ended()
    if flight.lost is not None:
        return await claims.record_anew(engine, hold.view, flight, flight.lost)
    try:
        if (deferred := defer(hold.view, ended)) is not None:
            return hold.defer(deferred)
        transition = settle(hold.view, ended, engine.limits())
        try:
            return await write(hold, transition, budget, slot, whole=transition.ends)
        except InboxNews:  # a pause or cancel that came during the last step is not overlooked
            await hold.read_inbox()
            return await write(hold, settle(hold.view, ended, engine.limits()), budget, slot)
    except engine.DATABASE_ERRORS as error:
        await hold.discard()
        return await claims.record_anew(engine, hold.view, flight, error)


async def write(hold: Hold, transition: Transition, budget: Budget, slot: Slot, *, whole: bool = False) -> Hold | None:
    """Commit a transition, and lock the run again if this job goes on with it. `whole`: see ``Hold.write``."""
    budget.last = transition
    if budget.allows(transition):
        return await hold.write_and_lock(transition)
    return await hold.write(transition, whole=whole, slot=slot)


class Budget:
    """How much one job may do before others have their turn."""

    def __init__(self, engine: Engine, kind: Next) -> None:
        self._engine, self._kind = engine, kind
        self._steps = engine.options.burst_steps
        self._until = time.monotonic() + engine.options.burst_seconds
        self.last: Transition | None = None  # that was written

    def allows(self, transition: Transition) -> bool:
        """Whether the job that decided `transition` takes the next step as well."""
        self._steps -= 1
        left = self._steps > 0 and time.monotonic() < self._until and not self._engine.stopping
        return left and transition.next is self._kind
