"""A locked run: an open transaction on one connection, and what was read under the lock.

A hold is made by :func:`take`, and ends by writing a transition or by letting go. One transaction locks one run.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, Self

import psycopg
from psycopg.pq import TransactionStatus

from durable.core.state import Claim, Entry, Run, View
from durable.core.transition import Transition
from durable.engine.points import Point
from durable.store.apply import apply_and_commit, apply_and_relock
from durable.store.db import Connection
from durable.store.errors import RowBusy
from durable.store.inbox import load_inbox, mark_seen
from durable.store.journal import load_journal
from durable.store.runs import Locked, Mode, abandon, begin_and_lock, let_go

if TYPE_CHECKING:
    from durable.engine.desk import Desk

RESET: Final = (
    "reset session authorization; reset role; reset all; unlisten *; discard temp; select pg_advisory_unlock_all()"
)
"""What a step may have done to the session of the connection that it was lent."""


class Hold:
    """The hold on one run. After `write`, `write_and_lock`, `release` or `drop` it is over, and its connection is given
    back. `lent`: a step was given the connection.

    ``async with hold``: an error in the block, whatever it is, leaves neither the row locked nor the connection lost.
    """

    def __init__(self, desk: Desk, connection: Connection, locked: Locked, journal: Mapping[str, Entry]) -> None:
        self._desk = desk
        self.connection = connection
        self.lent = False
        self._over = False
        self._read_at, self._started = locked.now, time.monotonic()
        desk.heard(locked.now)
        run = locked.run
        workflow = desk.registry.find(run.workflow, run.version)
        self.view = View(run, workflow, desk.registry, journal, locked.inbox)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            await self.discard()

    @property
    def now(self) -> datetime:
        """The database's time, as it has moved on since the lock."""
        return self._read_at + timedelta(seconds=time.monotonic() - self._started)

    async def read_inbox(self) -> None:
        """Look again: a message may have been committed while user code ran under this lock."""
        inbox = await load_inbox(self._desk.store, self.connection, self.view.run.id)
        self.view = replace(self.view, inbox=inbox)

    async def write(self, transition: Transition, *, planned: bool = True) -> Hold | None:
        """Write and commit. Nothing is held afterwards, whatever comes of it.

        `planned`: what lies in the inbox was planned with, and is no reason any more to wake the run.
        """
        desk, what = self._desk, executing(self.view)
        try:
            desk.at(Point.BEFORE_COMMIT, what)
            inbox = self.view.inbox if planned else ()
            await apply_and_commit(desk.store, self.connection, transition, inbox)
        finally:
            await self._give_back()
        desk.written(transition)
        desk.at(Point.AFTER_COMMIT, what)
        return None

    async def write_and_lock(self, transition: Transition) -> Hold | None:
        """Write, commit, and lock again for the next step, in one flush. None: somebody else has the run now.

        What is written enqueues no continuation; where the lock could not be had again, that is made up for here.
        """
        silent = replace(transition, next=None)
        if self.lent:  # the connection goes back to be reset
            await self.write(silent)
            return await self._take_again(transition)
        desk, what = self._desk, executing(self.view)
        try:
            desk.at(Point.BEFORE_COMMIT, what)
            applied, committed = await apply_and_relock(desk.store, self.connection, silent, self.view.inbox)
            desk.written(transition)
            desk.at(Point.AFTER_COMMIT, what)
        except BaseException:
            await self._give_back()
            raise
        if committed.locked is None:
            await self._give_back()
            await desk.enqueue(transition)
            return None
        self._over = True  # the connection goes on in the next hold
        journal = {k: v for k, v in self.view.journal.items() if k not in transition.forget}
        journal |= {entry.step_id: entry for entry in applied.entries}
        return Hold(desk, self.connection, committed.locked, journal)

    async def release(self) -> Hold | None:
        """There is nothing to do: messages that were planned with are marked as seen. Nothing is held afterwards."""
        try:
            fresh = [message.seq for message in self.view.inbox if message.fresh]
            await mark_seen(self._desk.store, self.connection, self.view.run.id, fresh)
            await let_go(self._desk.store, self.connection)
        finally:
            await self._give_back()
        return None

    async def drop(self) -> None:
        """Let go without having looked: whatever is new in the inbox stays new."""
        try:
            await let_go(self._desk.store, self.connection)
        finally:
            await self._give_back()

    async def discard(self) -> None:
        """The transaction is not ours any more, or must not go on: the connection is closed. Nothing, if it is over."""
        if not self._over:
            await self.connection.close()
            await self._give_back()

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

    async def _give_back(self) -> None:
        self._over = True
        with suppress(psycopg.Error):
            if self.connection.info.transaction_status is not TransactionStatus.IDLE:
                await abandon(self.connection)
            if self.lent and not self.connection.closed:
                await self.connection.execute(RESET)
        await self._desk.pool.putconn(self.connection)


async def take(desk: Desk, run_id: uuid.UUID, *, mode: Mode = "wait", claim: Claim | None = None) -> Hold | None:
    """Lock a run and load it. None if there is no such run, it was skipped, or `claim` no longer holds it.

    Raises RowBusy if somebody else has held the row for a second.
    """
    connection = await desk.pool.getconn()
    try:
        locked = await begin_and_lock(desk.store, connection, run_id, mode)
        if locked is not None and claim is not None and locked.run.claim != claim:
            await let_go(desk.store, connection)
            locked = None
        if locked is not None:
            journal = await load_journal(desk.store, connection, run_id) if _has_journal(locked.run) else {}
            return Hold(desk, connection, locked, journal)
    except BaseException:
        if connection.info.transaction_status is not TransactionStatus.IDLE:
            await abandon(connection)
        await desk.pool.putconn(connection)
        raise
    await desk.pool.putconn(connection)
    return None


def executing(view: View) -> str:
    """What the run is at, for the crash suite: the kind of its node, or ``undo``."""
    run, workflow = view.run, view.workflow
    if run.status == "compensating":
        return "undo"
    if workflow is None or run.current_step >= len(workflow.nodes):
        return "-"
    return workflow.nodes[run.current_step].kind


def _has_journal(run: Run) -> bool:
    return run.revision > 0
