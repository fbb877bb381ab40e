"""What the cases of the other workflow engines share: the takeover."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from benchmarks.load import Load
from benchmarks.processes import crew, say

SETTLED: Final = 4.0
"""Seconds that both workers have been there before one is killed."""


async def taken_over(load: Load, module: str, start: Callable[[str], Awaitable[None]]) -> list[float]:
    """Seconds from ``kill -9`` of the worker that executes a step until it begins in the other one. No value at all if
    it does not within the load's patience, and then nothing more is tried.

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
                    _, begun = await workers.next("begun", limit=load.patience)
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
