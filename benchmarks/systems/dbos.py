"""DBOS Transact: workflows run in the process that starts them, or in one that takes them from a queue."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import random
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy
from dbos import DBOS, DBOSClient, DBOSConfig, EnqueueOptions

from benchmarks.backlog import WARM, worked_off
from benchmarks.idle import commits_a_second
from benchmarks.load import RESTING, TEXT, Load
from benchmarks.processes import crew, say
from benchmarks.samples import WARMING
from benchmarks.systems._peers import first_to_begin, taken_over

SETTINGS: Final = (
    "sync workflows and steps (async ones were slower), `pool_pre_ping` off in `db_engine_kwargs`, other defaults; "
    "ten and fifty steps, latencies, signal and timer with `start_workflow` in one process, without a queue; one step "
    "through a queue with `worker_concurrency` as many as runs in flight and `polling_interval_sec` 0.02; `idle` and "
    "`takeover` with all defaults, a queue that is polled once a second, and an executor id for each process, without "
    "Conductor"
)
MODULE: Final = __spec__.name
QUEUE: Final = "backlog"
NAME: Final = "benchmark"
STEPPING: Final[EnqueueOptions] = {"workflow_name": "stepping", "queue_name": QUEUE}
POLLING: Final = 0.02
"""Seconds between two looks into the queue: of 0.001 to 0.2, with what it did most runs a second."""

_ENDED: Final = "select count(*), max(completed_at) / 1000.0 from dbos.workflow_status where status = 'SUCCESS'"


# ---------------------------------------------------------------- workflows

WAITS: Final = threading.Event()
"""In this process, a workflow is about to wait for its message."""


def _nothing() -> dict[str, str]:
    return {"text": TEXT}


def _hang(marker: str) -> None:
    if first_to_begin(marker):
        threading.Event().wait()


nothing: Final = DBOS.step(name="nothing")(_nothing)
hang: Final = DBOS.step(name="hang")(_hang)


def _stepping(steps: int) -> None:
    for _ in range(steps):
        nothing()


def _waiting() -> Any:
    WAITS.set()
    return DBOS.recv("go")


def _napping(seconds: float) -> float:
    """Milliseconds by which the sleep has ended late."""
    due = time.time() + seconds
    DBOS.sleep(seconds)
    return (time.time() - due) * 1e3


def _hanging(marker: str) -> None:
    hang(marker)


stepping: Final = DBOS.workflow(name="stepping")(_stepping)
waiting: Final = DBOS.workflow(name="waiting")(_waiting)
napping: Final = DBOS.workflow(name="napping")(_napping)
hanging: Final = DBOS.workflow(name="hanging")(_hanging)


@contextmanager
def launched(dsn: str, *, queues: Sequence[str] = (), tuned: bool = True) -> Iterator[None]:
    """DBOS in this process, which takes runs from these queues. `tuned`: not with all defaults."""
    config: DBOSConfig = {
        "name": NAME,
        "system_database_url": dsn,
        "executor_id": str(uuid.uuid4()),
        "log_level": "WARNING",
    }
    if tuned:
        config["db_engine_kwargs"] = {"pool_pre_ping": False}
    DBOS(config=config)
    DBOS.listen_queues(queues)
    DBOS.launch()
    try:
        yield
    finally:
        DBOS.destroy()


@contextmanager
def client(dsn: str) -> Iterator[tuple[DBOSClient, sqlalchemy.Engine]]:
    """One that puts runs into the queue, and its engine, tuned as the other."""
    engine = sqlalchemy.create_engine(sqlalchemy.make_url(dsn).set(drivername="postgresql+psycopg"))
    made = DBOSClient(system_database_engine=engine, application_name=NAME)
    try:
        yield made, engine
    finally:
        made.destroy()
        engine.dispose()


# ---------------------------------------------------------------- steps a second


async def queued(load: Load) -> list[float]:
    """Steps a second of a backlog in a queue."""
    await asyncio.to_thread(_register, load.dsn, worker_concurrency=load.in_flight, polling_interval_sec=POLLING)

    async def fill(runs: int) -> None:
        await asyncio.to_thread(_fill, load, runs)

    return await worked_off(load, MODULE, ["worker", "--tuned"], fill, _ENDED)


def _fill(load: Load, runs: int) -> None:
    with client(load.dsn) as (to, engine), engine.begin() as transaction:
        for _ in range(runs):
            to.enqueue_in_transaction(transaction, STEPPING, load.steps)


def _register(dsn: str, **settings: Any) -> None:
    """Create DBOS's tables and a queue."""
    with launched(dsn):
        DBOS.register_queue(QUEUE, **settings)


