"""Runs that this worker executes without holding their row: long steps, and branches side by side.

Each outcome is written in a transaction of its own: lock, check the token, journal, commit. The owner plans on whenever
a branch has ended, falls due, or a message has come, until the node is done or no branch can move; then the claim ends
with the same write. Whoever finds the claim gone discards what it has.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from durable.core.crash import claimed
from durable.core.plan import go_on as go_on_by_queue
from durable.core.plan import plan
from durable.core.settle import Ended, settle
from durable.core.state import View
from durable.core.transition import Call, Fanout, Next, Transition
from durable.engine.flight import ClaimLock, ClaimLost, Discarded, Flight, is_running, without_transaction
from durable.engine.hold import Hold, take
from durable.engine.points import Point
from durable.values import Status

if TYPE_CHECKING:
    from durable.engine.engine import Engine

log = logging.getLogger(__name__)


async def execute(engine: Engine, hold: Hold, work: Call | Fanout) -> Hold | None:
    """Commit a claim, then run these calls, and all that follows from them within their node. Nothing is held after."""
    view, calls = hold.view, work.calls
    lock = ClaimLock(engine, view.run.id, engine.new_claim())
    owner = Claimed(engine, lock)
    with engine.owning(view.run.id, owner):  # before it is committed: a claim without an owner is a crash
        engine.at(Point.BEFORE_CLAIM, view)
        taken = claimed(view, hold.now, lock.claim, calls)
        await hold.write(taken)
        engine.at(Point.AFTER_CLAIM, view)
        owner.start(taken, view, calls, hold.locked_at)
        return await owner.drive()


async def go_on(engine: Engine, flight: Flight) -> Hold | None:
    """Go on with a call that was attached until now."""
    assert flight.claim is not None
    owner = Claimed(engine, flight.claim)
    with engine.owning(flight.view.run.id, owner):
        owner.adopt(flight)
        return await owner.drive()


class Claimed:
    """The owner's side of a claim: the flights under it, and the plan that goes on while they fly."""

    def __init__(self, engine: Engine, lock: ClaimLock) -> None:
        self._engine, self._lock = engine, lock
        self._flights: dict[str, Flight] = {}
        self._recorders: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._next_due: float | None = None  # seconds until a branch falls due
        self._over = False

    def look(self) -> None:
        """Something happened to the run: a message, a request, a takeover."""
        self._news.set()

    def start(self, taken: Transition, view: View, calls: tuple[Call, ...], planned: datetime) -> None:
        """Set off the calls of a claim that has been committed. What sleeps beside them is looked at when it is due;
        `planned`: it was not due then."""
        view = replace(view, run=taken.after)
        for call in calls:
            self.adopt(Flight(self._engine, view, call, None, self._lock))
        self._next_due = _seconds_to_next(view, planned, self._engine.now())

    def adopt(self, flight: Flight) -> None:
        self._flights[flight.call.step_id] = flight
        recorder = asyncio.create_task(self._record(flight))
        self._recorders.add(recorder)

    async def drive(self) -> Hold | None:
        """Go on until the claim has ended. Nothing is held then."""
        try:
            while not self._over:
                await self._wait_for_news()
                if not self._over:
                    await self._plan_on()
        finally:
            await self._land()
        return None

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(self._next_due):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        for recorder in [task for task in self._recorders if task.done()]:
            self._recorders.discard(recorder)
            recorder.result()  # an error of the engine's own must not be swallowed

    async def _plan_on(self) -> None:
        async with self._lock.row:
            with self._engine.database_errors_only():
                hold = await self._engine.take_claimed(self._lock)
                self._over = hold is None
                while hold is not None:
                    async with hold:
                        hold = await self._step(hold)
                return
            self._news.set()  # look again

    async def _step(self, hold: Hold) -> Hold | None:
        view, now = hold.view, hold.now
        if view.run.ending is not None and not _may_end(view, now):
            self._interrupt("cancel")
        if self._engine.stopping and not self._flights:
            return await self._write(hold, go_on_by_queue(view, now))
        decided = plan(view, now, self._engine.limits(), frozenset(self._flights))
        if view.body is not None and view.body.over:  # while handlers of its branches run
            self._interrupt("cancel")
        match decided:
            case Transition() as transition:
                return await self._write(hold, transition)
            case Call() if not self._flights:  # what was side by side has ended: it goes on as any other run
                return await self._write(hold, go_on_by_queue(view, now))
            case Fanout(calls) if not self._engine.stopping:
                return await self._launch(hold, calls)
            case _:
                self._next_due = _seconds_to_next(view, hold.locked_at, now)
                return await hold.release()

    async def _write(self, hold: Hold, transition: Transition) -> Hold | None:
        if transition.after.claim != self._lock.claim:
            self._over = True
            return await hold.write(transition)
        self._end_discarded(transition)
        following = await hold.write_and_lock(transition)
        if following is None:
            self._news.set()  # somebody else had the row in between: look again
        return following

    def _end_discarded(self, transition: Transition) -> None:
        """Branches that lost a race: their handlers see it."""
        for step_id, flight in self._flights.items():
            begun = transition.after.frame.get(step_id)
            if begun is None or not begun.running:
                flight.interrupt("cancel")

    async def _launch(self, hold: Hold, calls: tuple[Call, ...]) -> Hold | None:
        view = hold.view
        taken = claimed(view, hold.now, self._lock.claim, calls)
        following = await self._write(hold, taken)
        self.start(taken, view, calls, hold.locked_at)
        return following

    async def _record(self, flight: Flight) -> None:
        """Write what the flight led to, as soon as it has ended."""
        try:
            ended = await flight.ended()
            self._engine.at(Point.BEFORE_OUTCOME, flight.view)
            await self._write_outcome(flight, ended)
        except ClaimLost as error:
            log.warning("%s: what its handler did is discarded", error)
            self._over = self._over or not isinstance(error, Discarded)
        finally:
            del self._flights[flight.call.step_id]
            self._news.set()
            if flight.hold is not None:  # it was lent a connection, and an error of the engine's own came in between
                self._lock.row.release()
                await flight.hold.discard()

    async def _write_outcome(self, flight: Flight, ended: Ended) -> None:
        if flight.hold is not None:  # it was lent a connection: the row is locked already
            try:
                if flight.lost is None:
                    async with flight.hold:
                        return await self._settle(flight.hold, ended)
            except self._engine.DATABASE_ERRORS as error:
                ended = replace(ended, outcome=without_transaction(flight.call, error))
            finally:
                self._lock.row.release()
                flight.hold = None
        async with self._lock.row:
            async for _ in self._engine.tries():
                hold = await self._engine.take_claimed(self._lock)
                if hold is None:
                    raise ClaimLost(f"run {self._lock.run_id}: the claim on it has ended")
                if not is_running(hold.view, flight.call):
                    await hold.drop()
                    return
                with self._engine.database_errors_only():
                    async with hold:
                        return await self._settle(hold, ended)

    async def _settle(self, hold: Hold, ended: Ended) -> None:
        transition = settle(hold.view, ended, self._engine.limits())
        if transition.ends and await hold.read_inbox():
            transition = settle(hold.view, ended, self._engine.limits())
        if transition.next is None and _parks(transition) and any(message.fresh for message in hold.view.inbox):
            transition = replace(transition, next=Next.of(transition.after.status))  # nobody has planned with these yet
        await hold.write(transition, planned=False)
        self._over = self._over or transition.after.claim != self._lock.claim

    def give_up(self) -> None:
        """The process ends although a handler does not: wait for it no longer."""
        self._over = True
        for recorder in self._recorders:
            recorder.cancel()
        self._recorders.clear()
        self._news.set()

    def _interrupt(self, by: Literal["cancel", "shutdown"]) -> None:
        for flight in self._flights.values():
            flight.interrupt(by)

    async def _land(self) -> None:
        """The claim is over: what still flies is interrupted, awaited and discarded."""
        self._over = True
        self._interrupt("cancel")
        await asyncio.gather(*self._recorders, return_exceptions=True)


