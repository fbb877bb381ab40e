"""A locked run: an open transaction on one connection, and what was read under the lock.

A hold is made by :func:`take`, and ends by writing a transition or by letting go. One transaction locks one run.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

import psycopg
from psycopg.pq import TransactionStatus

from durable.core.functions.body import Body
from durable.core.functions.new import new_body
from durable.core.journal import Journal
from durable.core.state import Claim, Entry, View
from durable.core.transition import Transition
from durable.engine.bodies import Kept
from durable.engine.points import Point
from durable.store.apply import apply_and_commit, apply_and_relock
from durable.store.connection import Connection
from durable.store.db import alive
from durable.store.errors import InboxNews, RowBusy
from durable.store.flush import Answer
from durable.store.inbox import forward, load_inbox, mark_seen
from durable.store.journal import load_journal
from durable.store.query import Statement
from durable.store.runs import Following, Locked, Mode, abandon, begin_and_lock, commit, let_go, write_and_lock

if TYPE_CHECKING:
    from durable.engine.desk import Desk
    from durable.engine.slots import Heir, Slot

log = logging.getLogger(__name__)

RESET: Final = (
    "reset session authorization; reset role; reset all; unlisten *; discard temp; select pg_advisory_unlock_all()"
)
"""What a step may have done to the session of the connection that it was lent."""


class Hold:
    """The hold on one run. After `write`, `write_and_lock`, `release` or `drop` it is over, and its connection is given
    back. `lent`: a step was given the connection.

    ``async with hold``: an error in the block, whatever it is, leaves neither the row locked nor the connection lost.
    """

    def __init__(
        self,
        desk: Desk,
        connection: Connection,
        locked: Locked,
        body: Body | None = None,
    ) -> None:
        self._desk = desk
        self.connection = connection
        self.lent = False
        self._over = False
        self.locked_at, self._started = locked.now, time.monotonic()
        run, journal = locked.run, locked.journal
        assert journal is not None
        workflow = desk.registry.find(run.workflow, run.version)
        if body is None and workflow is not None and workflow.body is not None:
            body = new_body(workflow, run, desk.registry, desk.guard)
        self._journal = journal
        self.view = View(run, workflow, desk.registry, journal, locked.inbox, body)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            await self.discard()

    @property
    def now(self) -> datetime:
        """The database's time, as it has moved on since the lock."""
        return self.locked_at + timedelta(seconds=time.monotonic() - self._started)

    async def read_inbox(self) -> bool:
        """Look again: a message may have been committed while user code ran under this lock. If one was, what was
        decided without it is void, and so is what a body was driven to for that: another one takes its place."""
        inbox = await load_inbox(self._desk.store, self.connection, self.view.run.id)
        if inbox == self.view.inbox:
            return False
        body = self.view.body
        if body is not None:
            body.close()
            body = self._body_with(body.deferred)
        self.view = replace(self.view, inbox=inbox, body=body)
        return True

    def take_over(self, view: View, step_id: str) -> None:
        """Go on from `view`: another hold on this revision was lost, with entries of ephemeral steps that it had not
        written yet. Not with that of `step_id`, which was the reason to write."""
        known = view.body.deferred if view.body is not None else {}
        deferred = {key: entry for key, entry in known.items() if key != step_id}
        if deferred:
            self.view = replace(view, inbox=self.view.inbox, body=self._body_with(deferred))

    def _body_with(self, deferred: Mapping[str, Entry]) -> Body:
        """A body that has not been driven yet. `deferred`: the entries that are still to be written."""
        workflow = self.view.workflow
        assert workflow is not None
        body = new_body(workflow, self.view.run, self.view.registry, self._desk.guard)
        body.deferred.update(deferred)
        return body

    async def write(
        self, transition: Transition, *, planned: bool = True, whole: bool = False, slot: Slot | None = None
    ) -> Hold | None:
        """Write and commit. Nothing is held afterwards, whatever comes of it, but for InboxNews.

        `planned`: what lies in the inbox was planned with, and is no reason any more to wake the run. `whole`: only if
        nothing came to the inbox since it was read; else InboxNews is raised, and the run is held as before. `slot`:
        the job's, which is over: if somebody waits for one, the run for which that is may be locked in the same flush,
        and passed on with the slot.
        """
        desk, passed_on, refused = self._desk, False, False
        heir = slot.heir() if slot is not None and not self.lent and not transition.replies else None
        try:
            desk.at(Point.BEFORE_COMMIT, self.view)
            transition = self._with_reports(transition)
            inbox = self.view.inbox if planned else ()
            applied, following = await apply_and_commit(
                desk.store,
                self.connection,
                transition,
                inbox,
                journal=self._journal,
                quiet=desk.fetches,
                whole=self.view.inbox if whole else None,
                following=_wanted(desk, heir) if heir is not None else None,
            )
            self._keep_body(transition, applied.entries)
            passed_on = heir is not None and following is not None and self._pass_on(heir, following)
        except InboxNews:
            refused = True
            raise
        finally:
            if heir is not None and not passed_on:
                heir.put_back()
            if not refused:
                await self._give_back(connection=not passed_on)
        desk.written(transition)
        if transition.next is not None:
            desk.fetch()
        if transition.after.status.ended:
            desk.ended(transition.after, partial(self._journal_after, transition, applied.entries))
        desk.at(Point.AFTER_COMMIT, self.view)
        return None

    def _pass_on(self, heir: Heir, locked: Locked) -> bool:
        """The slot and the connection, on which the heir's run is locked now; unless nobody waits for that any more."""
        if heir.gone:
            return False
        hold = _loaded(self._desk, self.connection, locked)
        if hold is None:
            return False
        heir.inherit(hold)
        return True

    async def write_and_lock(self, transition: Transition) -> Hold | None:
        """Write, commit, and lock again for the next step, in one flush; or in two, if somebody holds the row just
        then. None: somebody else has the run now.

        What is written enqueues no continuation; where the lock could not be had again, that is made up for here.
        """
        if self.lent or transition.replies:  # the connection goes back to be reset; who asked is told after a COMMIT
            await self.write(replace(transition, next=None))
            return await self._take_again(transition)
        desk = self._desk
        try:
            desk.at(Point.BEFORE_COMMIT, self.view)
            transition = self._with_reports(transition)
            applied, committed = await apply_and_relock(
                desk.store, self.connection, transition, self.view.inbox, journal=self._journal
            )
            desk.written(transition)
            desk.at(Point.AFTER_COMMIT, self.view)
        except BaseException:
            await self._give_back()
            raise
        if committed.inbox is None:
            await self._give_back()
            if committed.error is None:
                return await self._take_again(transition)
            log.warning("run %s: written, but not locked again: %s", transition.after.id, committed.error)
            await desk.enqueue(transition)
            return None
        self._over = True  # the connection goes on in the next hold
        body = self._driven(transition, applied.entries)
        journal = self._journal_after(transition, applied.entries)
        return Hold(desk, self.connection, Locked(transition.after, self.now, committed.inbox, journal), body)

    def defer(self, view: View) -> Hold:
        """A step has ended whose entry may be written with the next transition: `view` is with it."""
        self.view = view
        return self

    async def forward(self) -> None:
        """What came to a run that has continued as new goes on to its successor."""
        try:
            await forward(self._desk.store, self.connection, self.view.run.id)
            await commit(self._desk.store, self.connection)
        finally:
            await self._give_back()

    async def release(self) -> Hold | None:
        """There is nothing to do: messages that were planned with are marked as seen. Nothing is held afterwards."""
        try:
            fresh = [message.seq for message in self.view.inbox if message.fresh]
            await mark_seen(self._desk.store, self.connection, self.view.run.id, fresh)
            await let_go(self._desk.store, self.connection)
            self._keep_body_as_it_is()
        finally:
            await self._give_back()
        self._desk.left(self.view.run, self.locked_at)
        return None

    async def drop(self) -> None:
        """Let go without having looked: whatever is new in the inbox stays new."""
        try:
            await let_go(self._desk.store, self.connection)
            self._keep_body_as_it_is()
        finally:
            await self._give_back()
        self._desk.left(self.view.run)

    async def discard(self) -> None:
        """The transaction is not ours any more, or must not go on: the connection is closed. Nothing, if it is over."""
        if not self._over:
            await self.connection.close()
            await self._give_back()

    def _with_reports(self, transition: Transition) -> Transition:
        """With what this process's hooks are to be told of it."""
        if not self._desk.hooks.kinds:
            return transition
        return replace(transition, reports=self._desk.hooks.reports(self.view, transition, self.now))

    async def _take_again(self, transition: Transition) -> Hold | None:
        written = transition.after
        try:
            hold = await take(self._desk, written.id)
        except RowBusy:
            hold = None
        if hold is not None and hold.view.run.revision != written.revision:
            await hold.drop()
            return None  # who wrote since then has enqueued what follows
        if hold is None:
            await self._desk.enqueue(transition)
        return hold

    def _journal_after(self, transition: Transition, entries: Iterable[Entry]) -> Journal:
        return self._journal.after(entries, {*transition.forget, *transition.prune})

    def _driven(self, transition: Transition, entries: Iterable[Entry]) -> Body | None:
        """The body, if it goes on from what was written; else it is closed."""
        body, after = self.view.body, transition.after
        if body is None:
            return None
        if body.stale or transition.forget or after.status.ended or after.ending is not None:
            body.close()
            return None
        body.written(entries, transition.prune)
        return body

    def _keep_body(self, transition: Transition, entries: Iterable[Entry]) -> None:
        if self.view.body is None:
            return
        body = self._driven(transition, entries)
        if body is not None:
            kept = Kept(transition.after.revision, self._journal_after(transition, entries), body)
            self._desk.bodies.keep(transition.after.id, kept)
        self.view = replace(self.view, body=None)

    def _keep_body_as_it_is(self) -> None:
        body, run = self.view.body, self.view.run
        if body is not None and not body.stale and not body.deferred and not run.status.ended:
            self._desk.bodies.keep(run.id, Kept(run.revision, self._journal, body))
            self.view = replace(self.view, body=None)

    async def _give_back(self, *, connection: bool = True) -> None:
        self._over = True
        if self.view.body is not None:
            self.view.body.close()
        if not connection:  # it goes on in another hold
            return
        with suppress(psycopg.Error):
            if self.connection.pgconn.transaction_status != TransactionStatus.IDLE:
                await abandon(self.connection)
            if self.lent and not self.connection.closed:
                await self.connection.execute(RESET)
        await self._desk.pool.putconn(self.connection)


