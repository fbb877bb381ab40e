"""A start in a process that is a worker with nothing else to do is taken up with its commit, without a fetch."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from procrastinate.jobs import Job
from tests.engine.kit import Facts, Held, an_app, note_flushes, soon, until, working

from durable import AsyncDurable, Context, PayloadError, RunExists, Start, define, workflow
from durable.engine import engine as engine_module
from durable.engine import recover
from durable.engine.hold import Hold, write_and_take
from durable.store import read
from durable.worker import Worker, serving, takeup
from durable.worker.serving import LastingWorker

HERE = Path(__file__)
WAITING = define("waiting").wait_for_signal("go", "go")


@pytest.fixture
def step() -> Held:
    return Held("done")


@workflow
async def continuing(ctx: Context, n: int) -> Any:
    if n == 0:
        ctx.continue_as_new(1)
    (message,) = await ctx.receive("go")
    return message.body


@asynccontextmanager
async def serving_app(dsn: str, step: Any, concurrency: int = 5) -> AsyncIterator[tuple[AsyncDurable, Worker]]:
    """An app with a worker that has looked into an empty queue."""
    async with an_app(dsn, define("w", input=Any).step("a", step)) as app, app.worker(concurrency) as worker:
        await until(lambda: rests(worker))
        yield app, worker


def rests(worker: Worker) -> bool:
    found = worker._queue_worker
    return found is not None and found._all_fetched and not found._new_job_event.is_set()


async def check_given_back(app: AsyncDurable, worker: Worker) -> None:
    """Nothing is kept for what was not taken up, or is over."""
    assert worker._queue_worker is not None
    assert worker._engine is not None
    assert worker._queue_worker._seats == 0
    assert worker._engine.slots.free == app.options.pool_size - 2
    stats = worker._engine.pool.get_stats
    await until(lambda: stats()["pool_available"] == stats()["pool_size"] > 0)


def fetch_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the queue stays there."""

    async def nothing(*_: Any) -> list[Job]:
        return []

    assert worker._queue_worker is not None
    monkeypatch.setattr(worker._queue_worker._manager, "exchange", nothing)


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
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], LastingWorker]]:
    """Jobs that were taken: each is begun when the test calls it, which says by whom."""
    waiting: list[Callable[[], LastingWorker]] = []
    begin = LastingWorker.begin

    def noted(self: LastingWorker, job: Job, **more: Any) -> None:
        def begin_now() -> LastingWorker:
            begin(self, job, **more)
            return self

        waiting.append(begin_now)

    monkeypatch.setattr(LastingWorker, "begin", noted)
    return waiting


# ---------------------------------------------------------------- taken


async def test_it_begins_without_a_fetch(dsn: str, facts: Facts, step: Held, fetched: list[int | None]) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert fetched == []
    assert step.began == [1]
    facts.check_rest()


