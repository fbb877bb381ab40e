"""What locks and writes runs: the database, the definitions, the clock. Enough for a process that only asks things of
runs; `engine.py` adds what executes them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import psycopg
from psycopg_pool import PoolTimeout

from durable.core.journal import Journal
from durable.core.state import Run
from durable.core.transition import Limits, Next, Transition
from durable.define.registry import Registry
from durable.engine.bodies import Bodies
from durable.engine.guard import Guard
from durable.engine.hooks import Hooks
from durable.engine.points import Hook, Point, nothing
from durable.store import jobs, nudges
from durable.store.db import Pool, Store
from durable.store.errors import JournalConflict, RowBusy, StaleRevision

log = logging.getLogger(__name__)


def task(kind: Next) -> str:
    """The queue's name for a continuation."""
    return f"durable.{kind.value}"


class Desk:
    """Where runs are locked and transitions written, by one process, over one pool. Opened and closed by its maker."""

    DATABASE_ERRORS: ClassVar[tuple[type[Exception], ...]] = (
        psycopg.Error,
        PoolTimeout,
        RowBusy,
        StaleRevision,
        JournalConflict,
    )
    """What never fails a run: the transaction is run again, or recovery puts the run back."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        pool: Pool,
        *,
        hooks: Hooks | None = None,
        max_crashes: int = 5,
        at: Hook = nothing,
    ) -> None:
        self.store, self.registry, self.pool, self.at = store, registry, pool, at
        self.hooks = hooks if hooks is not None else Hooks()
        self.guard = Guard()
        self.fetch: Callable[[], None] = lambda: None  # says to who fetches jobs here that there is one
        self.ended: Callable[[Run, Callable[[], Journal]], None] = lambda run, journal: None  # to who waits for that
        self.bodies = Bodies(0)
        self._max_crashes = max_crashes
        self._clock: tuple[datetime, float] = (datetime.now(UTC), time.monotonic())

    def limits(self) -> Limits:
        chance = random.random()  # noqa: S311 - jitter
        return Limits(self._max_crashes, chance, self.watching)

    @property
    def watching(self) -> bool:
        """Whether a step runs here that was running in crashes."""
        return False

    def now(self) -> datetime:
        """The database's time, by the last answer and what has passed since."""
        read, at = self._clock
        return read + timedelta(seconds=time.monotonic() - at)

    def heard(self, now: datetime) -> None:
        """The database has just told its time."""
        self._clock = (now, time.monotonic())

    @property
    def fetches(self) -> bool:
        """Whether this process looks for jobs, and so needs not to be told of its own."""
        return False

    def written(self, transition: Transition) -> None:
        """A transition was committed. An engine has something to do then."""

    def left(self, run: Run, planned: datetime | None = None) -> None:
        """A run was locked and let go of as it was. An engine looks whether it is due."""

    async def enqueue(self, transition: Transition) -> None:
        """The continuation that `transition` should have had; its run could not be locked again after it."""
        if transition.next is not None:
            async with self.pool.connection() as connection:
                run = transition.after
                await nudges.enqueue_again(self.store, connection, run.id, run.revision, task(transition.next))

    async def enqueue_later(self, run_id: uuid.UUID, revision: int, kind: Next) -> None:
        """The row is busy: look again in a second."""
        self.at(Point.BEFORE_RERING, None)
        async with self.pool.connection() as connection:
            await nudges.enqueue_again(self.store, connection, run_id, revision, task(kind), nudges.LATER)

    async def ring_later(self, run_id: uuid.UUID) -> None:
        """The row is busy: one more ring in a second, for all doorbells that found it so."""
        self.at(Point.BEFORE_RERING, None)
        async with self.pool.connection() as connection:
            await jobs.ring_later(self.store, connection, run_id, nudges.LATER)

    async def tell_owner(self, run_id: uuid.UUID) -> None:
        """Announce to the worker that has the claim, wherever it is, that the run's row or inbox has news."""
        async with self.pool.connection() as connection:
            await nudges.tell_owner(self.store, connection, run_id)

    async def tries(self, limit: int | None = None) -> AsyncIterator[int]:
        """Attempts at the database, with a growing pause between them."""
        tried = 0
        while limit is None or tried < limit:
            if tried:
                await asyncio.sleep(min(0.05 * 2 ** min(tried, 6), 2.0) * random.uniform(0.5, 1.0))  # noqa: S311
            yield tried
            tried += 1

    @contextmanager
    def database_errors_only(self) -> Iterator[None]:
        """What the database refuses or loses is logged and tried again; everything else passes."""
        try:
            yield
        except self.DATABASE_ERRORS as error:
            log.warning("the database did not take it, trying again: %s: %s", type(error).__name__, error)
