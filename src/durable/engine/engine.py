"""What one process needs to execute runs: a desk, user code's caller, and who flies what.

Everything that changes while it works stands here, and nothing of it is truth: the run's row is.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from durable.core.state import Claim, Run
from durable.core.transition import Purpose, Transition
from durable.define.registry import Registry
from durable.engine.bodies import Bodies
from durable.engine.calls import Caller
from durable.engine.deliverer import Deliverer
from durable.engine.desk import Desk
from durable.engine.hold import Hold, take
from durable.engine.hooks import Hooks
from durable.engine.points import Hook, nothing
from durable.engine.slots import Slots
from durable.engine.suspects import Suspects
from durable.store import nudges
from durable.store.db import Store
from durable.values import WaitingFor

if TYPE_CHECKING:
    from durable.engine.claims import Claimed
    from durable.engine.flight import ClaimLock, Flight

log = logging.getLogger(__name__)

LOCK_TIMEOUT_MS: Final = 1_000
"""How long a job waits for a run's row."""
REPORT_EVERY: Final = 0.5
"""Seconds between two looks at what executing steps say of themselves."""
ALARM_HORIZON: Final = timedelta(seconds=5)
"""Timers that fall due sooner get an alarm in this process; the timer loop finds the others in the table."""
KEPT_BODIES: Final = 500
"""How many function runs may go on, after a wait, without a replay."""
IDLE_IN_TRANSACTION_MS: Final = 60_000
"""A little above what a handler may do while it holds the row: after that its host has vanished."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine executes. Times are in seconds."""

    concurrency: int = 20
    pool_size: int = 10
    detach_after: float = 2.0
    max_crashes: int = 5
    burst_steps: int = 100
    burst_seconds: float = 0.25
    nap_seconds: float = 0.1  # sleeps and retry delays up to this stay in the worker


