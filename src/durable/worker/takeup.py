"""What this process starts, or signals, and takes up itself: without the trip through the queue.

The statement that inserts the job names this worker, as if it had fetched it; and the flush that commits that goes on
to lock the run. So the handler begins one trip after the call, and crashes are what they are for every job.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from psycopg.errors import ForeignKeyViolation

from durable.engine.hold import Hold, write_and_take
from durable.engine.points import Point
from durable.engine.slots import Slot
from durable.store.errors import RowBusy
from durable.store.operations import Query, Sent, Started
from durable.worker.serving import LastingWorker

if TYPE_CHECKING:
    from durable.engine.engine import Engine
    from durable.worker.session import Session

Beginning = TypeVar("Beginning", Started, Sent)


class TakeUp:
    """A worker that begins with what its own process puts into the queue, while it has nothing else to do."""

    def __init__(self, session: Session, serving: LastingWorker, queue: str) -> None:
        self._engine, self._endings, self._serving, self._queue = session.engine, session.endings, serving, queue
        self._alive = session.liveness.alive

    async def begin(self, query: Callable[..., Query[Beginning]], task: str, run_id: uuid.UUID) -> Beginning | None:
        """Execute `query`, which inserts a job of `task` for the run, and begin with that.

        None, and nothing was written: it has to go through the queue. There is no free slot, or others may wait for
        one; or nobody knows that this worker is alive, or the queue has forgotten it; or something is locked for longer
        than an engine waits.
        """
        if not self._alive.is_set() or (seat := self._serving.seat()) is None:
            return None
        with seat, suppress(ForeignKeyViolation, RowBusy):
            asked = query(worker=seat.worker, queue=self._queue)
            if (slot := self._engine.slots.at_once(run_id)) is not None:
                answer = await self._write_and_take(asked, slot)
                if (begun := answer.begun) is not None:
                    self._endings.hold(begun.run)
                    given = {"run_id": str(begun.run), **begun.given}
                    seat.take(begun.id, self._queue, task, given, taken=slot if slot.hold is not None else None)
                return answer
        return None

    async def _write_and_take(self, query: Query[Beginning], slot: Slot) -> Beginning:
        """The answer. If there is a job for the run and nobody else holds it, the slot has it now; else that is given
        back."""
        engine = self._engine
        engine.at(Point.BEFORE_LOCK, None)
        try:
            rows, hold = await write_and_take(engine, query.statement, query.params, slot.run_id)
            answer = query.read(rows.rows)
            if hold is not None and answer.begun is not None and answer.begun.run == slot.run_id:
                slot.hold = hold
            elif hold is not None:
                await _drop(engine, hold)
            return answer
        finally:
            if slot.hold is None:
                slot.give_back()


async def _drop(engine: Engine, hold: Hold) -> None:
    """There is nothing to do for the run that was locked; it has its lock till the connection is lost, at worst."""
    with suppress(*engine.DATABASE_ERRORS):
        await hold.drop()
