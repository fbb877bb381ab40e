"""How long a function takes until it is where it was, when a worker takes it up that has never seen it.

python -m benchmarks.replay --dsn DSN --size full|quick

A run of a function with 1,000 steps is executed, and its journal then replayed, as when the run goes on elsewhere. CPU
time, which other programs change least; reading the journal from the database is measured beside it.
"""

from __future__ import annotations

import time
from typing import Any, Final

from benchmarks import beside
from benchmarks.cases import Size
from benchmarks.figures import amount
from benchmarks.statistics import median
from benchmarks.systems.durable_function import KIND, stepping
from durable.engine.guard import Guard
from durable.replaying import Fit, Recording, replayed, stored

STEPS: Final = 1_000
TIMES: Final[dict[Size, int]] = {"full": 50, "quick": 5}


async def measure(dsn: str, size: Size) -> dict[str, Any]:
    """``{"steps": of the run, "replay_ms": [...], "read_ms": [...]}``"""
    async with KIND.app(dsn) as app:
        async with app.worker():
            await (await app.start(stepping, {"steps": STEPS})).result()

        async def read() -> Recording:
            async for recording in stored(app.store, app.pool, app.registry, limit=1):
                return recording
            raise RuntimeError("the run is gone")

        reads, replays, guard = [], [], Guard()
        try:
            for _ in range(TIMES[size]):
                began = time.process_time()
                recording = await read()
                reads.append((time.process_time() - began) * 1e3)
                began = time.process_time()
                verdict = replayed(recording, app.registry, guard)
                replays.append((time.process_time() - began) * 1e3)
                if verdict.fit is not Fit.OK or len(recording.journal) < STEPS:
                    raise RuntimeError(f"the replay of {len(recording.journal)} entries came to {verdict}")
        finally:
            guard.close()
    return {"steps": STEPS, "replay_ms": replays, "read_ms": reads}


def markdown(measured: dict[str, Any]) -> str:
    replay, read = amount(median(measured["replay_ms"])), amount(median(measured["read_ms"]))
    return (
        f"A cold replay of a function's journal of {measured['steps']:,} steps takes {replay} ms (median of "
        f"{len(measured['replay_ms'])}, CPU time); reading it from the database takes {read} ms more."
    )


if __name__ == "__main__":
    beside.main(measure, __doc__)
