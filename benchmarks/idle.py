"""How many transactions a database commits while nobody has anything to do."""

from __future__ import annotations

import asyncio
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.server import sibling

SECONDS: Final = 10.0
SETTLING: Final = 20.0
"""Seconds after a worker's start in which it still does what it does once, and the server counts that, which it does
late."""


async def commits_a_second(dsn: str, seconds: float = SECONDS) -> float:
    """Commits a second in the database of `dsn`. They are counted from another database, so that counting adds none."""
    name = conninfo_to_dict(dsn)["dbname"]
    query = "select xact_commit from pg_stat_database where datname = %s"
    async with await psycopg.AsyncConnection.connect(sibling(dsn), autocommit=True) as connection:

        async def committed() -> int:
            row = await (await connection.execute(query, [name])).fetchone()
            assert row is not None
            return int(row[0])

        await asyncio.sleep(SETTLING)
        before = await committed()
        await asyncio.sleep(seconds)
        return (await committed() - before) / seconds
