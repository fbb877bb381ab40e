"""Run workflows in a test, in this process, on real PostgreSQL, with the engine's own code.

    with Harness(app) as t:
        run = app.start(order, Order(...))
        t.drain()                       # everything that can run now
        t.skip(days=3)                  # the approval times out
        t.drain()
        assert run.status().status == "failed"

Nothing sleeps: a drain returns when every run is finished or parked, and `skip` moves the engine's clock.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from durable.core.state import View
from durable.engine import recover
from durable.engine.points import Hook, Point, nothing
from durable.portal import Portal
from durable.store import sweep as queries
from durable.testing.crashes import WHEN, Crash, When
from durable.testing.histories import History
from durable.worker.jobs import LastingJobManager
from durable.worker.session import Session, open_session

if TYPE_CHECKING:
    from durable.durable import AsyncDurable, Durable, Handle

PATIENCE: Final = 30.0
"""Seconds after which a drain that comes to no end says so."""


class SimulatedCrash(BaseException):
    """Raised inside the engine where `drain(max_steps=)` or `crash_at` stops it: nothing after it is committed."""


class AsyncHarness:
    """Drives the runs of an :class:`AsyncDurable`. One at a time on one database."""

    def __init__(self, app: AsyncDurable, *, at: Hook = nothing) -> None:
        self._app, self._at = app, at
        self._handlers_app: object = app
        self._stack = AsyncExitStack()
        self._session: Session | None = None
        self._limit: int | None = None
        self._crashes: list[Crash] = []
        self._crashed = False

    async def __aenter__(self) -> Self:
        await self._app.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()
        if error is None and self._crashes:
            missed = ", ".join(map(str, self._crashes))
            raise AssertionError(f"the worker did not come to where it was to die: {missed}")

    async def drain(self, *, max_steps: int | None = None) -> int:
        """Run everything that can run now; return when every run is finished or parked.

        With `max_steps`: stop after so many journaled steps, as a crash there would. Returns how many were journaled.
        Raises TimeoutError if it comes to no end within 30 seconds.
        """
        session = await self._open()
        before = session.engine.journaled
        self._limit = before + max_steps if max_steps is not None else None
        try:
            async with asyncio.timeout(PATIENCE):
                await self._drain(session)
        except SimulatedCrash:
            await self._crash()
        return session.engine.journaled - before

    def crash_at(self, step: str, *, when: When = "before_commit") -> None:
        """The worker dies the next time that it comes to `step`, as by a ``kill -9``; once. That ends the `drain` in
        which it happens, and the next one is another worker, which takes over.

        `step` is its id as `status` shows it: ``"charge#2"``, ``"build/api"``, ``"poll[3]/ask"``, ``"undo:charge"``.

        - ``before_handler``: the handler has not begun.
        - ``after_handler``, ``before_commit``: it has ended, and nothing of that is recorded: it will run again.
        - ``after_commit``: how it ended is recorded, but nobody goes on yet.

        Raises AssertionError at the end of the harness if it never came to that.
        """
        if when not in WHEN:
            raise ValueError(f"when={when!r}: one of {', '.join(WHEN)}")
        self._crashes.append(Crash(step, WHEN[when]))

    async def history(self, run: Handle) -> History:
        """What happened to a run, for asserts. Raises RunNotFound."""
        return History(await self._app.history(run))

    async def skip(self, by: timedelta | None = None, **units: float) -> None:
        """Move the engine's clock ahead: ``skip(timedelta(days=3))`` or ``skip(days=3)``."""
        session = await self._open()
        async with session.engine.pool.connection() as connection:
            await queries.move_clock(self._app.store, connection, by if by is not None else timedelta(**units))

    async def _drain(self, session: Session) -> None:
        engine, queue = session.engine, self._app.queue
        manager = session.queue.job_manager
        assert isinstance(manager, LastingJobManager)
        assert manager.worker is not None
        while True:
            await recover.take_over_from_dead(engine)
            await recover.put_back_due(engine)
            await recover.put_back_known(engine, engine.registry.known())
            while (job := await manager.fetch_job([queue], manager.worker)) is not None:
                await self._perform(session, job)
            await engine.deliverer.deliver_due()  # first: hooks may leave something to do
            async with engine.pool.connection() as connection:
                if await queries.idle(engine.store, connection, queue):
                    return
            await asyncio.sleep(0.005)

    async def _perform(self, session: Session, job: Any) -> None:
        await session.queue.tasks[job.task_name](**job.task_kwargs)
        manager = session.queue.job_manager
        assert isinstance(manager, LastingJobManager)
        await manager.done(job)

    def _stop_here(self, point: Point, view: View | None) -> None:
        self._at(point, view)
        if self._crashed or self._limit_reached(point) or self._to_die_at(point):
            self._crashed = True
            raise SimulatedCrash

    def _to_die_at(self, point: Point) -> bool:
        written = self._session.engine.latest if self._session is not None else None
        for crash in self._crashes:
            if crash.strikes(point, written):
                self._crashes.remove(crash)
                return True
        return False

    def _limit_reached(self, point: Point) -> bool:
        if self._limit is None or self._session is None or point is not Point.AFTER_COMMIT:
            return False
        return self._session.engine.journaled >= self._limit

    async def _open(self) -> Session:
        if self._session is None:
            options = replace(self._app.options, concurrency=1, nap_seconds=0.0)
            session = open_session(self._app, options, handlers_app=self._handlers_app, at=self._stop_here)
            self._session = await self._stack.enter_async_context(session)
            await self._session.queue.job_manager.register_worker()
        return self._session

    async def _crash(self) -> None:
        """This worker is gone, as after a `kill -9`: the next drain is another one, and takes over from it."""
        session, self._session = self._session, None
        assert session is not None
        await session.liveness.vanish()
        await self._close()
        self._crashed = False

    async def _close(self) -> None:
        self._session = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()


class Harness:
    """Drives the runs of a :class:`Durable`: :class:`AsyncHarness` for sync tests, on an event loop of its own."""

    def __init__(self, app: Durable, *, at: Hook = nothing) -> None:
        self._app = app
        self._portal = Portal("durable harness")
        self._harness = AsyncHarness(app.async_app, at=at)
        self._harness._handlers_app = app

    def __enter__(self) -> Self:
        self._portal.call(self._harness.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._portal.call(self._harness.__aexit__, kind, error, trace)
        finally:
            self._portal.close(self._app.async_app.close)

    def drain(self, *, max_steps: int | None = None) -> int:
        """Run everything that can run now; return when every run is finished or parked.

        With `max_steps`: stop after so many journaled steps, as a crash there would. Returns how many were journaled.
        Raises TimeoutError if it comes to no end within 30 seconds.
        """
        return self._portal.call(self._harness.drain, max_steps=max_steps)

    def skip(self, by: timedelta | None = None, **units: float) -> None:
        """Move the engine's clock ahead: ``skip(timedelta(days=3))`` or ``skip(days=3)``."""
        self._portal.call(self._harness.skip, by, **units)

    def crash_at(self, step: str, *, when: When = "before_commit") -> None:
        """The worker dies the next time that it comes to `step`: see :meth:`AsyncHarness.crash_at`."""
        self._harness.crash_at(step, when=when)

    def history(self, run: Handle) -> History:
        """What happened to a run, for asserts. Raises RunNotFound."""
        return self._portal.call(self._harness.history, run)
