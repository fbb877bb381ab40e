"""An app's way to its database: found and checked once a process, with a pool for each event loop that uses it.

Nothing happens before the first use. Any number of threads and loops may be first at once: the database is found once,
and each loop opens one pool. A forked child starts from nothing; what it inherited belongs to the parent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from durable import migrate, portal
from durable.config import Database, Embedded, resolve
from durable.define.registry import Registry
from durable.engine.desk import Desk
from durable.engine.hooks import Hooks
from durable.errors import ConfigurationError
from durable.store.connection import Connection
from durable.store.db import Store, alive
from durable.waiting import Endings

log = logging.getLogger("durable")

PATIENCE: Final = 10.0
"""Seconds that an operation waits for a connection."""

_all: weakref.WeakSet[Connecting] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which database, and how it is used."""

    dsn: str | None
    schema: str
    queue: str
    embedded: Embedded
    auto_migrate: bool | None
    pool_size: int
    max_crashes: int


class Link:
    """What one event loop uses: a pool, a desk over it, and the one that listens for the ends of runs."""

    def __init__(self, store: Store, registry: Registry, hooks: Hooks, wanted: Wanted) -> None:
        self.pool = store.open_pool(wanted.pool_size, application_name="durable app", min_size=0)
        self.pool.timeout = PATIENCE
        self.desk = Desk(store, registry, self.pool, hooks=hooks, max_crashes=wanted.max_crashes)
        self.endings = Endings(store, self.connection)

    async def open(self) -> None:
        await self.pool.open()

    async def close(self) -> None:
        await self.endings.close()
        await self.pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool, in autocommit, that the server has not closed while it lay there."""
        connection = await alive(self.pool)
        try:
            yield connection
        finally:
            await self.pool.putconn(connection)


class Connecting:
    """The database of one app."""

    def __init__(self, wanted: Wanted, store: Store, registry: Registry, hooks: Hooks) -> None:
        self._wanted, self._store, self._registry, self._hooks = wanted, store, registry, hooks
        self.database: Database | None = None
        self._settled = False
        self._lock = threading.Lock()
        self._links: dict[asyncio.AbstractEventLoop, tuple[asyncio.Lock, Link | None]] = {}
        self.at_exit = _nothing
        _all.add(self)

    def here(self) -> Link:
        """What this event loop uses. Raises ConfigurationError before `link` was awaited."""
        _, link = self._links.get(asyncio.get_running_loop(), (None, None))
        if link is None:
            raise ConfigurationError("not connected yet on this event loop: `await app.connect()` first")
        return link

    async def link(self) -> Link:
        """What this event loop uses; opened if need be."""
        loop = asyncio.get_running_loop()
        opening, link = self._links.get(loop) or self._links.setdefault(loop, (asyncio.Lock(), None))
        if link is not None:
            return link
        async with opening:
            link = self._links.get(loop, (opening, None))[1]
            if link is None:
                if not self._settled:
                    await asyncio.to_thread(self._settle)
                self._drop_closed_loops()
                link = Link(self._store, self._registry, self._hooks, self._wanted)
                await link.open()
                self._links[loop] = opening, link
        return link

    async def migrate(self) -> None:
        """Bring the database to the schema that this code needs."""

        def upgrade() -> None:
            with self._lock:
                database = self._found()
                migrate.upgrade(database.dsn, self._wanted.schema, source=database.source)

        await asyncio.to_thread(upgrade)

    async def close(self) -> None:
        """Close what this loop has opened, and leave the database if no other loop uses it."""
        self._drop_closed_loops()
        _, link = self._links.pop(asyncio.get_running_loop(), (None, None))
        if link is not None:
            await link.close()
        if not self._links:
            try:
                await asyncio.to_thread(self._leave)
            except RuntimeError:  # the interpreter is ending: there are no new threads
                self._leave()

    def _drop_closed_loops(self) -> None:
        """Their tasks and connections went with them."""
        for loop in list(self._links):
            if loop.is_closed():
                self._links.pop(loop, None)

    def _leave(self) -> None:
        with self._lock:
            database, self.database, self._settled = self.database, None, False
            if database is not None:
                database.close()

    def _settle(self) -> None:
        with self._lock:
            if self._settled:
                return
            database = self._found()
            auto = self._wanted.auto_migrate
            auto = database.embedded is not None if auto is None else auto
            migrate.ensure(database.dsn, self._wanted.schema, auto_migrate=auto, source=database.source)
            self._settled = True

    def _found(self) -> Database:
        if self.database is None:
            self.database = resolve(self._wanted.dsn, embedded=self._wanted.embedded)
            self._store.dsn = self.database.dsn
            self.at_exit()
            log.info("%s, schema %s", self.database, self._wanted.schema)
        return self.database

    def _forget(self) -> None:
        portal.keep((self.database, self._links, self._lock))
        self.database, self._settled, self._links, self._lock = None, False, {}, threading.Lock()


def _nothing() -> None: ...


def _after_fork() -> None:
    for connecting in list(_all):
        connecting._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