async def record_anew(engine: Engine, view: View, flight: Flight, error: Exception) -> Hold | None:
    """The transaction that an attached call ran under is gone, or its COMMIT was never answered.

    Unless it did go through, the outcome is written in a new one, fenced by the revision: what the handler did outside
    the database has happened. If it had been lent the connection, what it wrote is lost: a failed attempt.
    """
    ended = await flight.ended()
    if flight.lent and flight.lost is None:
        ended = replace(ended, outcome=without_transaction(flight.call, error))
    log.warning("run %s: writing the outcome of %r again after: %s", view.run.id, flight.call.step_id, error)
    async for _ in engine.tries(limit=8):
        with engine.database_errors_only():
            hold = await take(engine, view.run.id)
            if hold is None:
                return None
            if hold.view.run.revision != view.run.revision:
                await hold.drop()
                return None
            hold.take_over(view, ended.call.step_id)
            return await hold.write(settle(hold.view, ended, engine.limits()), planned=False)
    log.error(
        "run %s: the outcome of %r could not be written; recovery puts the run back", view.run.id, ended.call.step_id
    )
    return None


def _may_end(view: View, now: datetime) -> bool:
    """Whether the handlers of a canceled run may come to an end: compensators, and for a while those that clean up."""
    asked = view.run.ending
    assert asked is not None
    return view.run.status is Status.COMPENSATING or (asked.until is not None and asked.until > now)


def _parks(transition: Transition) -> bool:
    return transition.after.claim is None and transition.after.waiting_for is not None


def _seconds_to_next(view: View, planned: datetime, now: datetime) -> float | None:
    """Until the next wait is over; those that were over when it was `planned` have been dealt with."""
    times = (time for begun in view.run.frame.values() for time in (begun.due, begun.deadline) if time is not None)
    soonest = min((time for time in times if time > planned), default=None)
    return None if soonest is None else max((soonest - now).total_seconds(), 0.0)
