"""The cases of durable, for workflows written in either way: a builder's and a function's differ in nothing else."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import random
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.backlog import WARM, worked_off
from benchmarks.idle import commits_a_second
from benchmarks.load import RESTING, TEXT, Load
from benchmarks.processes import Crew, crew, say, stdin_ended
from benchmarks.samples import warm_samples
from durable import AsyncDurable, AsyncRun, Start
from durable.define.registry import AnyWorkflow
from durable.worker import Worker
from durable.working import in_background, until_started

IN_FLIGHT: Final = Load("", 1, 1).in_flight
"""With as many, everything has its default."""
A_CALL: Final = 1_000
"""Runs that are started in one call."""
POLL: Final = 0.05
"""Seconds between two looks at whether all is done."""
SETTLED: Final = 4.0
"""Seconds that a worker has been there before another one is killed: it takes over from one that it has known."""

DEFAULTS: Final = "default settings of AsyncDurable and of a worker as `durable worker` runs it, async handlers"

# Partly the condition of an index, so that it stays cheap on a large table: runs that could go on now.
_AT_WORK: Final = """
    select exists (
        select from durable.runs
        where status in ('pending', 'running', 'compensating') and waiting_for is null and id between %s and %s
    )
"""
_ENDED: Final = """
    select count(*), extract(epoch from max(finished_at)) from durable.runs
    where status = 'completed' and created_at >= '{since}'
