"""A worker: it begins, works, ends in order, outlasts the database's hiccups, and says who is alive."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
from typing import Any

import pytest
from tests.engine.kit import Ctx, Facts, an_app, soon, until, working

from durable import AsyncDurable, ConfigurationError, Durable, Start, define
from durable.worker import Worker
from durable.worker.serving import LastingWorker
from durable.worker.watchdog import EXIT_CODE, Watchdog

CHAIN = define("w").step("a", lambda ctx: 1).step("b", lambda ctx: ctx.results["a"] + 1).sleep("s", 0)
DONE = {"a": 1, "b": 2, "s": None}


# ---------------------------------------------------------------- until idle, and in the background


def test_until_idle(dsn: str, facts: Facts) -> None:
    with Durable(dsn, workflows=[CHAIN, define("waits").wait_for_signal("s", "go")]) as app:
        runs = [app.start("w") for _ in range(20)]
        waiting = app.start("waits")
        app.run_worker(until_idle=True)
        assert [run.result(timeout=10) for run in runs] == [DONE] * 20
        assert waiting.status().status == "suspended"
        facts.check_rest()
        assert facts.rows("select * from durable.workers") == []


async def test_until_idle_on_a_loop(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, CHAIN) as app:
        run = await app.start("w")
        await soon(app.run_worker(until_idle=True))
        assert await run.result(timeout=10) == DONE
        facts.check_rest()


def test_in_the_background_of_a_block(dsn: str, facts: Facts) -> None:
    with Durable(dsn, workflows=[CHAIN]) as app:
        with app.worker():
            assert app.start("w").result(timeout=30) == DONE
        facts.check_rest()
        assert facts.rows("select * from durable.workers") == []
        assert facts.value("select count(*) from durable.procrastinate_workers") == 0


async def test_timers_are_kept_by_the_worker(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, define("w").sleep("s", 0.05).step("a", lambda ctx: 1)) as app, app.worker():
        assert (await (await app.start("w")).result(timeout=30))["a"] == 1
        await until(lambda: facts.jobs() == [])


async def test_a_lost_job_is_found_by_the_worker(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, define("w").wait_for_signal("s", "go")) as app:
        run = await app.start("w")
        async with app.worker():
            await until(lambda: facts.run(run)["status"] == "suspended")
        await run.signal("go", 1)
        facts.execute("delete from durable.procrastinate_jobs")
        async with app.worker():
            assert await run.result(timeout=30) == {"s": 1}


async def test_what_makes_no_worker(dsn: str) -> None:
    async with AsyncDurable(dsn) as app:
        with pytest.raises(ConfigurationError, match="no workflow is registered"):
            await app.run_worker(until_idle=True)
        with pytest.raises(ConfigurationError, match="at least 1"):
            Worker(app, concurrency=0)


# ---------------------------------------------------------------- ending


class Step:
    def __init__(self) -> None:
        self.began, self.go_on = asyncio.Event(), asyncio.Event()
        self.attempts: list[int] = []

    async def __call__(self, ctx: Ctx) -> str:
        self.attempts.append(ctx.attempt)
        self.began.set()
        await self.go_on.wait()
        return "done"


@pytest.mark.parametrize("options", [{}, {"transactional": False}, {"transactional": True}], ids=str)
async def test_stop_lets_the_step_end_and_begins_no_other(dsn: str, facts: Facts, options: dict[str, Any]) -> None:
    step, second = Step(), Step()
    second.go_on.set()
    async with an_app(dsn, define("w").step("a", step, **options).step("b", second)) as app:
        run = await app.start("w")
        worker = Worker(app)
        working = asyncio.create_task(worker.run())
        await soon(step.began.wait())
        later = await app.start("w")
        worker.stop()
        step.go_on.set()
        await soon(working)
        assert facts.journal(run) == ["a"]
        assert second.attempts == []
        assert facts.tasks(run) == ["durable.advance"]
        assert facts.rows("select * from durable.workers") == []
        await soon(app.run_worker(until_idle=True))
        for ended in (run, later):
            assert await ended.result(timeout=10) == {"a": "done", "b": "done"}
        assert facts.attempts(run) == []
        facts.check_rest()


@pytest.mark.parametrize("options", [{}, {"transactional": False}, {"transactional": True}], ids=str)
async def test_what_does_not_end_in_time_is_interrupted_and_handed_back(
    dsn: str, facts: Facts, options: dict[str, Any]
) -> None:
    step = Step()
    async with an_app(dsn, define("w").step("a", step, **options)) as app:
        run = await app.start("w")
        worker = Worker(app, grace=0)
        working = asyncio.create_task(worker.run())
        await soon(step.began.wait())
        worker.stop()
        await soon(working)
        assert facts.attempts(run) == [("a", "interrupted", 1)]
        assert facts.run(run)["claim_token"] is None
        assert facts.tasks(run) == ["durable.advance"], "it goes on at once in another worker"
        step.go_on.set()
        await soon(app.run_worker(until_idle=True))
        assert await run.result(timeout=10) == {"a": "done"}
        assert step.attempts == [1, 1], "not counted as an attempt"
        facts.check_rest()


async def test_branches_are_handed_back(dsn: str, facts: Facts) -> None:
    one, two, ready = Step(), Step(), Step()
    ready.go_on.set()
    async with an_app(dsn, define("w").parallel("p", {"one": one, "two": two, "ready": ready})) as app:
        run = await app.start("w")
        worker = Worker(app, grace=0)
        working = asyncio.create_task(worker.run())
        await soon(asyncio.gather(one.began.wait(), two.began.wait()))
        await until(lambda: facts.journal(run) == ["p/ready"])
        worker.stop()
        await soon(working)
        assert facts.run(run)["claim_token"] is None
        assert len(facts.jobs(run)) == 1
        one.go_on.set()
        two.go_on.set()
        await soon(app.run_worker(until_idle=True))
        assert (await run.status()).status == "completed"
        assert (len(one.attempts), len(two.attempts), len(ready.attempts)) == (2, 2, 1)
        facts.check_rest()


# ---------------------------------------------------------------- the queue's side


async def test_the_queues_worker_is_started_anew_when_it_ends(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve = LastingWorker.serve
    served: list[int] = []

    async def stumble(self: LastingWorker) -> None:
        served.append(1)
        if len(served) == 1:
            raise RuntimeError("a side task died")
        await serve(self)

    monkeypatch.setattr(LastingWorker, "serve", stumble)
    async with an_app(dsn, CHAIN) as app, app.worker():
        assert await (await app.start("w")).result(timeout=30) == DONE
    assert "the queue's worker ended by itself" in caplog.text


async def test_the_worker_outlasts_cut_connections(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, CHAIN) as app, app.worker():
        for _ in range(2):
            assert await (await app.start("w")).result(timeout=30) == DONE
            assert facts.terminate("durable%") >= 3
        assert await (await app.start("w")).result(timeout=30) == DONE


async def test_fetching_and_finishing_jobs_outlast_a_connection(dsn: str, facts: Facts) -> None:
    async with working(dsn, CHAIN) as bench:
        await bench.app.start("w")
        facts.terminate("durable queue")
        job = await bench.fetch() or await bench.fetch()
        assert job is not None
        facts.terminate("durable queue")
        await bench.manager.done(job)
        assert facts.jobs() == []
        await bench.manager.done(job)  # the row is gone: recovery was here


async def test_the_queue_is_empty_at_rest(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, CHAIN) as app:
        await app.start_many("w", [Start() for _ in range(50)])
        await soon(app.run_worker(until_idle=True))
        for table in ("jobs", "events", "workers"):
            assert facts.value(f"select count(*) from durable.procrastinate_{table}") == 0


# ---------------------------------------------------------------- who is alive


async def test_a_worker_whose_lock_was_lost_takes_it_again(dsn: str, facts: Facts) -> None:
    step = Step()
    async with working(dsn, define("w").step("a", step, transactional=False)) as bench:
        run = await bench.app.start("w")
        (job,) = await bench.start_jobs()
        await soon(step.began.wait())
        claim, worker = facts.run(run)["claim_token"], bench.engine.worker
        here = "database = (select oid from pg_database where datname = current_database())"
        lock = f"select 1 from pg_locks where locktype = 'advisory' and granted and objid = %s and {here}"
        assert facts.rows(lock, worker)
        since = bench.session.liveness._since
        assert facts.terminate("durable liveness") == 1
        await until(lambda: bench.session.liveness._since != since and bench.session.liveness.alive.is_set())
        assert facts.rows(lock, worker)
        assert bench.engine.worker == worker
        assert facts.run(run)["claim_token"] == claim
        step.go_on.set()
        await soon(job)
        assert step.attempts == [1]


async def test_a_worker_that_was_taken_for_dead_gives_up_its_claims(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost its lock, another one took over, and nobody could tell it: it looks when it is back."""
    back, interrupted = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    async def work(ctx: Ctx) -> str:
        calls.append(ctx.attempt)
        if len(calls) > 1:
            return "second"
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()
        return "first"

    flow = define("w").step("a", work, transactional=False)
    async with working(dsn, flow) as first, working(dsn, flow) as second:
        run = await first.app.start("w")
        (job,) = await first.start_jobs()
        await until(lambda: calls)
        liveness = first.session.liveness
        connect = liveness._connect

        async def later() -> None:
            await back.wait()
            await connect()

        monkeypatch.setattr(liveness, "_connect", later)
        facts.terminate("durable liveness")
        await until(lambda: not liveness.alive.is_set())
        await until(second.session.liveness.alive.is_set)
        await second.drain()
        assert await run.result(timeout=10) == {"a": "second"}
        assert not interrupted.is_set()
        back.set()
        await soon(interrupted.wait())
        await soon(job)
        assert facts.rows("select result from durable.journal") == [{"result": "second"}]


