"""What the cases of the other workflow engines share: the rate at which a backlog was worked off, and the takeover."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import psycopg

from benchmarks.load import Load
from benchmarks.processes import crew, say

WARM: Final = 50
"""Runs before what is measured, in each worker process."""
POLL: Final = 0.1
"""Seconds between two looks at whether all is done."""
SETTLED: Final = 4.0
"""Seconds that both workers have been there before one is killed."""
PATIENCE: Final = 60.0
"""Seconds after which a takeover is no longer waited for."""


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
        warm = WARM * load.processes
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


async def taken_over(load: Load, module: str, start: Callable[[str], Awaitable[None]]) -> list[float]:
    """Seconds from ``kill -9`` of the worker that executes a step until it begins in the other one. No value at all if
    it does not within a minute, and then nothing more is tried.

    `start` starts the run whose step is `first_to_begin`, which it gives the path that is its argument.
    """
    seconds = list[float]()
    async with crew(module, "worker", "--dsn", load.dsn) as workers:
        await workers.start_ready(2)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(load.samples):
                await asyncio.sleep(SETTLED)
                await start(f"{folder}/{number}")
                victim, _ = await workers.next("begun")
                killed = victim.kill()
                try:
                    _, begun = await workers.next("begun", limit=PATIENCE)
                except TimeoutError:
                    return []
                seconds.append(float(begun) - killed)
                if number + 1 < load.samples:
                    await workers.start_ready()
    return seconds


def first_to_begin(marker: str) -> bool:
    """In a step: says that it has begun. Whether it has not before, in another process: then it is to hang."""
    say(f"begun {time.time()}")
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
