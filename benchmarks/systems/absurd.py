"""Absurd: functions in PostgreSQL that keep queues of tasks, and an SDK whose workers poll them."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import absurdctl
import psycopg
from absurd_sdk import AsyncAbsurd, AsyncTaskContext

from benchmarks.backlog import WARM, worked_off
from benchmarks.idle import commits_a_second
from benchmarks.load import RESTING, TEXT, Load
from benchmarks.processes import crew, say, stdin_ended
from benchmarks.samples import warm_samples
from benchmarks.systems._peers import first_to_begin, taken_over

MODULE: Final = __spec__.name
POLLING: Final = 0.005
"""Seconds after which a worker looks again into a queue that was empty."""
LOOKING: Final = 0.002
"""Seconds between two looks of a client whether its task has ended."""
SELDOM: Final = 0.1
"""The same, where nobody waits for the client, so that it is not in the worker's way."""
BATCH: Final = 128
"""Tasks that a worker claims at once, where steps a second are measured."""
SETTINGS: Final = (
    f"the async SDK; `poll_interval` {POLLING} instead of 0.25; steps a second with `concurrency` as many as runs in "
    f"flight and `batch_size` {BATCH}; a client looks for results with `fetch_task_result` every {LOOKING * 1e3:g} ms, "
    "because `await_task_result` waits for 50 at least; `idle` and `takeover` with all defaults: a `poll_interval` of "
    "0.25 s and a `claim_timeout` of 120 s"
)

_ENDED: Final = "select count(*), extract(epoch from max(completed_at)) from absurd.r_default where state = 'completed'"


# ---------------------------------------------------------------- tasks


async def nothing() -> dict[str, str]:
    return {"text": TEXT}


async def stepping(params: dict[str, Any], ctx: AsyncTaskContext) -> None:
    """So many steps, one after the other."""
    for number in range(params["steps"]):
        await ctx.step(f"s{number}", nothing)


async def waiting(params: dict[str, Any], ctx: AsyncTaskContext) -> Any:
    """Until somebody emits the event."""
    return await ctx.await_event(params["event"])


async def napping(params: dict[str, Any], ctx: AsyncTaskContext) -> float:
    """Sleeps for so many seconds. Its result: the milliseconds by which that has ended late."""

    async def due_in() -> float:
        return time.time() + float(params["seconds"])

    due = float(await ctx.step("mark", due_in))
    await ctx.sleep_until("nap", due)
    return (time.time() - due) * 1e3


async def hanging(params: dict[str, Any], ctx: AsyncTaskContext) -> None:
    """A step that ends in the second process only."""

    async def hang() -> None:
        if first_to_begin(params["marker"]):
            await asyncio.Event().wait()

    await ctx.step("hang", hang)


@asynccontextmanager
async def client(on: str | psycopg.AsyncConnection[Any]) -> AsyncIterator[AsyncAbsurd]:
    """One that knows all tasks, on a connection of its own or on this one."""
    app = AsyncAbsurd(on)
    for task in (stepping, waiting, napping, hanging):
        app.register_task(name=task.__name__)(task)
    try:
        yield app
    finally:
        await app.close()


@asynccontextmanager
async def worker(dsn: str, **settings: Any) -> AsyncIterator[None]:
    """A worker in the background of a block, with these arguments of ``start_worker``."""
    async with client(dsn) as app:
        working = asyncio.create_task(app.start_worker(**settings))
        try:
            yield
        finally:
            app.stop_worker()
            working.cancel()  # a task may hang for ever
            with suppress(asyncio.CancelledError):
                await working


