"""A TCP proxy in front of PostgreSQL that cuts connections at COMMIT: after it was executed and before its answer comes
through, or before it arrives. Then nobody on this side knows whether it was.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

HEADER: Final = 5  # a message of the protocol: its type, and its length in four bytes that count themselves
STARTUP: Final = 4  # the first one of a client has no type


class Cutter:
    """Honest, until it is told to cut a share of COMMITs."""

    def __init__(self, dsn: str) -> None:
        self._server = conninfo_to_dict(dsn)
        self._share, self._left = 0.0, 0
        self.answers_cut = self.commits_cut = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    @property
    def dsn(self) -> str:
        """The way through the proxy."""
        words = self._server
        name, user = quote(str(words["dbname"])), quote(str(words.get("user", "postgres")))
        return f"postgresql://{user}@127.0.0.1:{self.port}/{name}?sslmode=disable&gssencmode=disable"

    def cut(self, share: float, cuts: int) -> None:
        """From now on this share of COMMITs, until so many were cut."""
        self._share, self._left = share, cuts

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        host, port = str(self._server["host"]), int(self._server.get("port") or 5432)
        try:
            if host.startswith("/"):
                server, to_server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            else:
                server, to_server = await asyncio.open_connection(host, port)
        except OSError:
            to_client.close()
            return
        ways = [
            asyncio.ensure_future(self._forth(client, to_server)),
            asyncio.ensure_future(self._back(server, to_client)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (to_server, to_client):
                writer.transport.abort()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _forth(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            head = await client.readexactly(STARTUP)
            while True:
                length = int.from_bytes(head[-4:], "big")
                message = head + await client.readexactly(length - 4)
                if message[:1] in b"QP" and b"commit" in message.lower() and self._cuts(0.5):
                    self.commits_cut += 1
                    return
                server.write(message)
                await server.drain()
                head = await client.readexactly(HEADER)

    async def _back(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await server.readexactly(HEADER)
                message = head + await server.readexactly(int.from_bytes(head[1:], "big") - 4)
                if message[:1] == b"C" and message[HEADER:] == b"COMMIT\0" and self._cuts(1.0):
                    self.answers_cut += 1
                    return
                client.write(message)
                await client.drain()

    def _cuts(self, weight: float) -> bool:
        if self._left <= 0 or random.random() >= self._share * weight:
            return False
        self._left -= 1
        return True


@contextmanager
def proxied(dsn: str) -> Iterator[Cutter]:
    made = Cutter(dsn)
    made.start()
    try:
        yield made
    finally:
        made.stop()
