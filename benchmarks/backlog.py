"""How quickly workers work off what lies in their queue: in the same way for each engine that has workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import psycopg

from benchmarks.load import Load
from benchmarks.processes import crew

WARM: Final = 50
"""Runs before what is measured, for each worker process."""
POLL: Final = 0.1
"""Seconds between two looks at whether all is done."""


async def worked_off(
    load: Load, module: str, arguments: Sequence[str], fill: Callable[[int], Awaitable[None]], ended: str
) -> list[float]:
    """Steps a second of a backlog, from the moment at which warm workers see it until the last run of it has ended.

    `arguments` are those of a worker process of `module`, which says ``ready`` when it looks into the queue. `fill`
    puts so many runs into it, all in one transaction. `ended` is a query for the number of completed runs, and for when
    the last one of them has ended, in seconds since the epoch.
    """
    async with (
        crew(module, *arguments, "--dsn", load.dsn, "--in-flight", str(load.in_flight)) as workers,
        await psycopg.AsyncConnection.connect(load.dsn, autocommit=True) as connection,
    ):

        async def last(runs: int) -> float | None:
            row = await (await connection.execute(ended.encode())).fetchone()
            return float(row[1]) if row is not None and row[0] >= runs else None

        await workers.start_ready(load.processes)
        warm = min(WARM, load.runs) * load.processes
        await fill(warm)
        await _until(lambda: last(warm))
        await fill(load.runs)
        began = time.time()
        seconds = await _until(lambda: last(warm + load.runs)) - began
    return [load.runs * load.steps / seconds]


async def _until(found: Callable[[], Awaitable[float | None]]) -> float:
    while True:
        if (value := await found()) is not None:
            return value
        await asyncio.sleep(POLL)