async def in_process(load: Load) -> list[float]:
    """Steps a second of runs that are executed by the processes that start them, each its share."""
    arguments = ["inside", "--dsn", load.dsn, "--in-flight", str(load.in_flight)]
    share = max(1, load.runs // load.processes)
    arguments += ["--steps", str(load.steps), "--runs", str(share)]
    await asyncio.to_thread(_register, load.dsn)
    async with crew(MODULE, *arguments) as workers:
        started = await workers.start_ready(load.processes)
        began = time.perf_counter()
        for worker in started:
            worker.tell("begin")
        for _ in started:
            await workers.next("done", limit=300)
        seconds = time.perf_counter() - began
    return [share * load.processes * load.steps / seconds]


def _work_inside(given: argparse.Namespace) -> None:
    """A worker process: once it is warm, and told to, it does all its runs, and says so."""
    with launched(given.dsn):
        _run(min(WARM, given.runs), given.steps, given.in_flight)
        say("ready")
        sys.stdin.readline()
        _run(given.runs, given.steps, given.in_flight)
        say("done")
        sys.stdin.read()


def _run(runs: int, steps: int, in_flight: int) -> None:
    """So many runs, so many of them at a time."""
    at_work = deque[Any]()
    for _ in range(runs):
        if len(at_work) == in_flight:
            at_work.popleft().get_result()
        at_work.append(DBOS.start_workflow(stepping, steps))
    for handle in at_work:
        handle.get_result()


# ---------------------------------------------------------------- starting


async def start(load: Load) -> list[float]:
    """Runs put into a queue a second, one by one, by a client. Nobody takes them."""
    return await asyncio.to_thread(_start, load)


def _start(load: Load) -> list[float]:
    _register(load.dsn)
    with client(load.dsn) as (to, _):
        for _ in range(WARM):
            to.enqueue(STEPPING, 1)
        began = time.perf_counter()
        for _ in range(load.runs):
            to.enqueue(STEPPING, 1)
        return [load.runs / (time.perf_counter() - began)]


# ---------------------------------------------------------------- how long things take


def _measured(once: Callable[[Load], float]) -> Callable[[Load], Awaitable[list[float]]]:
    """A case of single values, one after the other, once it is warm."""

    def all_of_them(load: Load) -> list[float]:
        with launched(load.dsn):
            return [_rested(once, load) for _ in range(WARMING + load.samples)][WARMING:]

    return lambda load: asyncio.to_thread(all_of_them, load)


def _rested(once: Callable[[Load], float], load: Load) -> float:
    time.sleep(RESTING)
    return once(load)


def _latency(load: Load) -> float:
    """Milliseconds from start to result."""
    began = time.perf_counter()
    DBOS.start_workflow(stepping, load.steps).get_result()
    return (time.perf_counter() - began) * 1e3


def _signal(load: Load) -> float:
    """Milliseconds from a message to the end of the run that waited for it."""
    WAITS.clear()
    run = DBOS.start_workflow(waiting)
    WAITS.wait()
    time.sleep(RESTING)
    began = time.perf_counter()
    DBOS.send(run.workflow_id, {"text": TEXT}, "go")
    run.get_result()
    return (time.perf_counter() - began) * 1e3


async def timer(load: Load) -> list[float]:
    """Milliseconds by which sleeps of 0.3 to 1.5 s have ended late, all of them at the same time."""
    return await asyncio.to_thread(_timer, load)


def _timer(load: Load) -> list[float]:
    chance = random.Random(17)
    with launched(load.dsn):
        DBOS.start_workflow(napping, 0.3).get_result()
        naps = [DBOS.start_workflow(napping, chance.uniform(0.3, 1.5)) for _ in range(load.samples)]
        return [float(nap.get_result()) for nap in naps]


async def takeover(load: Load) -> list[float]:
    """Seconds from the kill of the worker that executes a step until it begins in another one."""
    await asyncio.to_thread(_register, load.dsn)

    async def hang_in_a_worker(marker: str) -> None:
        await asyncio.to_thread(_enqueue_hanging, load.dsn, marker)

    return await taken_over(load, MODULE, hang_in_a_worker)


def _enqueue_hanging(dsn: str, marker: str) -> None:
    with client(dsn) as (to, _):
        to.enqueue({"workflow_name": "hanging", "queue_name": QUEUE}, marker)


async def idle(load: Load) -> list[float]:
    """Commits a second of a worker that has nothing to do."""
    await asyncio.to_thread(_register, load.dsn)
    async with crew(MODULE, "worker", "--dsn", load.dsn) as workers:
        await workers.start_ready()
        return await commits_a_second(load)


def _work(given: argparse.Namespace) -> None:
    """A worker process, which ends when its standard input does."""
    with launched(given.dsn, queues=[QUEUE], tuned=given.tuned):
        say("ready")
        sys.stdin.read()


CASES: Final[dict[str, Callable[[Load], Awaitable[list[float]]]]] = {
    "one_step": queued,
    "ten_step": in_process,
    "fifty_step": in_process,
    "start": start,
    "latency_1": _measured(_latency),
    "latency_10": _measured(_latency),
    "signal": _measured(_signal),
    "timer": timer,
    "takeover": takeover,
    "idle": idle,
}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("dbos", "psycopg", "sqlalchemy")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["worker", "inside"])
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--in-flight", type=int, default=Load("", 1, 1).in_flight)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1)
    asked = parser.parse_args()
    (_work if asked.command == "worker" else _work_inside)(asked)
