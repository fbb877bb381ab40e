"""A locked run: an open transaction on one connection, and what was read under the lock.

A hold is made by :func:`take`, and ends by writing a transition or by letting go. One transaction locks one run.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from durable.core.state import Claim, Entry, View
from durable.core.transition import Transition
from durable.engine.points import Point
from durable.store.apply import apply as apply_transition
from durable.store.apply import apply_and_relock
from durable.store.db import Connection
from durable.store.inbox import load_inbox, mark_seen
from durable.store.journal import load_journal
from durable.store.runs import Locked, Mode, abandon, begin_and_lock

if TYPE_CHECKING:
    from durable.engine.desk import Desk


class Hold:
    """The hold on one run. After `write`, `write_and_lock` or `release` it is over, and its connection is given back."""

    def __init__(self, desk: Desk, connection: Connection, locked: Locked, journal: Mapping[str, Entry]) -> None:
        self._desk = desk
        self.connection = connection
        self._read_at, self._started = locked.now, time.monotonic()
        desk.heard(locked.now)
        run = locked.run
        workflow = desk.registry.find(run.workflow, run.version)
        self.view = View(run, workflow, desk.registry, journal, locked.inbox)

    @property
    def now(self) -> datetime:
        """The database's time, as it has moved on since the lock."""
        return self._read_at + timedelta(seconds=time.monotonic() - self._started)

    async def read_inbox(self) -> None:
        """Look again: a message may have been committed while user code ran under this lock."""
        inbox = await load_inbox(self._desk.store, self.connection, self.view.run.id)
        self.view = replace(self.view, inbox=inbox)

    async def write(self, transition: Transition) -> Hold | None:
        """Write and commit. Nothing is held afterwards, whatever comes of it."""
        desk, what = self._desk, self._what()
        try:
            await apply_transition(desk.store, self.connection, transition, self.view.inbox)
            desk.at(Point.BEFORE_COMMIT, what)
            await self.connection.execute("COMMIT")
        finally:
            await self._give_back()
        desk.written(transition)
        desk.at(Point.AFTER_COMMIT, what)
        return None

    async def write_and_lock(self, transition: Transition) -> Hold | None:
        """Write, commit, and lock again for the next step, in one flush. None: somebody else has the run now.

        What is written enqueues no continuation; where the lock could not be had again, that is made up for here.
        """
        desk, what = self._desk, self._what()
        silent = replace(transition, next=None)
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
        journal = {k: v for k, v in self.view.journal.items() if k not in transition.forget}
        journal |= {entry.step_id: entry for entry in applied.entries}
        return Hold(desk, self.connection, committed.locked, journal)

    async def release(self) -> Hold | None:
        """Let go without a transition; messages that were looked at are marked as seen. Nothing is held afterwards."""
        try:
            fresh = [message.seq for message in self.view.inbox if message.fresh]
            if fresh and not self._lost:
                await mark_seen(self._desk.store, self.connection, self.view.run.id, fresh)
                await self.connection.execute("COMMIT")
        finally:
            await self._give_back()
        return None

    async def drop(self) -> None:
        """Roll back, leave no trace."""
        await self._give_back()

    @property
    def _lost(self) -> bool:
        return self.connection.closed or self.connection.broken

    def _what(self) -> str:
        return executing(self.view)

    async def _give_back(self) -> None:
        await abandon(self.connection)
        await self._desk.pool.putconn(self.connection)


async def take(desk: Desk, run_id: uuid.UUID, *, mode: Mode = "wait", claim: Claim | None = None) -> Hold | None:
    """Lock a run and load it. None if there is no such run, it was skipped, or `claim` no longer holds it.

    Raises RowBusy if somebody else has held the row for a second.
    """
    connection = await desk.pool.getconn()
    try:
        locked = await begin_and_lock(desk.store, connection, run_id, mode)
        if locked is None or (claim is not None and locked.run.claim != claim):
            await abandon(connection)
            await desk.pool.putconn(connection)
            return None
        journal = await load_journal(desk.store, connection, run_id) if locked.run.revision else {}
        return Hold(desk, connection, locked, journal)
    except BaseException:
        await abandon(connection)
        await desk.pool.putconn(connection)
        raise


def executing(view: View) -> str:
    """What the run is at, for the crash suite: the kind of its node, or ``undo``."""
    run, workflow = view.run, view.workflow
    if run.status == "compensating":
        return "undo"
    if workflow is None or run.current_step >= len(workflow.nodes):
        return "-"
    return workflow.nodes[run.current_step].kind
