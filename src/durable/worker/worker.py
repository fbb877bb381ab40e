"""A worker: it fetches jobs, executes them, recovers what others left behind, and ends in order when it is told to."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from durable.core.plan import go_on
from durable.engine.engine import Engine
from durable.engine.hold import take
from durable.engine.loops import Loops
from durable.engine.points import Hook, nothing
from durable.errors import ConfigurationError
from durable.store import sweep as queries
from durable.worker.garbage import rarely_collected
from durable.worker.jobs import LastingJobManager
from durable.worker.serving import LastingWorker
from durable.worker.session import Session, open_session
from durable.worker.takeup import TakeUp
from durable.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from durable.durable import AsyncDurable

log = logging.getLogger(__name__)

GRACE: Final = 30.0
"""Seconds that executing steps have to end by themselves after `stop`."""
LAST_GRACE: Final = 10.0
"""Seconds more for handlers that were interrupted; what still runs then is given up."""


class Worker:
    """Executes the runs of one queue.

    - `concurrency`: handlers in flight at once, detached ones included.
    - `grace`: seconds that `stop` gives to steps in progress before they are interrupted and handed back.
    - `dedicated`: this process does nothing else. It ends when its event loop is stuck, and collects garbage rarely.
    - `fetch_batch`: jobs that are fetched at once, at most. Default: one for each free slot.
    """

    def __init__(
        self,
        app: AsyncDurable,
        *,
        concurrency: int = 20,
        grace: float = GRACE,
        dedicated: bool = False,
        handlers_app: object | None = None,
        burst_steps: int | None = None,
        fetch_batch: int | None = None,
        at: Hook = nothing,
    ) -> None:
        if concurrency < 1:
            raise ConfigurationError(f"concurrency is {concurrency}: a worker needs at least 1")
        if fetch_batch is not None and fetch_batch < 1:
            raise ConfigurationError(f"fetch_batch is {fetch_batch}: a worker fetches at least 1 job at a time")
        self._app, self._grace, self._dedicated, self._at = app, grace, dedicated, at
        self._handlers_app = handlers_app if handlers_app is not None else app
        self._options = replace(app.options, concurrency=concurrency)
        if burst_steps is not None:
            self._options = replace(self._options, burst_steps=burst_steps)
        self._fetch_batch = fetch_batch
        self._stop = asyncio.Event()
        self.started = asyncio.Event()
        self._queue_worker: LastingWorker | None = None
        self._engine: Engine | None = None

    def stop(self) -> None:
        """Take no new work; let what is executing end within the grace time. To be called on the worker's loop."""
        self._stop.set()
        if self._engine is not None:
            self._engine.stopping = True  # a job that is at work takes no further step
        if self._queue_worker is not None:
            self._queue_worker.end()

    def nudge(self) -> None:
        """Look into the queue at once: this process has put something there, and committed it. Without this the worker
        hears of it by a notification, a little later. To be called on the worker's loop; early or in vain it only
        costs a look."""
        if self._queue_worker is not None:
            self._queue_worker.nudge()

    async def run(self, *, until_idle: bool = False) -> None:
        """Work until `stop`; with `until_idle` until every run is finished or parked."""
        if not len(self._app.registry):
            raise ConfigurationError(
                "no workflow is registered: a worker would have nothing to do. Register them with "
                "app.register(...), workflows= or imports=, or `durable worker --import MODULE`"
            )
        dog = Watchdog(asyncio.get_running_loop()) if self._dedicated else None
        async with open_session(self._app, self._options, handlers_app=self._handlers_app, at=self._at) as session:
            loops = Loops(session.engine, session.liveness, lambda: self._jobs(session))
            loops.start()
            self._engine = session.engine
            session.engine.fetch = self.nudge
            if dog is not None:
                dog.start()
            self.started.set()
            try:
                with rarely_collected() if self._dedicated else nullcontext():
                    await (self._until_idle(session) if until_idle else self._until_stopped(session))
            finally:
                await loops.stop()
                if dog is not None:
                    dog.stop()

    async def _until_stopped(self, session: Session) -> None:
        ending = asyncio.create_task(self._end_in_order(session))
        try:
            pause = 0.1
            while not self._stop.is_set():
                began = time.monotonic()
                with_errors = await self._serve(session, wait=True)
                if self._stop.is_set():
                    break
                log.error("the queue's worker ended by itself, starting it anew", exc_info=with_errors)
                pause = 0.1 if time.monotonic() - began > 10 else min(pause * 2, 5.0)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause)
        finally:
            ending.cancel()
            with suppress(asyncio.CancelledError):
                await ending

    async def _until_idle(self, session: Session) -> None:
        engine = session.engine
        while not self._stop.is_set():
            error = await self._serve(session, wait=False)
            if error is not None:
                raise error
            told = await engine.deliverer.rests()  # asked first: hooks may leave something to do
            async with engine.pool.connection() as connection:
                if await queries.idle(engine.store, connection, self._app.queue) and told:
                    return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.02)

    async def _serve(self, session: Session, *, wait: bool) -> BaseException | None:
        """Run procrastinate's worker to its end; returns what it ended with."""
        self._queue_worker = LastingWorker(
            session.queue,
            queue=self._app.queue,
            concurrency=self._options.concurrency,
            wait=wait,
            fetch_batch=self._fetch_batch,
            spare=lambda: session.engine.slots.spare,
        )
        try:
            if not self._stop.is_set():
                take_up = TakeUp(session, self._queue_worker, self._app.queue)
                with self._app._worked_by(take_up):
                    await self._queue_worker.serve()
        except Exception as error:  # whatever it is, the worker goes on: procrastinate's loop is started anew
            return error
        return None

    async def _end_in_order(self, session: Session) -> None:
        """After `stop`: wait, then interrupt, then give up what does not end."""
        await self._stop.wait()
        engine = session.engine
        engine.stopping = True  # also of one that was opened after `stop`
        await asyncio.sleep(self._grace)
        log.info("interrupting %d steps after %.0f s of grace", engine.executing, self._grace)
        engine.interrupt_all()
        await asyncio.sleep(LAST_GRACE)
        for run_id, claimed in list(engine.owned.items()):
            log.warning("run %s: giving up a handler that does not end", run_id, extra={"run": str(run_id)})
            claimed.give_up()
            hold = await take(engine, run_id)
            if hold is not None and hold.view.run.claim is not None and hold.view.run.claim.worker == engine.worker:
                await hold.write(go_on(hold.view, hold.now))
            elif hold is not None:
                await hold.drop()

    def _jobs(self, session: Session) -> tuple[int | None, list[int]]:
        """The id under which the queue knows this worker, and the jobs that it has in hand."""
        manager = session.queue.job_manager
        assert isinstance(manager, LastingJobManager)
        return manager.worker, self._queue_worker.running if self._queue_worker is not None else []