"""
_WAITS: Final = "select waiting_for is not null from durable.runs where id = %s"


# ---------------------------------------------------------------- handlers


async def nothing() -> dict[str, str]:
    return {"text": TEXT}


LATE: Final[list[float]] = []
"""Milliseconds by which sleeps have ended late, in this process."""


async def due_in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def woke(due: datetime) -> None:
    LATE.append((datetime.now(UTC) - due) / timedelta(milliseconds=1))


async def hang_once(marker: str) -> None:
    """Says that it has begun, and never ends in the first process that comes here."""
    say(f"begun {time.time()}")
    try:
        Path(marker).touch(exist_ok=False)  # noqa: ASYNC240 (an empty file)
    except FileExistsError:
        return
    await asyncio.Event().wait()


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Kind:
    """The workflows of the cases, as a builder or as functions.

    - `module`: by whose ``python -m`` worker processes are started.
    - `steps`: makes the one of so many steps; its input is ``{"steps": so many}``.
    - `waiting`: takes the signal ``go``. `napping`: ``due_in``, a sleep until then, ``woke``; its input is
      ``{"seconds": ...}``. `hanging`: ``hang_once``; its input is ``{"marker": path}``.
    """

    module: str
    steps: Callable[[int], AnyWorkflow]
    waiting: AnyWorkflow
    napping: AnyWorkflow
    hanging: AnyWorkflow

    def cases(self) -> dict[str, Callable[[Load], Awaitable[list[float]]]]:
        return {
            **dict.fromkeys(("one_step", "ten_step", "fifty_step"), self.throughput),
            "start": self.start,
            "start_many": self.start_many,
            **dict.fromkeys(("latency_1", "latency_10"), self.latency),
            "signal": self.signal,
            "timer": self.timer,
            "takeover": self.takeover,
            "idle": self.idle,
        }

    def app(self, dsn: str, steps: int = 1) -> AsyncDurable:
        workflows = [self.steps(steps), self.waiting, self.napping, self.hanging]
        return AsyncDurable(dsn, workflows=workflows, auto_migrate=True)

    # -- steps a second

    async def throughput(self, load: Load) -> list[float]:
        """Steps a second of a backlog."""
        async with self.app(load.dsn, load.steps) as app:
            await app.connect()
            since: datetime = await _value(app, "select clock_timestamp()")

            async def fill(runs: int) -> None:
                async with await psycopg.AsyncConnection.connect(load.dsn) as connection:
                    await self._start_many(app, load.steps, runs, connection)

            arguments = ["worker", "--steps", str(load.steps)]
            return await worked_off(load, self.module, arguments, fill, _ENDED.format(since=since.isoformat()))

    def crew(self, *arguments: str) -> AbstractAsyncContextManager[Crew]:
        return crew(self.module, "worker", *arguments)

    async def start_all(self, app: AsyncDurable, load: Load) -> list[AsyncRun[Any]]:
        """As many runs as the load says, in calls of 1,000; returns them in order."""
        return await self._start_many(app, load.steps, load.runs)

    async def _start_many(
        self, app: AsyncDurable, steps: int, count: int, connection: psycopg.AsyncConnection[Any] | None = None
    ) -> list[AsyncRun[Any]]:
        workflow, runs = self.steps(steps), list[AsyncRun[Any]]()
        while (left := count - len(runs)) > 0:
            given = [Start({"steps": steps})] * min(A_CALL, left)
            runs += await app.start_many(workflow, given, connection=connection)
        return runs

    # -- starting

    async def start(self, load: Load) -> list[float]:
        """Runs started a second, one by one."""
        async with self.app(load.dsn) as app:
            workflow = self.steps(1)
            for _ in range(WARM):
                await app.start(workflow, {"steps": 1})
            began = time.perf_counter()
            for _ in range(load.runs):
                await app.start(workflow, {"steps": 1})
            return [load.runs / (time.perf_counter() - began)]

    async def start_many(self, load: Load) -> list[float]:
        """Runs started a second, many in a call."""
        async with self.app(load.dsn) as app:
            workflow = self.steps(1)
            await app.start_many(workflow, [Start({"steps": 1})] * WARM)
            calls = max(1, load.runs // A_CALL)
            began = time.perf_counter()
            for _ in range(calls):
                await app.start_many(workflow, [Start({"steps": 1})] * A_CALL)
            return [calls * A_CALL / (time.perf_counter() - began)]

    # -- how long things take

    async def latency(self, load: Load) -> list[float]:
        """Milliseconds from start to result."""
        workflow, given = self.steps(load.steps), {"steps": load.steps}
        async with self.app(load.dsn, load.steps) as app, worker(app, load.in_flight):

            async def once() -> float:
                began = time.perf_counter()
                await (await app.start(workflow, given)).result()
                return (time.perf_counter() - began) * 1e3

            return await warm_samples(once, load.samples)

    async def signal(self, load: Load) -> list[float]:
        """Milliseconds from a signal to the end of the run that waited for it, as its client sees it."""
        async with self.app(load.dsn) as app, worker(app, load.in_flight):

            async def once() -> float:
                run = await app.start(self.waiting, {})
                result = asyncio.create_task(run.result())
                await until_waiting(app, run)
                began = time.perf_counter()
                await run.signal("go", {"text": TEXT})
                await result
                return (time.perf_counter() - began) * 1e3

            return await warm_samples(once, load.samples)

    async def timer(self, load: Load) -> list[float]:
        """Milliseconds by which sleeps of 0.3 to 1.5 s have ended late, all of them at the same time."""
        chance = random.Random(17)
        async with self.app(load.dsn) as app, worker(app, load.in_flight):
            await (await app.start(self.napping, {"seconds": 0.3})).result()
            LATE.clear()
            naps = [Start({"seconds": chance.uniform(0.3, 1.5)}) for _ in range(load.samples)]
            for run in await app.start_many(self.napping, naps):
                await run.result()
        return list(LATE)

    async def takeover(self, load: Load) -> list[float]:
        """Seconds from the kill of the worker that executes a step until it begins in another one. It is killed up to
        three seconds after the step has begun: short steps and long ones are held in different ways."""
        chance = random.Random(17)
        async with self.app(load.dsn) as app, self.crew("--dsn", load.dsn) as workers:
            await app.migrate()
            await workers.start_ready(2)
            seconds = []
            with tempfile.TemporaryDirectory() as folder:
                for number in range(load.samples):
                    await asyncio.sleep(SETTLED)
                    run = await app.start(self.hanging, {"marker": f"{folder}/{number}"})
                    victim, _ = await workers.next("begun")
                    await asyncio.sleep(chance.uniform(0.0, 3.0))
                    killed = victim.kill()
                    _, begun = await workers.next("begun")
                    seconds.append(float(begun) - killed)
                    await run.result()
                    if number + 1 < load.samples:
                        await workers.start_ready()
        return seconds

    async def idle(self, load: Load) -> list[float]:
        """Commits a second of a worker that has nothing to do."""
        async with self.app(load.dsn) as app:
            await app.migrate()
        async with self.crew("--dsn", load.dsn) as workers:
            await workers.start_ready()
            return await commits_a_second(load)

    # -- a worker process

    def main(self) -> None:
        """``python -m MODULE worker --dsn DSN``: a worker, which ends when its standard input does."""
        parser = argparse.ArgumentParser()
        parser.add_argument("command", choices=["worker"])
        parser.add_argument("--dsn", required=True)
        parser.add_argument("--steps", type=int, default=1)
        parser.add_argument("--in-flight", type=int, default=IN_FLIGHT)
        given = parser.parse_args()
        load = Load(given.dsn, 1, given.steps, given.in_flight)
        asyncio.run(self._work(load))

    async def _work(self, load: Load) -> None:
        async with self.app(load.dsn, load.steps) as app, worker(app, load.in_flight):
            say("ready")
            await stdin_ended()


@asynccontextmanager
async def worker(app: AsyncDurable, in_flight: int) -> AsyncIterator[None]:
    """What ``durable worker`` runs, in the background of a block. As many in flight as is usual: its own default."""
    hand = Worker(app, dedicated=True) if in_flight == IN_FLIGHT else Worker(app, concurrency=in_flight, dedicated=True)
    working = in_background(hand)
    try:
        await until_started(hand, working)
        yield
    finally:
        hand.stop()
        await working


def versions() -> dict[str, str]:
    return {name: _version(name) for name in ("durable", "psycopg", "procrastinate", "pydantic")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from its source"


async def until_waiting(app: AsyncDurable, run: AsyncRun[Any]) -> None:
    """Until a run waits for something, and nobody does anything."""
    while not await _value(app, _WAITS, run.id):  # noqa: ASYNC110 (only the database shows it)
        await asyncio.sleep(0.005)
    await asyncio.sleep(RESTING)


async def until_done(app: AsyncDurable, runs: list[AsyncRun[Any]]) -> None:
    """Until none of these runs can go on."""
    while await _value(app, _AT_WORK, *_span(runs)):  # noqa: ASYNC110 (only the database shows it)
        await asyncio.sleep(POLL)


def _span(runs: list[AsyncRun[Any]]) -> tuple[uuid.UUID, uuid.UUID]:
    """Ids are given in order, and nobody else starts runs meanwhile."""
    return min(run.id for run in runs), max(run.id for run in runs)


async def _value(app: AsyncDurable, query: str, *given: object) -> Any:
    async with app.pool.connection() as connection:
        row = await (await connection.execute(query.encode(), given)).fetchone()
    assert row is not None
    return row[0]


if sys.platform == "win32":
    raise RuntimeError("the measurements need processes that can be killed: Linux or macOS")
