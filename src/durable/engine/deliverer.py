"""Tells hooks what they are to be told: from the deliveries table, after the commit, at least once.

Hooks run beside the engine, a few at a time, sync ones in threads of their own. One that raises never touches the run:
its delivery stays and is due again later, for that hook alone. While hooks run, their deliveries are renewed; those of
a process that is gone are due again when the time of visibility is over.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from durable.core.failures import brief
from durable.core.transition import ReportKind
from durable.define.options import is_async
from durable.engine.hooks import ErrorReport, Hook, StatusChange, name_of, report_of
from durable.errors import PayloadError
from durable.logs import inside
from durable.store import deliveries
from durable.store.deliveries import Delivery

if TYPE_CHECKING:
    from durable.engine.desk import Desk

log = logging.getLogger(__name__)

CONCURRENCY: Final = 10
"""Deliveries that one process has in hand at a time."""
MAX_ATTEMPTS: Final = 20
"""How often a delivery is tried before it is given up: for about an hour."""
MAX_BACKOFF: Final = 300.0
"""Seconds at most between two attempts."""
GRACE: Final = 5.0
"""Seconds for what is due, and for hooks that still run, when the process ends in order."""


class Deliverer:
    """Calls the hooks of one process with the deliveries of one queue."""

    def __init__(self, desk: Desk, queue: str) -> None:
        self._desk, self._queue = desk, queue
        self._table = asyncio.Lock()  # a sweep must know how much room there is, and renew nothing that is settled
        self._sweeps: set[asyncio.Task[int]] = set()
        self._wake = asyncio.Event()
        self._flying: dict[tuple[uuid.UUID, int], asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="durable-hook")

    def wake(self) -> None:
        """There is something to deliver, or room to deliver more."""
        self._wake.set()

    async def woken(self) -> None:
        """Return at the next `wake`."""
        await self._wake.wait()
        self._wake.clear()

    @property
    def busy(self) -> bool:
        """Whether deliveries are in hand: they are renewed by each sweep."""
        return bool(self._flying)

    async def sweep(self) -> int:
        """Take up what is due, as far as there is room, without waiting for it; returns how many that are, with those
        that were in hand already. 0: there is nothing to do.

        It is done even if who asked is cancelled: nobody else would look for what was taken and is not in flight.
        """
        kinds = self._desk.hooks.kinds
        if not kinds:
            return 0
        sweep = asyncio.create_task(self._take_up(kinds), name="sweep of hooks")
        self._sweeps.add(sweep)
        sweep.add_done_callback(self._sweeps.discard)
        return await asyncio.shield(sweep)

    async def _take_up(self, kinds: Collection[ReportKind]) -> int:
        async with self._table:
            held = len(self._flying)
            taken = await self._take(kinds, CONCURRENCY - held)
            for delivery in taken:
                name = f"hooks {delivery.run_id}:{delivery.seq}"
                self._flying[delivery.run_id, delivery.seq] = asyncio.create_task(self._deliver(delivery), name=name)
            return held + len(taken)

    async def _take(self, kinds: Collection[ReportKind], room: int) -> list[Delivery]:
        store = self._desk.store
        async with self._desk.pool.connection() as connection:
            if self._flying:
                await deliveries.renew(store, connection, list(self._flying))
            return await deliveries.take(store, connection, self._queue, kinds, room) if room > 0 else []

    async def rests(self) -> bool:
        """Whether nothing is due and no hook runs; what is due is taken up."""
        return await self.sweep() == 0

    async def deliver_due(self) -> None:
        """Deliver until nothing is due and no hook runs."""
        while not await self.rests():
            if self._flying:
                await asyncio.wait(self._flying.values(), return_when=asyncio.FIRST_COMPLETED)

    async def finish(self) -> None:
        """Before the process ends in order: deliver what is due, for a moment at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await self.deliver_due()

    async def close(self) -> None:
        """Interrupt the hooks that still run: what they were told is delivered again, by whoever comes. A thread can't
        be interrupted, and is not waited for."""
        late = [*self._sweeps, *self._flying.values()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            with inside(run=str(delivery.run_id)):
                refused = await self._tell(delivery) if delivery.attempts <= MAX_ATTEMPTS else {"": "it never ended"}
                await self._settle(delivery, refused)
        except self._desk.DATABASE_ERRORS as error:  # due again when its visibility is over
            log.warning("hooks: the database did not take it: %s: %s", type(error).__name__, error)
        except Exception:
            log.exception("delivery %s:%s failed", delivery.run_id, delivery.seq)
        finally:
            del self._flying[delivery.run_id, delivery.seq]
            self.wake()

    async def _tell(self, delivery: Delivery) -> dict[str, str]:
        """Call the hooks that have not taken it yet, one after the other; returns the errors of those that raised."""
        payloads = self._desk.store.payloads
        try:
            report = report_of(delivery, payloads.decode(delivery.body))
            before: dict[str, str] | None = payloads.load(delivery.refused)
        except PayloadError as error:
            return {name_of(hook): str(error) for hook in self._desk.hooks.of(delivery.kind)}
        refused = {}
        for hook in self._desk.hooks.of(delivery.kind, before):
            if (raised := await self._raised(hook, report)) is not None:
                log.warning("hook %s raised, told of %s", name_of(hook), report.id, exc_info=raised)
                refused[name_of(hook)] = "{type}: {message}".format_map(brief(raised))
        return refused

    async def _raised(self, hook: Hook, report: StatusChange | ErrorReport) -> BaseException | None:
        try:
            await self._call(hook, report)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # the process ends
            return error
        return None

    async def _call(self, hook: Hook, report: StatusChange | ErrorReport) -> None:
        answer: Any
        if is_async(hook):
            answer = hook(report)
        else:
            context = contextvars.copy_context()
            answer = await asyncio.get_running_loop().run_in_executor(self._threads, context.run, hook, report)
        if inspect.isawaitable(answer):
            await answer

    async def _settle(self, delivery: Delivery, refused: dict[str, str]) -> None:
        store, attempts = self._desk.store, delivery.attempts
        if refused and attempts >= MAX_ATTEMPTS:
            told = "; ".join(f"{name}: {error}" for name, error in refused.items())
            log.error("giving up delivery %s:%s after %s attempts: %s", delivery.run_id, delivery.seq, attempts, told)
        async with self._table, self._desk.pool.connection() as connection:
            if refused and attempts < MAX_ATTEMPTS:
                await deliveries.refuse(store, connection, delivery, refused, backoff(attempts))
            else:
                await deliveries.delete(store, connection, delivery)


def backoff(attempts: int) -> timedelta:
    """How long after so many attempts the next one is due: 1 s, doubled each time, 5 minutes at most."""
    return timedelta(seconds=min(MAX_BACKOFF, 2.0 ** (attempts - 1)))