async def take(
    desk: Desk, run_id: uuid.UUID, *, mode: Mode = "wait", claim: Claim | None = None, revision: int | None = None
) -> Hold | None:
    """Lock a run and load it. None if there is no such run, it was skipped, or `claim` no longer holds it. `revision`:
    where it is expected to be; at 0 nothing has been written of it.

    Raises RowBusy if somebody else has held the row for a second.
    """
    connection = await desk.pool.getconn()
    try:
        with_journal = revision != 0 and run_id not in desk.bodies
        locked = await begin_and_lock(desk.store, connection, run_id, mode, with_journal=with_journal)
        if locked is not None and claim is not None and locked.run.claim != claim:
            await let_go(desk.store, connection)
            locked = None
        if locked is not None:
            if (hold := _loaded(desk, connection, locked)) is not None:
                return hold
            journal = await load_journal(desk.store, connection, run_id)
            return Hold(desk, connection, replace(locked, journal=journal))
    except BaseException:
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            await abandon(connection)
        await desk.pool.putconn(connection)
        raise
    await desk.pool.putconn(connection)
    return None


async def write_and_take(
    desk: Desk, statement: Statement, values: Mapping[str, Any], run_id: uuid.UUID
) -> tuple[Answer, Hold | None]:
    """Execute a statement that wakes a run. Once it is committed, lock the run if nobody has, and load it: in one
    flush. Raises only if it was not committed."""
    connection = await alive(desk.pool)
    hold = None
    try:
        following = Following(run_id, with_journal=run_id not in desk.bodies)
        answer, locked = await write_and_lock(desk.store, connection, statement, values, following)
        if locked is not None and (hold := _loaded(desk, connection, locked)) is None:
            await abandon(connection)
    finally:
        if hold is None:
            await desk.pool.putconn(connection)
    return answer, hold


def _wanted(desk: Desk, heir: Heir) -> Following:
    return Following(heir.run_id, with_journal=heir.revision != 0 and heir.run_id not in desk.bodies)


def _loaded(desk: Desk, connection: Connection, locked: Locked) -> Hold | None:
    """With the journal that is kept here, or was read with the lock. None: it is still to be read."""
    desk.heard(locked.now)
    kept = desk.bodies.take(locked.run.id, locked.run.revision)
    if kept is not None:
        return Hold(desk, connection, replace(locked, journal=kept.journal), kept.body)
    if locked.run.revision == 0:
        locked = replace(locked, journal=Journal())
    return Hold(desk, connection, locked) if locked.journal is not None else None