async def test_no_job_begins_while_the_lock_is_lost(dsn: str, facts: Facts) -> None:
    async with working(dsn, CHAIN) as bench:
        await bench.vanish()
        run = await bench.app.start("w")
        bench.session.liveness.alive.clear()
        (job,) = await bench.start_jobs()
        await until(lambda: [found["status"] for found in facts.jobs()] == ["doing"])
        assert facts.run(run)["status"] == "pending"
        bench.session.liveness.alive.set()
        await soon(job)
        assert facts.run(run)["status"] == "completed"


# ---------------------------------------------------------------- the watchdog


class DeafLoop:
    def call_soon_threadsafe(self, fn: Any) -> None: ...


def test_the_watchdog_ends_a_process_whose_loop_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda **_: None)
    dog = Watchdog(DeafLoop(), patience=0.01)  # type: ignore[arg-type]
    dog.start()
    assert ended.wait(30)
    dog.stop()
    assert codes[0] == EXIT_CODE


async def test_the_watchdog_leaves_a_living_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it bit"))
    dog = Watchdog(asyncio.get_running_loop(), patience=10)
    marked = asyncio.Event()
    monkeypatch.setattr(dog, "_mark", marked.set)
    dog._patience = 0.05
    dog._seen += 1_000
    dog.start()
    await soon(marked.wait())
    dog.stop()


def test_the_watchdog_ends_with_its_loop() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    dog = Watchdog(loop, patience=0.01)
    dog.start()
    dog._thread.join(30)
    assert not dog._thread.is_alive()


# ---------------------------------------------------------------- the log


async def test_records_say_which_run_workflow_and_step(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "durable")

    async def work(ctx: Ctx) -> None:
        ctx.logger.info("charging %s", 42, extra={"amount": 42})

    async with working(dsn, define("w").step("a", work)) as bench:
        run = await bench.app.start("w")
        await bench.drain()
    (record,) = [record for record in caplog.records if record.getMessage() == "charging 42"]
    assert vars(record) | {"run": str(run.id), "workflow": "w", "step": "a", "attempt": 1, "amount": 42} == vars(record)
