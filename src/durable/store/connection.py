"""psycopg's connection, made ready for exchanges of many statements with few turns of the event loop.

psycopg registers the socket with the event loop at each wait and takes it back after it, with a timer beside. Here it
stays registered from one exchange to the next, until something else is said through the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from select import select
from typing import Any, TypeAlias, TypeVar

from psycopg import AsyncConnection, Error, adapt
from psycopg.abc import PQGen, Transformer
from psycopg.pq.abc import PGconn
from psycopg.rows import RowFactory, TupleRow
from psycopg.waiting import Wait

from durable.store.query import Statement

T = TypeVar("T")

Exchange: TypeAlias = Generator[Wait, None, T]
"""What is said to the server. Yields what it waits for; what has come meanwhile, libpq has taken in."""


class Connection(AsyncConnection[TupleRow]):
    """A connection in autocommit mode of the engine's.

    - `prepared`: statements that the server knows, by their names.
    - `adapt`: turns values into what is sent, and what comes into values. It learns how from the first exchanges.
    """

    def __init__(self, pgconn: PGconn, row_factory: RowFactory[Any] | None = None) -> None:
        super().__init__(pgconn, *(() if row_factory is None else (row_factory,)))
        self.prepared: dict[Statement, bytes] = {}
        self.adapt: Transformer = adapt.Transformer(self.adapters)  # of the connection itself it would make a cycle
        self._watching: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._fd = -1

    async def converse(self, exchange: Exchange[T]) -> T:
        """Drive `exchange` to its end. If the task is cancelled meanwhile, nobody knows how far the server has come:
        the connection is closed."""
        try:
            while True:
                await self._wait(next(exchange))
        except StopIteration as end:
            answer: T = end.value
            return answer
        except BaseException:
            self.unwatch()
            exchange.close()
            raise
        finally:
            if self.closed:
                self.unwatch()

    def has_news(self) -> bool:
        """Whether the server has said something that nobody asked for: mostly that it is gone."""
        if self.closed:
            return True
        try:
            return bool(select([self.fileno()], [], [], 0)[0])
        except (OSError, ValueError):
            return True  # more than 1,023 files are open: ask

    def unwatch(self) -> None:
        """Somebody else waits for the socket from here on."""
        if self._watching is not None:
            self._watching.remove_reader(self._fd)
            self._watching = None

    async def wait(self, *args: Any, **kwargs: Any) -> Any:  # all that psycopg itself says goes through here
        self.unwatch()
        return await super().wait(*args, **kwargs)

    async def close(self) -> None:
        self.unwatch()
        await super().close()

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        """psycopg's own. Without a name it is DEALLOCATE ALL, which psycopg says after each ROLLBACK, DROP or ALTER."""
        if name is None:
            self.prepared.clear()
        return super()._deallocate(name)

    async def _wait(self, wants: Wait) -> None:
        loop = self._watching
        if loop is None:
            loop = self._watching = asyncio.get_running_loop()
            self._fd = self.pgconn.socket
            loop.add_reader(self._fd, self._readable)
        self._waiter = loop.create_future()
        if wants & Wait.W:
            loop.add_writer(self._fd, self._told)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if wants & Wait.W:
                loop.remove_writer(self._fd)

    def _readable(self) -> None:
        """Take it in at once: what stays in the socket is told of again."""
        if self._waiter is None:  # the server says what nobody has asked for: that it shuts down, say
            return self.unwatch()
        try:
            self.pgconn.consume_input()
        except Error as error:  # libpq has closed the socket, whose number somebody else may be given any moment
            self.unwatch()
            if not self._waiter.done():
                self._waiter.set_exception(error)
        else:
            self._told()

    def _told(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
