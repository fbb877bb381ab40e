"""A loop that goes on for a million iterations: do memory, rows and speed stay as they are?

    python -m benchmarks.loop [--iterations 1000000]

One run of one workflow, a step an iteration, on a throw-away PostgreSQL with fsync on. Prints a line for each tenth of
the way: iterations a second, rows of the journal, the journal's size on disk, and the memory of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from durable import AsyncDurable, AsyncRun, Break, Context, workflow
from durable.postgres import EmbeddedPostgres


async def count(done: int) -> int:
    """What an iteration does: next to nothing."""
    return done + 1


@workflow
async def counting(ctx: Context, top: int) -> int:
    """Counts to `top`, one step at a time."""

    async def body(c: Context, done: int) -> int | Break[int]:
        done = await c.step(count, done)
        return Break(done) if done >= top else done

    result: int = await ctx.loop("count", body, 0)
    return result


async def measure(app: AsyncDurable, run: AsyncRun[int], top: int) -> None:
    """Print where the run is, each time that a tenth of it has passed."""
    began, before, tenth = time.perf_counter(), 0, max(top // 10, 1)
    print(f"{'iterations':>12} {'a second':>10} {'rows':>6} {'journal':>10} {'memory':>8}")
    while True:
        await asyncio.sleep(1)
        done, rows, size = await look(app, run)
        ended = (await run.status()).ended
        if done - before >= tenth or ended:
            now = time.perf_counter()
            rate = (done - before) / (now - began)
            print(f"{done:>12,} {rate:>10,.0f} {rows:>6} {size / 2**20:>6.1f} MiB {memory():>4} MiB", flush=True)
            before, began = done, now
        if ended:
            return


async def look(app: AsyncDurable, run: AsyncRun[int]) -> tuple[int, int, int]:
    """The iteration that the run is at, its rows in the journal, and the size of the journal's table and indexes."""
    async with app.pool.connection() as connection:
        query = """
            select coalesce(max((extra ->> 'iteration')::int) + 1, 0), count(*),
                   pg_total_relation_size('durable.journal')
            from durable.journal where run_id = %s
        """
        row: tuple[Any, ...] | None = await (await connection.execute(query, [run.id])).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def memory() -> int:
    """What this process holds of memory, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 2**20


async def main(iterations: int) -> None:
    with tempfile.TemporaryDirectory(prefix="durable-bench-") as folder, EmbeddedPostgres(folder) as server:
        async with AsyncDurable(server.dsn(), workflows=[counting], auto_migrate=True) as app, app.worker():
            run = await app.start(counting, iterations)
            await measure(app, run, iterations)
            assert await run.result() == iterations


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1_000_000)
    asyncio.run(main(parser.parse_args().iterations))
