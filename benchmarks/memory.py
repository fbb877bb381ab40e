"""Does a worker's memory stay as it is? What it holds after 1,000 runs, and after 100,000.

python -m benchmarks.memory --dsn DSN --size full|quick
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

from benchmarks import beside
from benchmarks.cases import Size
from benchmarks.figures import amount
from benchmarks.load import Load
from benchmarks.systems._durable import until_done
from benchmarks.systems.durable import KIND

RUNS: Final[dict[Size, tuple[int, int]]] = {"full": (1_000, 100_000), "quick": (200, 2_000)}
AT_ONCE: Final = 2_000
"""Runs that wait for the worker at the same time."""


async def measure(dsn: str, size: Size) -> dict[str, Any]:
    """``{"runs": [few, many], "mib": [after few, after many]}``"""
    resident = []
    async with KIND.app(dsn) as app:
        await app.migrate()
        async with KIND.crew("--dsn", dsn) as workers:
            [worker] = await workers.start_ready()
            done = 0
            for goal in RUNS[size]:
                while done < goal:
                    count = min(AT_ONCE, goal - done)
                    await until_done(app, await KIND.start_all(app, Load(dsn, count, 1)))
                    done += count
                resident.append(await resident_mib(worker.pid))
    return {"runs": RUNS[size], "mib": resident}


async def resident_mib(pid: int) -> float:
    """What a process holds of memory."""
    statm = Path(f"/proc/{pid}/statm")
    if statm.exists():  # noqa: ASYNC240 (no disk)
        return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20  # noqa: ASYNC240
    process = await asyncio.create_subprocess_exec("ps", "-o", "rss=", "-p", str(pid), stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    return int(said) / 2**10


def markdown(measured: dict[str, Any]) -> str:
    (few, many), (before, after) = measured["runs"], measured["mib"]
    return (
        f"A worker process holds {amount(before)} MiB after {few:,} runs of one step, and {amount(after)} MiB after "
        f"{many:,}: {after / before:.2f} times as much."
    )


if __name__ == "__main__":
    beside.main(measure, __doc__)
