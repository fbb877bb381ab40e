"""The loops that every worker runs beside its jobs: timers, recovery, the inbox of what it executes, hooks.

They are essentials, not plugins: errors are logged, and the loop goes on.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from datetime import datetime
from typing import Final

from durable.core.transition import Next
from durable.engine import recover
from durable.engine.advance import continue_run
from durable.engine.engine import ALARM_HORIZON, Engine
from durable.engine.liveness import Liveness
from durable.store import sweep as queries

log = logging.getLogger(__name__)

TICK: Final = 1.0
HOUSEKEEPING: Final = 60.0


class Loops:
    """The loops of one worker."""

    def __init__(
        self, engine: Engine, liveness: Liveness, jobs: Callable[[], tuple[int | None, Collection[int]]]
    ) -> None:
        self._engine, self._liveness, self._jobs = engine, liveness, jobs
        self._strays: list[int] = []
        self._after: uuid.UUID | None = None
        self._alarms: list[datetime] = []
        self._taken_up: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loops = {
            "timers": self._timers(),
            "recovery": self._recovery(),
            "inbox": self._inbox(),
            "hooks": self._hooks(),
            "tidy": self._tidy(),
        }
        self._tasks = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._taken_up.values(), return_exceptions=True)
        await self._survive("hooks", self._engine.deliverer.finish)

    async def _timers(self) -> None:
        """What is due is put back: at the time of each alarm that this process set itself, and once a second."""
        while True:
            await self._until_alarm_or_tick()
            await self._survive("timers", lambda: recover.put_back_due(self._engine))
            await self._survive("timers", self._set_next_alarm)

    async def _set_next_alarm(self) -> None:
        """The next timer, whoever parked its run: if it falls due before the next tick but one, it gets an alarm."""
        engine = self._engine
        async with engine.pool.connection() as connection:
            soonest = await queries.next_wake(engine.store, connection)
        if soonest is not None and soonest - engine.now() < ALARM_HORIZON and soonest not in self._alarms:
            heapq.heappush(self._alarms, soonest)

    async def _until_alarm_or_tick(self) -> None:
        engine, clock = self._engine, asyncio.get_running_loop().time
        tick = clock() + _jittered(TICK)
        while True:
            rest = tick - clock()
            if self._alarms:
                rest = min(rest, (self._alarms[0] - engine.now()).total_seconds())
            if rest <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    heapq.heappush(self._alarms, await engine.alarms.get())
        while self._alarms and self._alarms[0] <= engine.now():
            heapq.heappop(self._alarms)

    async def _recovery(self) -> None:
        while True:
            await asyncio.sleep(_jittered(TICK))
            if self._liveness.may_judge:
                await self._survive("recovery", lambda: recover.take_over_from_dead(self._engine))
                await self._survive("recovery", self._own_strays)
            await self._survive("recovery", lambda: recover.ring_unread(self._engine))
            await self._survive("recovery", self._walk)

    async def _walk(self) -> None:
        await self._take_up_known()
        if self._liveness.may_judge:
            _, self._after = await recover.adopt_orphans(self._engine, self._after)

    async def _take_up_known(self) -> None:
        """Runs that were parked because no worker knew their definition, and that this one knows: taken up directly,
        for a job in the queue might be fetched by one that does not know it."""
        engine, known = self._engine, list(self._engine.registry.known())
        async with engine.pool.connection() as connection:
            parked = await queries.waiting_for_definition(engine.store, connection, known, engine.options.concurrency)
        for run in parked:
            if run.id not in self._taken_up:
                self._taken_up[run.id] = asyncio.create_task(self._take_up(run))

    async def _take_up(self, run: queries.Due) -> None:
        kind = Next.of(run.status)
        try:
            await self._survive("taking up", lambda: continue_run(self._engine, run.id, run.revision, kind))
        finally:
            del self._taken_up[run.id]

    async def _own_strays(self) -> None:
        """What stands in this worker's name and it does not execute: jobs whose end the queue did not take, claims
        whose owner fell over an error of the engine's own."""
        engine = self._engine
        async with engine.pool.connection() as connection:
            claimed = await queries.claims_of(engine.store, connection, [engine.worker])
            queue_worker, running = self._jobs()
            if queue_worker is not None:
                db, seen = engine.store, self._strays
                _, self._strays = await queries.own_stray_jobs(db, connection, queue_worker, running, seen)
        strays = [run_id for run_id in claimed if run_id not in engine.flying()]
        for run_id in strays:
            await asyncio.sleep(0)
            if run_id not in engine.flying():
                await recover.take_over_claim(engine, run_id, [engine.worker])

    async def _inbox(self) -> None:
        """What was sent to the runs that this worker executes, in case its announcement got lost."""
        engine = self._engine
        while True:
            await asyncio.sleep(_jittered(TICK))
            if flying := engine.flying():
                await self._survive("inbox", lambda flying=flying: self._read(flying))  # type: ignore[misc]

    async def _read(self, flying: list[uuid.UUID]) -> None:
        async with self._engine.pool.connection() as connection:
            unread = await queries.unread_of(self._engine.store, connection, flying)
        for run_id in unread:
            self._engine.look(run_id)

    async def _hooks(self) -> None:
        """Hooks are told: at once of what this process wrote, and once a second of whatever else is due."""
        deliverer = self._engine.deliverer
        while True:
            await deliverer.woken(_jittered(TICK))
            await self._survive("hooks", deliverer.sweep)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_jittered(HOUSEKEEPING))
            await self._survive("tidying up", self._drop_stale)

    async def _drop_stale(self) -> None:
        async with self._engine.pool.connection() as connection:
            await queries.drop_stale_waiters(self._engine.store, connection)
            await queries.drop_stale_progress(self._engine.store, connection)

    async def _survive(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except self._engine.DATABASE_ERRORS as error:
            log.warning("%s: the database did not answer: %s: %s", what, type(error).__name__, error)
        except Exception:
            log.exception("%s failed", what)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.1)  # noqa: S311 - so that workers do not sweep in step
