"""How the others know that this worker is alive, and how it is told what concerns it.

It holds a session-level advisory lock on a connection of its own, made directly to the server. The lock dies with the
connection: milliseconds after a `kill -9`. The server ends that session if it hears nothing for 20 s, and only the
event loop speaks on it: so a stopped process and a blocked loop die, too. The same connection listens for requests to
runs that this worker executes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import psycopg
from psycopg import sql

from durable.engine import recover
from durable.errors import ConfigurationError
from durable.store import sweep as queries
from durable.store.connection import Connection
from durable.store.db import Store, connection_settings

log = logging.getLogger(__name__)

SAY_SOMETHING: Final = 5.0
SILENCE: Final = "20s"


class Liveness:
    """A worker's lock and its ear. `alive` is set while the lock is held."""

    def __init__(
        self,
        store: Store,
        queue: str,
        *,
        heard: Callable[[uuid.UUID], None],
        lost: Callable[[], None],
        registered: Callable[[int], Awaitable[None]],
    ) -> None:
        self._store, self.queue = store, queue
        self._heard, self._lost, self._registered = heard, lost, registered
        self.worker = 0
        self.alive = asyncio.Event()
        self._connection: Connection | None = None
        self._since = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Register and lock; returns the worker's id. Raises ConfigurationError behind a transaction pooler."""
        await self._connect()
        self._task = asyncio.create_task(self._live(), name="liveness")
        return self.worker

    async def stop(self) -> None:
        """Let go of the lock in order: nobody takes this for a crash."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self.alive.clear()
        if self._connection is not None and not self._connection.closed:
            with suppress(psycopg.Error):
                await queries.unregister_worker(self._store, self._connection, self.worker)
            await self._connection.close()

    async def vanish(self) -> None:
        """Let go of the lock without a word, as a crash does."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._drop()

    @property
    def may_judge(self) -> bool:
        """Whether this worker may call others dead."""
        return self.alive.is_set() and time.monotonic() - self._since >= recover.STOOD

    async def _live(self) -> None:
        pause = 0.1
        while True:
            try:
                if self._connection is None:
                    await self._connect()
                    self._lost()  # meanwhile others may have taken over, and nobody could tell
                pause = 0.1
                await self._listen()
            except psycopg.Error as error:
                log.warning("lost the connection that says that this worker is alive: %s", error)
            except OSError as error:
                log.warning("the database cannot be reached: %s", error)
            self.alive.clear()
            await self._drop()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _listen(self) -> None:
        connection = self._connection
        assert connection is not None
        while True:
            async for notification in connection.notifies(timeout=SAY_SOMETHING):
                with suppress(ValueError):  # somebody else's use of the channel
                    self._heard(uuid.UUID(notification.payload))
            await connection.execute("select 1")

    async def _connect(self) -> None:
        settings = connection_settings(self._store.dsn, "durable liveness", [f"-c idle_session_timeout={SILENCE}"])
        connection: Connection = await Connection.connect(self._store.dsn, autocommit=True, **settings)
        try:
            await connection.execute(sql.SQL("listen {}").format(sql.Identifier(self._store.control_channel)))
            await self._must_be_direct(connection)
            await self._lock(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection, self._since = connection, time.monotonic()
        await self._registered(self.worker)
        self.alive.set()

    async def _lock(self, connection: Connection) -> None:
        """The lock of the worker that this is, or of a new one if that was given up meanwhile."""
        if self.worker and await queries.lock_worker(self._store, connection, self.worker):
            return
        if self.worker and await queries.registered(self._store, connection, self.worker):
            raise psycopg.OperationalError("the session that was lost still holds this worker's lock")
        self.worker = await queries.register_worker(
            self._store, connection, self.queue, socket.gethostname(), os.getpid()
        )

    async def _must_be_direct(self, connection: Connection) -> None:
        """Behind a transaction pooler a notification to oneself gets lost, and so would the lock."""
        channel, told = self._store.control_channel, str(uuid.uuid4())
        await connection.execute("select pg_notify(%s, %s)", (channel, told))
        async for notification in connection.notifies(timeout=SAY_SOMETHING):
            if notification.payload == told:
                return
        raise ConfigurationError(
            "a worker needs a direct connection to PostgreSQL: behind a transaction pooler (PgBouncer) its session "
            "lock and LISTEN do not work. Give the worker a DSN that goes to the server itself; app code may use the "
            "pooler"
        )

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                await connection.close()