async def create(dsn: str) -> None:
    """The schema, as ``absurdctl init`` applies it, and a queue."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(absurdctl.BUNDLED_SCHEMA_SQL)
    async with client(dsn) as app:
        await app.create_queue()


# ---------------------------------------------------------------- steps a second


async def throughput(load: Load) -> list[float]:
    """Steps a second of a backlog."""
    await create(load.dsn)

    async def fill(tasks: int) -> None:
        async with await psycopg.AsyncConnection.connect(load.dsn) as transaction, client(transaction) as app:
            for _ in range(tasks):
                await app.spawn("stepping", {"steps": load.steps})

    return await worked_off(load, MODULE, ["worker", "--tuned"], fill, _ENDED)


async def start(load: Load) -> list[float]:
    """Tasks spawned a second, one by one. Nobody takes them."""
    await create(load.dsn)
    async with client(load.dsn) as app:
        for _ in range(WARM):
            await app.spawn("stepping", {"steps": 1})
        began = time.perf_counter()
        for _ in range(load.runs):
            await app.spawn("stepping", {"steps": 1})
        return [load.runs / (time.perf_counter() - began)]


# ---------------------------------------------------------------- how long things take


@asynccontextmanager
async def prompt(load: Load) -> AsyncIterator[AsyncAbsurd]:
    """A client, and in the background a worker that looks often."""
    await create(load.dsn)
    async with client(load.dsn) as app, worker(load.dsn, concurrency=load.in_flight, poll_interval=POLLING):
        yield app


async def _until(app: AsyncAbsurd, task: str, state: str, looking: float = LOOKING) -> Any:
    """Wait until a task is in that state. Returns its result. Raises RuntimeError if it has failed."""
    while (found := await app.fetch_task_result(task)) is None or found.state != state:
        if found is not None and found.state in ("failed", "cancelled"):
            raise RuntimeError(f"a task is {found.state}: {found.failure}")
        await asyncio.sleep(looking)
    return found.result


async def latency(load: Load) -> list[float]:
    """Milliseconds from spawning a task until a client sees that it has ended."""
    async with prompt(load) as app:

        async def once() -> float:
            began = time.perf_counter()
            task = await app.spawn("stepping", {"steps": load.steps})
            await _until(app, task["task_id"], "completed")
            return (time.perf_counter() - began) * 1e3

        return await warm_samples(once, load.samples)


async def signal(load: Load) -> list[float]:
    """Milliseconds from an event to the end of the task that waited for it, as its client sees it."""
    numbers = itertools.count()
    async with prompt(load) as app:

        async def once() -> float:
            event = f"go {next(numbers)}"
            task = await app.spawn("waiting", {"event": event})
            await _until(app, task["task_id"], "sleeping")
            await asyncio.sleep(RESTING)
            began = time.perf_counter()
            await app.emit_event(event, {"text": TEXT})
            await _until(app, task["task_id"], "completed")
            return (time.perf_counter() - began) * 1e3

        return await warm_samples(once, load.samples)


async def timer(load: Load) -> list[float]:
    """Milliseconds by which sleeps of 0.3 to 1.5 s have ended late, all of them at the same time."""
    chance = random.Random(17)
    async with prompt(load) as app:
        task = await app.spawn("napping", {"seconds": 0.3})
        await _until(app, task["task_id"], "completed")
        naps = [await app.spawn("napping", {"seconds": chance.uniform(0.3, 1.5)}) for _ in range(load.samples)]
        return [float(await _until(app, nap["task_id"], "completed", SELDOM)) for nap in naps]


async def takeover(load: Load) -> list[float]:
    """Seconds from the kill of the worker that executes a step until it begins in another one."""
    await create(load.dsn)
    async with client(load.dsn) as app:

        async def hang_in_a_worker(marker: str) -> None:
            await app.spawn("hanging", {"marker": marker})

        return await taken_over(load, MODULE, hang_in_a_worker)


async def idle(load: Load) -> list[float]:
    """Commits a second of a worker that has nothing to do."""
    await create(load.dsn)
    async with crew(MODULE, "worker", "--dsn", load.dsn) as workers:
        await workers.start_ready()
        return await commits_a_second(load)


CASES: Final[dict[str, Callable[[Load], Awaitable[list[float]]]]] = {
    **dict.fromkeys(("one_step", "ten_step", "fifty_step"), throughput),
    "start": start,
    **dict.fromkeys(("latency_1", "latency_10"), latency),
    "signal": signal,
    "timer": timer,
    "takeover": takeover,
    "idle": idle,
}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("absurd-sdk", "absurdctl", "psycopg")}


async def work(given: argparse.Namespace) -> None:
    """A worker process, which ends when its standard input does. `tuned`: not with all defaults, for steps a second."""
    tuned = {"concurrency": given.in_flight, "batch_size": BATCH, "poll_interval": POLLING}
    async with worker(given.dsn, **(tuned if given.tuned else {})):
        say("ready")
        await stdin_ended()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["worker"])
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--in-flight", type=int, default=Load("", 1, 1).in_flight)
    parser.add_argument("--tuned", action="store_true")
    asyncio.run(work(parser.parse_args()))
