"""Waiting for the end of runs, and for replies: told by the database, with a look once a second in case that gets lost.

One connection an event loop listens. A waiter first makes sure of it, then registers, then looks (in one flush, with a
commit between the two), then waits: what ends after the look is told, what ended before it was seen. Behind a
transaction pooler, or after a lost connection, the look alone serves. While a run is waited for, no connection of the
pool is held. A run that went on as another one (``continue_as_new``) is waited for there.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Final, TypeAlias

import psycopg
from psycopg_pool import PoolTimeout

from durable.core.state import Entry, Run
from durable.errors import RunNotFound
from durable.store import read, sweep
from durable.store.connection import Connection
from durable.store.db import Store, connection_settings
from durable.store.read import Answer, Outcome
from durable.values import Status

log = logging.getLogger(__name__)

LOOK: Final = 1.0
"""Seconds between two looks at a run that nobody has told anything of."""
WATCH: Final = 0.25
"""Seconds between two looks at a run that is watched: its steps tell nobody."""
PATIENCE: Final = 2.0
"""Seconds after which the log says why nothing may be happening."""

LOST: Final = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout)
"""What the database says, or does not say, while it is away."""

Borrow: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]


class Endings:
    """Who waits for which runs, on one event loop."""

    def __init__(self, store: Store, borrow: Borrow) -> None:
        self._store, self._borrow = store, borrow
        self._id = uuid.uuid4()
        self._waiting: defaultdict[uuid.UUID, set[_Waiter]] = defaultdict(set)
        self._at_hand: set[uuid.UUID] = set()
        self._connecting = asyncio.Lock()
        self._ear: asyncio.Task[None] | None = None
        self._heard = 0  # how many connections have listened
        self._next_try = 0.0

    def hold(self, run_id: uuid.UUID) -> None:
        """A job takes the run further on this event loop, until `let_go`. Who waits for it here need not ask the
        database to be told: if the run ends by that, `ended` says so."""
        self._at_hand.add(run_id)

    def let_go(self, run_id: uuid.UUID) -> None:
        """The job is over: who has not asked the database yet does so now."""
        self._at_hand.discard(run_id)
        for waiter in self._waiting.get(run_id, ()):
            if waiter.unregistered:
                waiter.told.set()

    def ended(self, run: Run, journal: Callable[[], Mapping[str, Entry]]) -> None:
        """The run has ended on this event loop, and that is committed: who waits for it here need not read it."""
        waiters = self._waiting.get(run.id)
        if not waiters:
            return
        done = run.status is Status.COMPLETED and run.successor is None
        found = read.completed(run, journal().values()) if done else None
        for waiter in waiters:
            waiter.found = found
            waiter.told.set()

    async def outcome(self, run_id: uuid.UUID, timeout: float | None, *, uncommitted: bool = False) -> Outcome:
        """How the run ended, once it has, or the one that it went on as. Raises RunNotFound, unless its start may still
        commit; TimeoutError."""
        with self._waiter(run_id, timeout) as waiter:
            found = await (waiter.look(run_id) if run_id in self._at_hand else self._read(run_id))
            while found is None or not found.status.ended:
                if found is None and not uncommitted:
                    raise RunNotFound(run_id)
                if waiter.late:
                    raise TimeoutError(await self._why(run_id, timeout, found))
                try:
                    found = await waiter.look(found.id if found is not None else run_id)
                    await waiter.hint(found)
                except LOST as error:
                    await waiter.lost(error)
        return found

    async def answer(self, run_id: uuid.UUID, message_id: str, timeout: float) -> Answer:
        """What became of a message that wants a reply: once it has one or can't get one any more, at the latest after
        `timeout` seconds."""
        found = await self._answer(run_id, message_id)
        with self._waiter(run_id, timeout) as waiter:
            while not (found.replied or found.too_late or waiter.late):
                try:
                    await waiter.rest(found.run.id, LOOK)
                    found = await self._answer(found.run.id, message_id)
                    await waiter.hint(found.run)
                except LOST as error:
                    await waiter.lost(error)
        return found

    async def change(self, run_id: uuid.UUID, seen: int) -> None:
        """Until the run is at another revision than `seen`. Raises RunNotFound if it was deleted meanwhile."""
        revision: int | None = seen
        with self._waiter(run_id, None) as waiter:
            while revision == seen:
                try:
                    await waiter.rest(run_id, WATCH)
                    async with self._borrow() as connection:
                        revision = await read.revision_of(self._store, connection, run_id)
                except LOST as error:
                    await waiter.lost(error)
        if revision is None:
            raise RunNotFound(run_id)

    async def close(self) -> None:
        """Stop listening."""
        if self._ear is not None:
            self._ear.cancel()
            with suppress(asyncio.CancelledError):
                await self._ear

    async def _read(self, run_id: uuid.UUID, *, waiter: uuid.UUID | None = None) -> Outcome | None:
        async with self._borrow() as connection:
            try:
                return await read.outcome(self._store, connection, run_id, waiter=waiter)
            except RunNotFound:
                return None

    async def _answer(self, run_id: uuid.UUID, message_id: str) -> Answer:
        async with self._borrow() as connection:
            return await read.answer(self._store, connection, run_id, message_id)

    @contextmanager
    def _waiter(self, run_id: uuid.UUID, timeout: float | None) -> Iterator[_Waiter]:
        waiter = _Waiter(self, run_id, timeout)
        try:
            yield waiter
        finally:
            self._forget(waiter.at, waiter)

    def _forget(self, run_id: uuid.UUID, waiter: _Waiter) -> None:
        if run_id in self._waiting:
            self._waiting[run_id].discard(waiter)
            if not self._waiting[run_id]:
                del self._waiting[run_id]

    async def _register(self, run_id: uuid.UUID, waiter: _Waiter) -> None:
        self._waiting[run_id].add(waiter)
        async with self._borrow() as connection:
            await sweep.register_waiter(self._store, connection, run_id, self._id)

    async def _register_and_read(self, run_id: uuid.UUID, waiter: _Waiter) -> Outcome | None:
        self._waiting[run_id].add(waiter)
        return await self._read(run_id, waiter=self._id)

    # ---------------------------------------------------------------- being told

    async def _listen(self) -> int:
        """Make sure that somebody listens; a number that is another one when it is another connection, 0: nobody."""
        async with self._connecting:
            if self._ear is not None and not self._ear.done():
                return self._heard
            now = asyncio.get_running_loop().time()
            if now < self._next_try:
                return 0
            self._next_try = now + LOOK
            try:
                connection = await self._connect()
            except psycopg.Error as error:
                log.debug("cannot listen for the ends of runs, looking once a second: %s", error)
                return 0
            self._heard += 1
            self._ear = asyncio.create_task(self._hear(connection), name="durable: the ends of runs")
            return self._heard

    async def _connect(self) -> Connection:
        settings: dict[str, Any] = connection_settings(self._store.dsn, "durable result")
        connection = await Connection.connect(self._store.dsn, autocommit=True, **settings)
        try:
            await connection.execute(f'listen "{self._store.ended_channel}"'.encode())
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _hear(self, connection: Connection) -> None:
        try:
            async for notice in connection.notifies():
                with suppress(ValueError):
                    for waiter in self._waiting.get(uuid.UUID(notice.payload), ()):
                        waiter.told.set()
        except psycopg.Error as error:
            log.debug("the connection that listens for the ends of runs was lost: %s", error)
        finally:
            for waiting in list(self._waiting.values()):  # what was told meanwhile is lost: look
                for waiter in waiting:
                    waiter.told.set()
            await connection.close()

    # ---------------------------------------------------------------- saying why it takes long

    async def _why(self, run_id: uuid.UUID, timeout: float | None, found: Outcome | None) -> str:
        text = f"run {str(run_id)!r} has not ended within {timeout:g} s: "
        if found is None:
            return text + "its start is not committed yet, or was rolled back"
        with suppress(RunNotFound, *LOST):
            async with self._borrow() as connection:
                snapshot = await read.snapshot(self._store, connection, found.id, children=0)
            waits = f", {snapshot.derived.replace('_', ' ')}" if snapshot.derived != snapshot.status else ""
            about = f" {snapshot.waiting_name!r}" if snapshot.waiting_name else ""
            return f"{text}it is {snapshot.status.value}{waits}{about}. It goes on; ask again for its result"
        return f"{text}it was {found.status.value}"


class _Waiter:
    """One who waits for a run, and is patient while the database is away. `at` is the run whose news it waits for."""

    def __init__(self, endings: Endings, run_id: uuid.UUID, timeout: float | None) -> None:
        self._endings, self._hints = endings, _Hints(run_id)
        self._now = asyncio.get_running_loop().time
        self._began = self._now()
        self._end = self._began + timeout if timeout is not None else float("inf")
        self._listening: int | None = None  # with which connection it is registered
        self._relied = False  # on what this process does with the run
        self.at, self.told = run_id, asyncio.Event()
        self.found: Outcome | None = None  # what it was told with

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self._now() >= self._end

    async def look(self, at: uuid.UUID) -> Outcome | None:
        """How the run `at` stands, once there may be something new of it, or after a while. The first look is at once,
        and makes sure that there is somebody to tell; so does the one after each time that it was told."""
        if at in self._endings._at_hand and not self._relied:
            self._relied = True  # once: what it is at may take long, and be ended elsewhere
            self._follow(at)
            self._endings._waiting[at].add(self)
            await self._until_told(LOOK)
            if self.found is not None:
                return self.found
        if await self._registered(at):
            await self._until_told(LOOK)
            return self.found or await self._endings._read(at)
        found = await self._endings._register_and_read(at, self)
        self._heed()
        return self.found or found

    async def rest(self, at: uuid.UUID, seconds: float) -> None:
        """The same for who looks at something else of the run: to be done when this returns."""
        if await self._registered(at):
            await self._until_told(seconds)
        else:
            await self._endings._register(at, self)
            self._heed()

    async def _registered(self, at: uuid.UUID) -> bool:
        """Whether somebody is told of the run `at`. If not, it is to be registered now."""
        listening = await self._endings._listen()
        self._follow(at)
        known, self._listening = self._listening, listening
        return known == listening

    @property
    def unregistered(self) -> bool:
        """Whether nobody but this process can tell it anything."""
        return self._listening is None

    def _follow(self, at: uuid.UUID) -> None:
        """Wait for the run `at` from here on."""
        if at != self.at:
            self._endings._forget(self.at, self)
            self.at, self._listening = at, None

    async def _until_told(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._at_most(seconds)):
                await self.told.wait()
        self._heed()

    def _heed(self) -> None:
        if self.told.is_set():
            self.told.clear()
            self._listening = None  # whoever is told is no longer registered

    async def lost(self, error: BaseException) -> None:
        """The database was away: register anew, after a pause."""
        self._hints.lost(error)
        self._listening = None
        await asyncio.sleep(self._at_most(LOOK))

    async def hint(self, found: Outcome | None) -> None:
        """Say in the log why nothing may be happening, once it has taken long."""
        if self._now() - self._began < PATIENCE:
            return
        if found is None:
            self._hints.invisible()
        elif not found.status.ended and not self._hints.said_unserved:
            async with self._endings._borrow() as connection:
                self._hints.served(
                    found.queue, await sweep.workers_alive(self._endings._store, connection, found.queue)
                )

    def _at_most(self, seconds: float) -> float:
        return min(seconds, max(self._end - self._now(), 0))


class _Hints:
    """What the log is told about one waiting, each thing once."""

    def __init__(self, run_id: uuid.UUID) -> None:
        self._run_id = run_id
        self._said: set[str] = set()
        self.said_unserved = False

    def invisible(self) -> None:
        self._once("waiting for run %s: its start is not committed yet", self._run_id)

    def served(self, queue: str, workers: int) -> None:
        self.said_unserved = True
        if workers == 0:
            self._once(
                "waiting for run %s, but no worker serves the queue %r: start one (`durable worker`, or app.worker())",
                self._run_id,
                queue,
            )

    def lost(self, error: BaseException) -> None:
        self._once("waiting for run %s: the database is away, trying again: %s", self._run_id, error)

    def _once(self, text: str, *arguments: object) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text, *arguments, extra={"run": str(self._run_id)})
