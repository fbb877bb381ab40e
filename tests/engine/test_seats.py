"""A start in a process that is a worker with nothing else to do is taken up with its commit, without a fetch."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from procrastinate.jobs import Job
from tests.engine.kit import Ctx, Facts, an_app, soon, until, working

from durable import AsyncDurable, RunExists, Start, define
from durable.engine import recover
from durable.store import operations, read
from durable.store.flush import Flush
from durable.worker import Worker, serving
from durable.worker.serving import LastingWorker

HERE = Path(__file__)
WAITING = define("waiting").wait_for_signal("go", "go")


class Step:
    """Counts its runs, and ends when it is told to."""

    def __init__(self) -> None:
        self.began: list[Any] = []
        self.go_on = asyncio.Event()

    async def __call__(self, ctx: Ctx) -> str:
        self.began.append(ctx.input)
        await self.go_on.wait()
        return "done"


@pytest.fixture
def step() -> Step:
    return Step()


@asynccontextmanager
async def serving_app(dsn: str, step: Any, concurrency: int = 5) -> AsyncIterator[tuple[AsyncDurable, Worker]]:
    """An app with a worker that has looked into an empty queue."""
    async with an_app(dsn, define("w", input=Any).step("a", step)) as app, app.worker(concurrency) as worker:
        await until(lambda: rests(worker))
        yield app, worker


def rests(worker: Worker) -> bool:
    found = worker._queue_worker
    return found is not None and found._all_fetched and not found._new_job_event.is_set()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The ids of what any worker has fetched."""
    from durable.worker.jobs import LastingJobManager

    ids: list[int | None] = []
    exchange = LastingJobManager.exchange

    async def noted(self: LastingJobManager, *arguments: Any) -> list[Job] | None:
        found = await exchange(self, *arguments)
        ids.extend(job.id for job in found or ())
        return found

    monkeypatch.setattr(LastingJobManager, "exchange", noted)
    return ids


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LastingWorker, Job]]:
    """Jobs that were taken, and are begun when the test says so."""
    waiting: list[tuple[LastingWorker, Job]] = []
    monkeypatch.setattr(LastingWorker, "begin", lambda self, job: waiting.append((self, job)))
    return waiting


# ---------------------------------------------------------------- taken


async def test_it_begins_without_a_fetch(dsn: str, facts: Facts, step: Step, fetched: list[int | None]) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert fetched == []
    assert step.began == [1]
    facts.check_rest()


