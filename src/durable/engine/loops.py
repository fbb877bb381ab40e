"""What every worker does beside its jobs: timers, recovery, the inbox of what it executes, hooks.

About once a second one statement asks whether there is anything to do, and only what has something to do asks further:
an idle worker costs the database that one statement a second, however many runs are parked. Errors are logged, and the
next look finds the same again.
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
from durable.store.sweep import Seen, Watcher

log = logging.getLogger(__name__)

TICK: Final = 1.0
HOUSEKEEPING: Final = 60.0


class Loops:
    """The loops of one worker. `jobs` says under which id the queue knows it, and which jobs it has in hand."""

    def __init__(
        self, engine: Engine, liveness: Liveness, jobs: Callable[[], tuple[int | None, Collection[int]]]
    ) -> None:
        self._engine, self._liveness, self._jobs = engine, liveness, jobs
        self._strays: set[int] = set()
        self._after: uuid.UUID | None = None
        self._alarms: list[datetime] = []
        self._taken_up: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._recovering: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loops = {"watch": self._watch(), "timers": self._timers(), "hooks": self._hooks(), "tidy": self._tidy()}
        self._tasks = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]

    async def stop(self) -> None:
        tasks = [*self._tasks, *([self._recovering] if self._recovering is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._taken_up.values(), return_exceptions=True)
        await self._survive("hooks", self._engine.deliverer.finish)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_jittered(TICK))
            await self._survive("looking for work", self.tick)

    async def tick(self) -> None:
        """One look. What it finds is taken up beside the next looks, and is not waited for."""
        seen = await self._look()
        self._engine.heard(seen.now)
        if seen.waiting:
            self._engine.fetch()
        for run_id in seen.news:  # in case the announcement got lost
            self._engine.look(run_id)
        if seen.deliveries or self._engine.deliverer.busy:
            self._engine.deliverer.wake()
        self._set_alarms(seen)
        if self._recovering is None or self._recovering.done():
            self._recovering = asyncio.create_task(self._recover(seen), name="recovery")

    async def _look(self) -> Seen:
        engine = self._engine
        queue_worker, jobs = self._jobs()
        watcher = Watcher(
            engine.worker,
            self._liveness.queue,
            queue_worker,
            engine.flying(),
            jobs,
            engine.registry.known(),
            engine.hooks.kinds,
        )
        async with engine.pool.connection() as connection:
            return await queries.look(engine.store, connection, watcher, self._after, recover.PAGE)

    async def _recover(self, seen: Seen) -> None:
        """Take up what others left behind, and what stands in this worker's name without its knowledge: one thing after
        the other, for each takes connections that the steps want, too."""
        engine, liveness = self._engine, self._liveness
        if liveness.may_judge:
            if seen.crashed:
                await self._survive("takeover", lambda: recover.take_over_from_dead(engine))
            if seen.stray_claims:
                await self._survive("stray claims", self._end_stray_claims)
            await self._survive("stray jobs", lambda: self._end_stray_jobs(seen.stray_jobs))
        if seen.unread:
            await self._survive("messages", lambda: recover.ring_unread(engine))
        if seen.known:
            await self._survive("definitions", self._take_up_known)
        if liveness.may_judge:
            await self._survive("lost jobs", lambda: self._walk(seen))

    def _set_alarms(self, seen: Seen) -> None:
        """The next timer, whoever parked its run: if it falls due before the next look but one, it gets an alarm. What
        is due rings at once."""
        alarms = self._engine.alarms
        if seen.due:
            alarms.put_nowait(self._engine.now())
        if seen.next_wake is not None:
            self._set_alarm(seen.next_wake)

    def _set_alarm(self, at: datetime) -> None:
        if at - self._engine.now() < ALARM_HORIZON and at not in self._alarms:
            self._engine.alarms.put_nowait(at)

    async def _timers(self) -> None:
        """What is due is put back: at the time of each alarm that this process set itself, and when a look finds it."""
        while True:
            await self._until_alarm()
            await self._survive("timers", self._ring)

    async def _ring(self) -> None:
        """Put back what is due, and set the alarm for what follows: also for what fell due while that was done."""
        engine = self._engine
        began = engine.now()
        await recover.put_back_due(engine)
        async with engine.pool.connection() as connection:
            soonest = await queries.next_wake(engine.store, connection, began)
        if soonest is not None:
            self._set_alarm(soonest)

    async def _until_alarm(self) -> None:
        engine = self._engine
        while not self._alarms or self._alarms[0] > engine.now():
            rest = (self._alarms[0] - engine.now()).total_seconds() if self._alarms else None
            with suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    heapq.heappush(self._alarms, await engine.alarms.get())
        while not engine.alarms.empty():
            heapq.heappush(self._alarms, engine.alarms.get_nowait())
        while self._alarms and self._alarms[0] <= engine.now():
            heapq.heappop(self._alarms)

    async def _walk(self, seen: Seen) -> None:
        """On to the next page of runnable runs; if some of this one seem to have no job, they are looked at closely."""
        if seen.alone:
            _, self._after = await recover.adopt_orphans(self._engine, self._after)
        else:
            self._after = seen.last

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

    async def _end_stray_claims(self) -> None:
        """Their owner fell over an error of the engine's own."""
        engine = self._engine
        async with engine.pool.connection() as connection:
            claimed = await queries.claims_of(engine.store, connection, [engine.worker])
        strays = [run_id for run_id in claimed if run_id not in engine.flying()]
        for run_id in strays:
            await asyncio.sleep(0)
            if run_id not in engine.flying():
                await recover.take_over_claim(engine, run_id, [engine.worker])

    async def _end_stray_jobs(self, strays: Collection[int]) -> None:
        """The queue did not take their end. One that is fetched this moment looks so, too, but at one look only."""
        engine, (queue_worker, running) = self._engine, self._jobs()
        twice, self._strays = self._strays.intersection(strays), set(strays)
        if twice and queue_worker is not None:
            async with engine.pool.connection() as connection:
                await queries.own_stray_jobs(engine.store, connection, queue_worker, running, twice)

    async def _hooks(self) -> None:
        """Hooks are told: at once of what this process wrote, and when a look finds something due."""
        deliverer = self._engine.deliverer
        while True:
            await deliverer.woken()
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
