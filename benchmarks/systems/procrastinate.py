"""procrastinate alone: a queue without workflows, so that a job is a run of one step, and there is no more."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.tasks import Task
from procrastinate.types import JSONDict

from benchmarks.idle import commits_a_second
from benchmarks.load import RESTING, TEXT, Load
from benchmarks.processes import crew, say, stdin_ended
from benchmarks.samples import WARMING

CONNECTIONS: Final = 40
SETTINGS: Final = (
    f"its documented defaults, async tasks, a worker with as much concurrency as runs in flight, a pool of up to "
    f"{CONNECTIONS} connections; a job is a run of one step, and its result is not stored; a job's latency is measured "
    "until its task has run, which the same process sees at once"
)
WARM: Final = 50
A_CALL: Final = 1_000
POLL: Final = 0.05

_AT_WORK: Final = "select exists (select from procrastinate_jobs where status in ('todo', 'doing'))"
_SUCCEEDED: Final = "select count(*) from procrastinate_jobs where status = 'succeeded'"


class Queue:
    """An app with one task, on a database that it has made its own."""

    def __init__(self, dsn: str) -> None:
        self.app = App(connector=PsycopgConnector(conninfo=dsn, max_size=CONNECTIONS))
        self.first: float | None = None  # when the first job began, by the clock of `time.perf_counter`
        self.ended: dict[int, asyncio.Event] = {}
        self.task: Task[Any, Any, Any] = self.app.task(name="step")(self._step)

    async def _step(self, number: int) -> dict[str, str]:
        if self.first is None:
            self.first = time.perf_counter()
        if number in self.ended:
            self.ended[number].set()
        return {"text": TEXT}

    async def start_many(self, count: int) -> None:
        """As many jobs as that, 1,000 in a call."""
        for begin in range(0, count, A_CALL):
            given: list[JSONDict] = [{"number": number} for number in range(begin, min(begin + A_CALL, count))]
            await self.task.batch_defer_async(*given)

    @asynccontextmanager
    async def worker(self, in_flight: int) -> AsyncIterator[None]:
        """A worker in the background of a block."""
        working = asyncio.create_task(self.app.run_worker_async(concurrency=in_flight, install_signal_handlers=False))
        try:
            yield
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


@asynccontextmanager
async def queue(dsn: str) -> AsyncIterator[Queue]:
    """One that is open, with its schema."""
    made = Queue(dsn)
    async with made.app.open_async():
        await made.app.schema_manager.apply_schema_async()
        yield made


async def throughput(load: Load) -> list[float]:
    """Jobs a second of a backlog, from the moment at which the first one begins."""
    async with (
        queue(load.dsn) as at,
        await psycopg.AsyncConnection.connect(load.dsn, autocommit=True) as connection,
    ):
        await at.start_many(WARM)
        async with at.worker(load.in_flight):
            await _until_done(connection)
        at.first = None
        await at.start_many(load.runs)
        async with at.worker(load.in_flight):
            await _until_done(connection)
            ended = time.perf_counter()
        succeeded = await _value(connection, _SUCCEEDED)
    if at.first is None or succeeded != WARM + load.runs:
        raise RuntimeError(f"{succeeded} of {WARM + load.runs} jobs have succeeded")
    return [load.runs / (ended - at.first)]


async def start(load: Load) -> list[float]:
    """Jobs deferred a second, one by one."""
    async with queue(load.dsn) as at:
        for number in range(WARM):
            await at.task.defer_async(number=number)
        began = time.perf_counter()
        for number in range(load.runs):
            await at.task.defer_async(number=number)
        return [load.runs / (time.perf_counter() - began)]


async def start_many(load: Load) -> list[float]:
    """Jobs deferred a second, many in a call."""
    async with queue(load.dsn) as at:
        await at.start_many(WARM)
        count = max(1, load.runs // A_CALL) * A_CALL
        began = time.perf_counter()
        await at.start_many(count)
        return [count / (time.perf_counter() - began)]


async def latency(load: Load) -> list[float]:
    """Milliseconds from the deferring of a job until it has run, one after the other, each after a rest. For the task
    tells of its end before the worker has finished the job, and of jobs that are deferred at that moment about one in
    ten was found to wait for the next poll, up to 5 s."""
    async with queue(load.dsn) as at, at.worker(load.in_flight):
        milliseconds = []
        for number in range(WARMING + load.samples):
            await asyncio.sleep(RESTING)
            ended = at.ended[number] = asyncio.Event()
            began = time.perf_counter()
            await at.task.defer_async(number=number)
            await ended.wait()
            milliseconds.append((time.perf_counter() - began) * 1e3)
        return milliseconds[WARMING:]


async def idle(load: Load) -> list[float]:
    """Commits a second of a worker that has nothing to do."""
    async with queue(load.dsn):
        pass
    async with crew(__spec__.name, "worker", "--dsn", load.dsn) as workers:
        await workers.start_ready()
        return await commits_a_second(load)


async def _until_done(connection: psycopg.AsyncConnection[Any]) -> None:
    while await _value(connection, _AT_WORK):  # noqa: ASYNC110 (only the database shows it)
        await asyncio.sleep(POLL)


async def _value(connection: psycopg.AsyncConnection[Any], query: str) -> Any:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None
    return row[0]


CASES: Final[dict[str, Callable[[Load], Awaitable[list[float]]]]] = {
    "one_step": throughput,
    "start": start,
    "start_many": start_many,
    "latency_1": latency,
    "idle": idle,
}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("procrastinate", "psycopg")}


async def work(dsn: str) -> None:
    """A worker, which ends when its standard input does."""
    at = Queue(dsn)
    async with at.app.open_async(), at.worker(Load("", 1, 1).in_flight):
        say("ready")
        await stdin_ended()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["worker"])
    parser.add_argument("--dsn", required=True)
    asyncio.run(work(parser.parse_args().dsn))
