"""How many transactions a database commits while nobody has anything to do."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from benchmarks.load import Load
from benchmarks.server import sibling

SECONDS: Final = 10.0
SETTLING: Final = 20.0
"""Seconds after a worker's start in which it still does what it does once, and the server counts that, which it does
late."""


async def commits_a_second(load: Load) -> list[float]:
    """Commits a second, in as many spans of time as samples are wanted. They are counted from another database, so that
    counting adds none. A connection that rests may tell late what it did at the start: that falls into one span."""
    name = conninfo_to_dict(load.dsn)["dbname"]
    query = "select xact_commit from pg_stat_database where datname = %s"
    async with await psycopg.AsyncConnection.connect(sibling(load.dsn), autocommit=True) as connection:

        async def committed() -> int:
            row = await (await connection.execute(query, [name])).fetchone()
            assert row is not None
            return int(row[0])

        await asyncio.sleep(SETTLING)
        counted = [await committed()]
        for _ in range(load.samples):
            await asyncio.sleep(SECONDS)
            counted.append(await committed())
    return [(after - before) / SECONDS for before, after in pairwise(counted)]