class Engine(Desk):
    """Executes runs in this process. To be made, used and closed on one event loop."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        options: Options,
        *,
        worker: int,
        queue: str | None = None,
        app: object | None = None,
        hooks: Hooks | None = None,
        at: Hook = nothing,
    ) -> None:
        pool = store.open_pool(
            options.pool_size,
            application_name=f"durable worker {worker}",
            lock_timeout_ms=LOCK_TIMEOUT_MS,
            idle_in_transaction_ms=IDLE_IN_TRANSACTION_MS,
            executing=True,
        )
        super().__init__(store, registry, pool, hooks=hooks, max_crashes=options.max_crashes, at=at)
        self.options, self.worker = options, worker
        self.bodies = Bodies(KEPT_BODIES)
        self.caller = Caller(max_threads=options.concurrency, app=app, check=store.payloads.check)
        self.slots = Slots(max(1, options.pool_size - 2))
        self.suspects = Suspects(options.max_crashes)
        self.deliverer = Deliverer(self, queue if queue is not None else store.schema)
        self.alarms: asyncio.Queue[datetime] = asyncio.Queue()
        self.stopping = False
        self.journaled = 0
        self.latest: Transition | None = None  # what was written last
        self.owned: dict[uuid.UUID, Claimed] = {}
        self._flights: set[Flight] = set()
        self._said: dict[tuple[uuid.UUID, str], dict[str, Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---------------------------------------------------------------- life

    async def open(self) -> None:
        await self.pool.open(wait=True, timeout=10)
        self._background(self._report(), "report progress")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.deliverer.close()
        self.bodies.close()
        self.guard.close()
        await self.caller.close()
        await self.pool.close()

    @property
    def watching(self) -> bool:
        return self.suspects.watching

    def interrupt_all(self) -> None:
        """Shut down: end what is executing; each is handed back to the queue as it ends."""
        self.stopping = True
        for flight in list(self._flights):
            flight.interrupt("shutdown")
        for claimed in self.owned.values():
            claimed.look()

    @property
    def executing(self) -> int:
        """How many handlers are in flight."""
        return len(self._flights)

    # ---------------------------------------------------------------- what the core takes as arguments

    def new_claim(self) -> Claim:
        return Claim(self.worker, uuid.uuid4())

    # ---------------------------------------------------------------- who flies what

    def takes_off(self, flight: Flight) -> None:
        """Until it has landed, its handler is found here by those who want to interrupt it."""
        self._flights.add(flight)

    def has_landed(self, flight: Flight) -> None:
        self._flights.remove(flight)

    def _flights_of(self, run_id: uuid.UUID) -> list[Flight]:
        return [flight for flight in self._flights if flight.view.run.id == run_id]

    @contextmanager
    def owning(self, run_id: uuid.UUID, claimed: Claimed) -> Iterator[None]:
        """Where the owner of a claim is found."""
        self.owned[run_id] = claimed
        try:
            yield
        finally:
            if self.owned.get(run_id) is claimed:
                del self.owned[run_id]

    def look(self, run_id: uuid.UUID) -> None:
        """Something was announced for a run: its owner reads its inbox, its handler may be ended."""
        if (claimed := self.owned.get(run_id)) is not None:
            claimed.look()
        if any(flight.hold is not None for flight in self._flights_of(run_id)):
            self._background(self._heed_cancel(run_id), f"heed {run_id}")

    def look_at_all(self) -> None:
        """This worker may have been taken for dead: each owner checks its claim."""
        for claimed in self.owned.values():
            claimed.look()

    def flying(self) -> list[uuid.UUID]:
        """The runs that this process executes."""
        return list({*(flight.view.run.id for flight in self._flights), *self.owned})

    async def _heed_cancel(self, run_id: uuid.UUID) -> None:
        """A handler that holds the row is ended if a cancel lies in the inbox; whoever settles it reads that again.

        Not a compensator: a rollback that is canceled stops after it."""
        async with self.pool.connection() as connection:
            asked = await nudges.cancel_asked(self.store, connection, run_id)
        if asked:
            for flight in self._flights_of(run_id):
                if flight.call.purpose is not Purpose.UNDO:
                    flight.interrupt("cancel")

    # ---------------------------------------------------------------- the database, outside a run's transaction

    async def take_claimed(self, lock: ClaimLock) -> Hold | None:
        """Lock the row of a run that this worker has a claim on; None once the claim is gone. Outlasts the database."""
        async for _ in self.tries():
            with self.database_errors_only():
                return await take(self, lock.run_id, claim=lock.claim)
        return None

    async def tell_owner(self, run_id: uuid.UUID) -> None:
        self.look(run_id)
        await super().tell_owner(run_id)

    # ---------------------------------------------------------------- after a commit

    @property
    def fetches(self) -> bool:
        return not self.stopping

    def written(self, transition: Transition) -> None:
        """A transition was committed."""
        self.latest = transition
        if transition.reports:
            self.deliverer.wake()
        if transition.entries:
            self.journaled += 1
        wake_at = transition.after.wake_at
        if wake_at is None or transition.next is not None or self.nap(transition) is not None:
            return
        if wake_at - self.now() < ALARM_HORIZON:
            self.alarms.put_nowait(wake_at)

    def left(self, run: Run, planned: datetime | None = None) -> None:
        """A run was locked and let go of as it was. If it is due, what puts back the due may have passed it by.
        `planned`: when it was decided that there is nothing to do; what was due by then has had its turn."""
        if run.wake_at is not None and run.wake_at <= self.now() and (planned is None or planned < run.wake_at):
            self.alarms.put_nowait(run.wake_at)

    def nap(self, transition: Transition) -> float | None:
        """Seconds until a run that was just parked goes on, if that is so soon that its worker waits for it."""
        after = transition.after
        short = after.waiting_for in (WaitingFor.SLEEP, WaitingFor.RETRY) and transition.next is None
        if not short or after.wake_at is None or self.stopping:
            return None
        seconds = (after.wake_at - self.now()).total_seconds()
        return max(seconds, 0.0) if seconds < self.options.nap_seconds else None

    def say(self, flight: Flight, what: Mapping[str, Any]) -> None:
        """A step reports on itself. What it said last is kept, at most twice a second."""
        flight.said |= what
        self._said[flight.view.run.id, flight.call.step_id] = flight.said

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY)
            if not self._said:
                continue
            said, self._said = self._said, {}
            with self.database_errors_only():
                async with self.pool.connection() as connection:
                    await nudges.report(self.store, connection, said)

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