async def test_a_start_is_committed_and_its_run_locked_in_one_flush(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_app(dsn, step) as (app, _):
        flushes = note_flushes(monkeypatch)
        run = await app.start("w", 1)
        await until(lambda: step.began)
        assert not facts.free(run)
        step.go_on.set()
        assert await run.result(timeout=30) == {"a": "done"}
        (taken,) = [flush for flush in flushes if "start_run(" in "".join(flush)]
        check_one_flush(app, taken, flushes)


async def test_a_message_is_committed_and_its_run_locked_in_one_flush(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.run(run)["waiting_for"] == "signal")
        await until(lambda: rests(worker))
        flushes = note_flushes(monkeypatch)
        assert await run.signal("go", 7)
        assert await run.result(timeout=30) == {"go": 7}
        (taken,) = [flush for flush in flushes if "post_message(" in "".join(flush)]
        check_one_flush(app, taken, flushes)


def check_one_flush(app: AsyncDurable, taken: list[str], flushes: list[list[str]]) -> None:
    """And nobody else has locked a run."""
    sql = app.store.sql
    expected = [sql.begin, sql.commit_and_begin, sql.lock_free, sql.inbox, sql.journal]
    assert [taken[0], *taken[2:]] == [statement.decode() for statement in expected]
    locks = {sql.lock.decode(), sql.lock_free.decode()}
    assert [flush for flush in flushes if locks & set(flush)] == [taken]


async def test_nobody_else_fetches_it_meanwhile(
    dsn: str, facts: Facts, step: Held, begun: list[Callable[[], LastingWorker]]
) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        run = await app.start("w", 1)
        (row,) = facts.jobs(run)
        assert row["status"] == "doing"
        async with working(dsn, define("w", input=Any).step("a", step)) as other:
            assert await other.fetch() is None
        (begin,) = begun
        assert begin()._manager.worker == row["worker_id"]
        assert await run.result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert step.began == [1]


async def test_a_start_that_is_repeated_is_performed_once(dsn: str, facts: Facts, step: Held) -> None:
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
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is in the name of a worker that does not know of it."""
    lost: list[str] = []

    async def losing(*arguments: Any) -> Any:
        answer, hold = await write_and_take(*arguments)
        if not lost:
            lost.append("the answer")
            assert hold is not None
            await hold.discard()
            raise psycopg.OperationalError("the connection is lost")
        return answer, hold

    monkeypatch.setattr(takeup, "write_and_take", losing)
    step.go_on.set()
    async with serving_app(dsn, step) as (app, _):
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert lost
    assert step.began == [1]
    facts.check_rest()


async def test_the_server_has_closed_the_idle_connections(dsn: str, facts: Facts) -> None:
    """A signal without an id may be sent only once: it must not go out on a connection that is dead."""
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.run(run)["waiting_for"] == "signal")
        await until(lambda: rests(worker))
        assert facts.terminate("durable worker%") > 0
        assert await run.signal("go", 7)
        assert await run.result(timeout=30) == {"go": 7}
        assert facts.inbox(run) == [("signal", "go", "taken")]
        await until(lambda: facts.jobs() == [])
    facts.check_rest()


# ---------------------------------------------------------------- not taken


async def test_a_doorbell_of_another_queue_goes_there(
    dsn: str, facts: Facts, step: Held, begun: list[Callable[[], LastingWorker]]
) -> None:
    async with an_app(dsn, WAITING, queue="elsewhere") as elsewhere:
        run = await elsewhere.start("waiting")
        (first,) = facts.jobs()
        async with serving_app(dsn, step) as (app, _):
            assert await app.signal(run.id, "go", 7)
            _, ring = facts.jobs()
            assert (first["queue_name"], ring["queue_name"], ring["status"]) == ("elsewhere", "elsewhere", "todo")
            assert begun == []


async def test_there_are_never_more_than_the_worker_may_have(dsn: str, facts: Facts, step: Held) -> None:
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
    dsn: str, facts: Facts, step: Held, begun: list[Callable[[], LastingWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_app(dsn, step) as (app, worker):
        fetch_nothing(worker, monkeypatch)
        later = await app.start("w", 1, delay=3600)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            await app.start("w", 2, connection=connection)
        await app.start_many("w", [Start(3)])
        assert begun == []
        assert facts.jobs(later) == []
        assert [job["status"] for job in facts.jobs()] == ["todo"] * 2


async def test_without_a_free_slot_it_goes_through_the_queue(
    dsn: str, facts: Facts, step: Held, begun: list[Callable[[], LastingWorker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is for who holds a connection while user code runs: there are fewer than a worker may have jobs."""
    app = an_app(dsn, define("w", input=Any).step("a", step), pool_size=3)
    async with app, app.worker() as worker:
        await until(lambda: rests(worker))
        first = await app.start("w", 1)
        begun.pop()()
        await until(lambda: step.began == [1])
        with monkeypatch.context() as patch:
            fetch_nothing(worker, patch)
            later = await app.start("w", 2)
            assert begun == []
            assert [job["status"] for job in facts.jobs(later)] == ["todo"]
        monkeypatch.undo()
        step.go_on.set()
        worker.nudge()
        assert [await run.result(timeout=30) for run in (first, later)] == [{"a": "done"}] * 2
        await until(lambda: facts.jobs() == [])
        await check_given_back(app, worker)
    facts.check_rest()


def waits(facts: Facts, like: str) -> bool:
    """Whether a session whose application name is like this waits for a lock."""
    query = "select from pg_stat_activity where application_name like %s and wait_event_type = 'Lock'"
    return bool(facts.rows(query + " and datname = current_database()", like))


@pytest.mark.parametrize("commits", [True, False])
async def test_a_key_that_is_in_a_transaction_of_somebody_else(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    """The engine waits a moment for it; then the app does, for as long as it takes."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 50)
    step.go_on.set()
    async with serving_app(dsn, step) as (app, worker):
        async with await psycopg.AsyncConnection.connect(dsn) as other:
            rival = await app.start("w", 1, key="k", connection=other)
            starting = asyncio.create_task(app.start("w", 1, key="k"))
            await until(lambda: waits(facts, "durable app"))
            assert not waits(facts, "durable worker%")
            await check_given_back(app, worker)
            await (other.commit() if commits else other.rollback())
        run = await soon(starting)
        assert (run.id == rival.id) is commits
        assert await run.result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [])
    assert step.began == [1]
    facts.check_rest()


async def test_a_start_that_is_cancelled(dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 0)
    async with serving_app(dsn, step) as (app, worker):
        async with await psycopg.AsyncConnection.connect(dsn) as other:
            await app.start("w", 1, key="k", connection=other)
            starting = asyncio.create_task(app.start("w", 1, key="k"))
            await until(lambda: waits(facts, "durable worker%"))
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            await other.rollback()
        await check_given_back(app, worker)
    assert step.began == []


async def test_what_is_refused_before_it_is_sent_gives_its_slot_back(dsn: str, facts: Facts) -> None:
    app = an_app(dsn, WAITING, max_payload=100)
    async with app, app.worker() as worker:
        await until(lambda: rests(worker))
        with pytest.raises(PayloadError):
            await app.start("waiting", "x" * 200)
        await check_given_back(app, worker)


async def test_a_signal_that_is_a_duplicate(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        assert await run.signal("other", id="m")
        await until(lambda: facts.inbox(run) == [("signal", "other", "seen")])
        await until(lambda: facts.jobs() == [] and rests(worker))
        assert await run.signal("other", id="m")
        assert facts.free(run)
        await check_given_back(app, worker)
        assert facts.jobs() == []
        assert await run.signal("go", 7)
        assert await run.result(timeout=30) == {"go": 7}


async def test_a_start_that_is_a_duplicate_by_its_id(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.jobs() == [] and rests(worker))
        assert await app.start("waiting", id=run.id) == run
        assert facts.free(run)
        await check_given_back(app, worker)
        assert facts.jobs() == []


async def test_a_signal_to_a_run_that_has_ended(dsn: str, facts: Facts, step: Held) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, worker):
        run = await app.start("w", 1)
        assert await run.result(timeout=30) == {"a": "done"}
        await until(lambda: facts.jobs() == [] and rests(worker))
        assert not await run.signal("go")
        assert facts.free(run)
        await check_given_back(app, worker)
        assert facts.jobs() == []


async def test_a_signal_to_a_run_that_has_gone_on_as_another_one(dsn: str, facts: Facts) -> None:
    """It is sent there; the run that was asked is locked for nothing."""
    async with an_app(dsn, continuing) as app, app.worker() as worker:
        run = await app.start(continuing, 0)
        await until(lambda: facts.rows("select from durable.runs where waiting_for = 'signal'"))
        await until(lambda: facts.jobs() == [] and rests(worker))
        assert await run.signal("go", 7)
        assert facts.free(run)
        assert await run.result(timeout=30) == 7
        await until(lambda: facts.jobs() == [] and rests(worker))
        await check_given_back(app, worker)
    facts.check_rest()


async def test_a_signal_does_not_wait_for_who_has_the_run(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for its row here waits for ever: that is left to the job."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 0)
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.run(run)["waiting_for"] == "signal")
        await until(lambda: facts.jobs() == [] and rests(worker))
        async with await psycopg.AsyncConnection.connect(dsn) as other:
            await other.execute("select 1 from durable.runs where id = %s for update", [run.id])
            assert await soon(run.signal("go", 7))
            assert facts.inbox(run) == [("signal", "go", "new")]
            await until(facts.blocked)
            await other.rollback()
        assert await run.result(timeout=30) == {"go": 7}
        await until(lambda: facts.jobs() == [] and rests(worker))
        await check_given_back(app, worker)
    facts.check_rest()


async def test_a_duplicate_that_is_cancelled(dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it lets go of the run that it has locked for nothing."""
    drop, dropping = Hold.drop, asyncio.Event()

    async def slow(self: Hold) -> None:
        dropping.set()
        try:
            await asyncio.Event().wait()
        finally:
            await drop(self)

    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.jobs() == [] and rests(worker))
        monkeypatch.setattr(Hold, "drop", slow)
        starting = asyncio.create_task(app.start("waiting", id=run.id))
        await soon(dropping.wait())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert facts.free(run)
        await check_given_back(app, worker)


async def test_a_worker_that_stops_takes_no_more(dsn: str, facts: Facts, step: Held) -> None:
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
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
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


async def test_a_worker_that_the_queue_has_forgotten(dsn: str, facts: Facts, step: Held) -> None:
    step.go_on.set()
    async with serving_app(dsn, step) as (app, worker):
        facts.execute("delete from durable.procrastinate_workers")
        assert await (await app.start("w", 1)).result(timeout=30) == {"a": "done"}
        assert worker._queue_worker._seats == 0  # type: ignore[union-attr]
    assert step.began == [1]


async def test_a_start_that_fails_gives_its_slot_back(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
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

def die(*_, **more):
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


async def test_it_is_registered_for_before_it_is_read(dsn: str, step: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is committed in between: an end that was not seen is told. The first look asks for nothing: it may have
    ended."""
    async with serving_app(dsn, step) as (app, _), an_app(dsn, *app.registry) as elsewhere:
        run = await app.start("w", 1)
        await until(lambda: step.began)
        flushes = note_flushes(monkeypatch)
        result = asyncio.create_task(elsewhere.result(run.id, timeout=30))
        looked = str(read.statements(app.schema).outcome, "utf-8")
        await until(lambda: len([flush for flush in flushes if looked in flush]) == 2)
        first, second = [flush for flush in flushes if looked in flush]
        assert first == [looked]
        assert (second[0], second[2], second[3]) == (app.store.sql.begin.decode(), "commit", looked)
        assert "waiters" in second[1]
        step.go_on.set()
        assert await result == {"a": "done"}