async def test_nobody_else_fetches_it_meanwhile(
    dsn: str, facts: Facts, step: Step, begun: list[tuple[LastingWorker, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        run = await app.start("w", 1)
        ((worker, job),) = begun
        (row,) = facts.jobs(run)
        assert (row["id"], row["status"], row["worker_id"]) == (job.id, "doing", worker._manager.worker)
        async with working(dsn, define("w", input=Any).step("a", step)) as other:
            assert await other.fetch() is None
        monkeypatch.undo()
        worker.begin(job)
        assert await run.result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert step.began == [1]


async def test_a_start_that_is_repeated_is_performed_once(dsn: str, facts: Facts, step: Step) -> None:
    async with serving_app(dsn, step) as (app, worker):
        runs = [await app.start("w", 1, key="k") for _ in range(3)]
        with pytest.raises(RunExists):
            await app.start("w", 2, key="k")
        await until(lambda: rests(worker))
        assert len(facts.jobs()) == 1
        step.go_on.set()
        assert [await run.result(timeout=30) for run in runs] == [{"a": "done"}] * 3
    assert step.began == [1]
    facts.check_rest()


async def test_a_signal_is_answered_without_a_fetch(dsn: str, facts: Facts, fetched: list[int | None]) -> None:
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.run(run)["waiting_for"] == "signal")
        await until(lambda: rests(worker))
        fetched.clear()
        assert await run.signal("go", 7)
        assert await run.result(timeout=30) == {"go": 7}
        await until(lambda: facts.jobs() == [])
    assert fetched == []
    facts.check_rest()


async def test_a_start_whose_answer_was_lost_is_performed(
    dsn: str, facts: Facts, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is in the name of a worker that does not know of it."""
    execute, lost = operations.execute_own, list[str]()

    async def losing(query: Any, connection: Any) -> Any:
        found = await execute(query, connection)
        if query.params.get("worker") is not None and not lost:
            lost.append("the answer")
            await connection.close()
            raise psycopg.OperationalError("the connection is lost")
        return found

    monkeypatch.setattr(operations, "execute_own", losing)
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert lost
    assert step.began == [1]
    facts.check_rest()


# ---------------------------------------------------------------- not taken


async def test_a_doorbell_of_another_queue_goes_there(
    dsn: str, facts: Facts, step: Step, begun: list[tuple[LastingWorker, Job]]
) -> None:
    async with an_app(dsn, WAITING, queue="elsewhere") as elsewhere:
        run = await elsewhere.start("waiting")
        (first,) = facts.jobs()
        async with serving_app(dsn, step) as (app, _):
            assert await app.signal(run.id, "go", 7)
            _, ring = facts.jobs()
            assert (first["queue_name"], ring["queue_name"], ring["status"]) == ("elsewhere", "elsewhere", "todo")
            assert begun == []


async def test_there_are_never_more_than_the_worker_may_have(dsn: str, facts: Facts, step: Step) -> None:
    async with serving_app(dsn, step, concurrency=2) as (app, _):
        runs = await asyncio.gather(*(app.start("w", number) for number in range(5)))
        await until(lambda: len(step.began) == 2)
        await until(lambda: sorted(job["status"] for job in facts.jobs()) == ["doing"] * 2 + ["todo"] * 3)
        assert len(step.began) == 2
        step.go_on.set()
        for run in runs:
            assert await run.result(timeout=30) == {"a": "done"}
    assert sorted(step.began) == [0, 1, 2, 3, 4]
    facts.check_rest()


async def test_what_does_not_begin_now_goes_through_the_queue(
    dsn: str, facts: Facts, step: Step, begun: list[tuple[LastingWorker, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any) -> list[Job]:
        return []

    async with serving_app(dsn, step) as (app, worker):
        monkeypatch.setattr(worker._queue_worker._manager, "exchange", nothing)  # type: ignore[union-attr]
        later = await app.start("w", 1, delay=3600)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            await app.start("w", 2, connection=connection)
        await app.start_many("w", [Start(3)])
        assert begun == []
        assert facts.jobs(later) == []
        assert [job["status"] for job in facts.jobs()] == ["todo"] * 2


async def test_a_worker_that_stops_takes_no_more(dsn: str, facts: Facts, step: Step) -> None:
    async with serving_app(dsn, step) as (app, worker):
        await app.start("w", 1)
        await until(lambda: step.began == [1])
        worker.stop()
        later = await app.start("w", 2)
        assert [job["status"] for job in facts.jobs(later)] == ["todo"]
        step.go_on.set()
    assert step.began == [1]
    assert [job["status"] for job in facts.jobs()] == ["todo"]


async def test_an_end_waits_for_a_start_that_is_on_its_way(
    dsn: str, facts: Facts, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job would be in the name of a worker that has gone."""
    step.go_on.set()
    async with serving_app(dsn, step) as (app, worker):
        seat = worker._queue_worker.seat()  # type: ignore[union-attr]
        assert seat is not None
        worker.stop()
        with seat:
            run = await app.start("w", 1)
            facts.execute("update durable.procrastinate_jobs set status = 'doing', worker_id = %s", seat.worker)
            (job,) = facts.jobs(run)
            seat.take(job["id"], app.queue, job["task_name"], job["args"])
    assert step.began == [1]
    facts.check_rest()


async def test_a_worker_that_the_queue_has_forgotten(dsn: str, facts: Facts, step: Step) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, worker):
        facts.execute("delete from durable.procrastinate_workers")
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        assert worker._queue_worker._seats == 0  # type: ignore[union-attr]
    assert step.began == [1]


async def test_a_start_that_fails_gives_its_slot_back(
    dsn: str, facts: Facts, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    step.go_on.set()
    async with serving_app(dsn, step, concurrency=1) as (app, worker):
        facts.execute("alter table durable.runs add constraint odd check (key <> 'odd')")
        with pytest.raises(Exception, match="odd"):
            await app.start("w", 1, key="odd")
        assert worker._queue_worker._seats == 0  # type: ignore[union-attr]
        monkeypatch.setattr(serving, "POLLING", 3600.0)
        assert await (await app.start("w", 2)).result(timeout=30) == {"a": "done"}
    assert step.began == [2]


# ---------------------------------------------------------------- a crash


KILLED = """
import asyncio, os, signal, sys
from durable import AsyncDurable, define
from durable.worker.serving import Seat

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with AsyncDurable(sys.argv[1], workflows=[define("w").step("a", lambda ctx: ctx.attempt)]) as app:
        async with app.worker() as worker:
            while not worker._queue_worker or not worker._queue_worker._all_fetched:
                await asyncio.sleep(0.01)
            Seat.take = die
            await app.start("w")

asyncio.run(main())
"""


async def test_a_kill_between_the_commit_and_the_begin(dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "STOOD", 0.1)
    arguments = [sys.executable, "-c", KILLED, dsn]
    killed = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (job,) = facts.jobs()
    assert job["status"] == "doing"
    (run,) = facts.rows("select * from durable.runs")
    assert run["status"] == "pending"
    async with an_app(dsn, define("w").step("a", lambda ctx: ctx.attempt)) as app, app.worker():
        await soon(app.result(run["id"], timeout=30))
        await until(lambda: facts.jobs() == [])
    assert facts.journal(run["id"]) == ["a"]
    facts.check_rest()


# ---------------------------------------------------------------- its result


async def test_it_is_registered_for_before_it_is_read(dsn: str, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is committed in between: an end that was not seen is told."""
    flushes: list[list[str]] = []
    add = Flush.add

    def noted(self: Flush, statement: Any, *values: Any) -> Any:
        if not self._queued:
            flushes.append([])
        flushes[-1].append(statement.decode())
        return add(self, statement, *values)

    async with serving_app(dsn, step) as (app, _):
        run = await app.start("w", 1)
        await until(lambda: step.began)
        monkeypatch.setattr(Flush, "add", noted)
        result = asyncio.create_task(run.result(timeout=30))
        looked = str(read.statements(app.schema).outcome, "utf-8")
        await until(lambda: [flush for flush in flushes if looked in flush])
        (first, *_) = [flush for flush in flushes if looked in flush]
        assert (first[0], first[2], first[3]) == (app.store.sql.begin.decode(), "commit", looked)
        assert "waiters" in first[1]
        step.go_on.set()
        assert await result == {"a": "done"}
