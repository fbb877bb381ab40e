"""For tests of the doors: one test through both facades, and what the database holds before and after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from durable import AsyncDurable, Durable

TablesRows = dict[str, list[str]]


class Door:
    """An app to be called from async tests, whichever facade it is: ``await door.start(...)``."""

    def __init__(self, app: Durable | AsyncDurable, dsn: str) -> None:
        self.app, self.dsn = app, dsn

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            method = getattr(self.app, operation)
            if isinstance(self.app, AsyncDurable):
                return await method(*args, **kwargs)
            return await asyncio.to_thread(method, *args, **kwargs)

        return call

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens in the block leaves every row of every table as it was."""
        with unchanged(self.dsn):
            yield


def dump(dsn: str, schema: str = "durable") -> TablesRows:
    """Every row of every table in the schema, as text."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        tables = connection.execute("select tablename from pg_tables where schemaname = %s order by 1", [schema])
        return {table: rows(connection, f'"{schema}"."{table}"') for (table,) in tables.fetchall()}


def rows(connection: psycopg.Connection, table: str) -> list[str]:
    found = connection.execute(f"select t::text from {table} t order by 1".encode())
    return [row for (row,) in found.fetchall()]


@contextmanager
def unchanged(dsn: str) -> Iterator[None]:
    before = dump(dsn)
    yield
    assert dump(dsn) == before


def says(error: BaseException | str, *words: str) -> None:
    """The message has all the words that a reader needs."""
    text = str(error)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
