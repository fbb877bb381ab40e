"""Steps that are long, many, or must not run twice: detaching, claims first, slots, small pools."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.engine.kit import Ctx, Facts, an_app, soon, until, working

from durable import Durable, RunFailed, define
from durable.engine import flight, recover
from durable.engine.points import Point


@pytest.mark.parametrize("sync", [False, True])
async def test_a_hundred_detached_steps_in_a_worker_with_ten_connections(dsn: str, facts: Facts, sync: bool) -> None:
    async_go, sync_go = asyncio.Event(), threading.Event()

    async def wait(ctx: Ctx) -> int:
        await async_go.wait()
        return int(ctx.input)

    def block(ctx: Ctx) -> int:
        assert sync_go.wait(30)
        return int(ctx.input)

    async with an_app(dsn, define("w").step("a", block if sync else wait), pool_size=10, detach_after=0.01) as app:
        runs = [await app.start("w", number) for number in range(100)]
        async with app.worker(concurrency=100):
            try:
                claimed = "select count(*) from durable.runs where claim_token is not null"
                await until(lambda: facts.value(claimed) == 100, "a hundred claims")
                await until(lambda: facts.in_transaction() == 0, "they hold no connection")
            finally:
                async_go.set()
                sync_go.set()
            results = [await run.result(timeout=30) for run in runs]
        assert results == [{"a": number} for number in range(100)]
        facts.check_rest()


async def test_a_step_lets_go_early_when_others_wait_for_its_slot(dsn: str, facts: Facts) -> None:
    """Not by the clock: `detach_after` is far away."""
    second = asyncio.Event()

    async def wait(ctx: Ctx) -> None:
        if ctx.input == 1:
            await second.wait()
        second.set()

    async with working(dsn, define("w").step("a", wait), pool_size=3) as bench:
        first = await bench.app.start("w", 1)
        await bench.start_jobs()
        await until(lambda: not facts.free(first), "it holds its row")
        await bench.app.start("w", 2)
        await bench.drain()
        assert bench.points.count(Point.AFTER_CLAIM) == 1
        assert {run.status for run in await bench.app.list()} == {"completed"}
        facts.check_rest()


async def test_a_transactional_step_keeps_its_row_although_others_wait(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "UNDER_PRESSURE", 0)
    began, go_on = asyncio.Event(), asyncio.Event()

    async def wait(ctx: Ctx) -> None:
        if ctx.input == 1:
            began.set()
            await go_on.wait()

    async with working(dsn, define("w").step("a", wait, transactional=True), pool_size=3) as bench:
        first = await bench.app.start("w", 1)
        await bench.start_jobs()
        await soon(began.wait())
        await bench.app.start("w", 2)
        await bench.start_jobs()
        await soon(bench.engine.slots.pressure.wait())
        for _ in range(20):  # as many chances to detach it
            assert not await bench.idle()
        assert not facts.free(first)
        assert facts.run(first)["claim_token"] is None
        go_on.set()
        await bench.drain()
        assert bench.points.count(Point.AFTER_CLAIM) == 0
        facts.check_rest()


async def test_a_lent_step_keeps_its_row_although_others_wait(dsn: str, facts: Facts) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def wait(ctx: Ctx) -> None:
        if ctx.input == 1:
            _ = await ctx.async_connection()
            began.set()
            await go_on.wait()

    async with working(dsn, define("w").step("a", wait), pool_size=3, detach_after=0.2) as bench:
        await bench.app.start("w", 1)
        await bench.start_jobs()
        await soon(began.wait())
        await bench.app.start("w", 2)
        await bench.start_jobs()
        await soon(bench.engine.slots.pressure.wait())
        go_on.set()
        await bench.drain()
        assert bench.points.count(Point.AFTER_CLAIM) == 0
        facts.check_rest()


@pytest.mark.parametrize("sync", [False, True])
async def test_handlers_that_call_the_app_on_a_pool_of_two(dsn: str, facts: Facts, sync: bool) -> None:
    async def busy(ctx: Ctx) -> str:
        other = await ctx.app.start("other", key=str(ctx.input))
        assert await ctx.app.signal(other.id, "go", ctx.input)
        return str((await ctx.app.status(other.id)).workflow)

    def busy_thread(ctx: Ctx) -> str:
        other = outside.start("other", key=str(ctx.input))
        assert outside.signal(other.id, "go", ctx.input)
        return str(outside.status(other.id).workflow)

    flow = define("w").step("a", busy_thread if sync else busy)
    other = define("other").wait_for_signal("wait", "go")
    with Durable(dsn, workflows=[flow, other], pool_size=2) as outside:
        async with working(dsn, flow, other, pool_size=2) as bench:
            runs = [await bench.app.start("w", number) for number in range(8)]
            await bench.drain()
            for run in runs:
                assert await run.result(timeout=10) == {"a": "other"}
            ends = {run.status for run in await bench.app.list(workflow="other")}
            assert ends == {"completed"}
            facts.check_rest()


@pytest.mark.parametrize("options", [{"transactional": False}, {"at_most_once": True}], ids=str)
async def test_the_claim_is_committed_before_the_handler_runs(dsn: str, facts: Facts, options: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []

    async def look(ctx: Ctx) -> None:
        seen.append(facts.run(ctx.run_id))
        assert facts.free(ctx.run_id)

    async with working(dsn, define("w").step("a", look, **options)) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert (await run.status()).status == "completed"
        assert seen[0]["claim_token"] is not None
        assert seen[0]["frame"]["a"]["running"]
        facts.check_rest()


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_a_step_whose_worker_died(dsn: str, facts: Facts, at_most_once: bool) -> None:
    """It is run again, unless it may run at most once."""
    calls: list[int] = []
    began, late = threading.Event(), threading.Event()

    def work(ctx: Ctx) -> str:
        calls.append(ctx.attempt)
        if len(calls) == 1:
            began.set()
            assert late.wait(30)
        return "done"

    options = {"at_most_once": True} if at_most_once else {"transactional": False}
    flow = define("w").step("a", work, **options)  # type: ignore[arg-type]
    async with working(dsn, flow) as dead, working(dsn, flow) as other:
        run = await dead.app.start("w")
        outcome = dead.advance(run, 0)
        try:
            await until(began.is_set)
            await dead.vanish()
            await other.drain()
            if at_most_once:
                with pytest.raises(RunFailed, match="at most once"):
                    await run.result(timeout=10)
                error = (await run.status()).error
                assert error is not None
                assert error.type == "durable.errors.StepInterrupted"
            else:
                assert await run.result(timeout=10) == {"a": "done"}
        finally:
            late.set()
        await soon(outcome)
        assert len(calls) == (1 if at_most_once else 2)
        assert facts.attempts(run)[0] == ("a", "interrupted", 1)
        history = [event.kind for event in await run.history()]
        assert "attempt_interrupted" in history
        facts.check_rest()


async def test_a_step_that_kills_its_worker_again_and_again_fails(dsn: str, facts: Facts) -> None:
    """Five crashes by default: the first takeover is at once, the later ones back off."""
    began = asyncio.Event()

    async def killer(ctx: Ctx) -> None:
        assert ctx.attempt == 1
        began.set()
        await asyncio.Event().wait()

    flow = define("w").step("a", killer, transactional=False)
    async with an_app(dsn, flow) as app:
        run = await app.start("w")
        for crash in range(5):
            async with working(dsn, flow) as bench:
                if crash > 1:
                    await bench.drain()
                    assert facts.run(run)["waiting_for"] == "retry"
                await bench.skip(minutes=2)
                await bench.work_until(began.is_set)
                began.clear()
                assert len(facts.attempts(run)) == crash
                await bench.crash()
        async with working(dsn, flow) as bench:
            await bench.drain()
            await bench.skip(minutes=2)
            await bench.drain()
        with pytest.raises(RunFailed, match="interrupted 5 times"):
            await run.result(timeout=10)
        assert facts.attempts(run) == [("a", "interrupted", 1)] * 5
        facts.check_rest()


async def test_a_killer_has_innocent_neighbours(dsn: str, facts: Facts) -> None:
    """A worker runs one step at a time that crashed with its worker twice: so the killer is soon charged alone."""
    began: set[str] = set()
    flying: set[str] = set()
    together: list[set[str]] = []
    postponed = "select finished_at is not null or wake_at > durable.engine_now() from durable.runs where id = %s"
    dying = True

    async def work(ctx: Ctx) -> str:
        began.add(ctx.input)
        flying.add(ctx.input)
        try:
            if dying or ctx.input == "killer":
                await asyncio.Event().wait()
            await until(lambda: "killer" in flying or facts.value(postponed, killer.id), "the killer is out of the way")
            together.append(flying.copy())
        finally:
            flying.discard(ctx.input)
        return "done"

    flow = define("w").step("a", work, transactional=False)
    async with an_app(dsn, flow) as app:
        killer = await app.start("w", "killer")
        innocent = [await app.start("w", str(number)) for number in range(3)]
    for _ in range(2):
        began.clear()
        async with working(dsn, flow) as bench:
            await bench.work_until(lambda: len(began) == 4)
            await bench.crash()
    dying = False
    for _ in range(3):
        began.clear()
        async with working(dsn, flow) as bench:
            await bench.pump()  # takes over; all of them back off
            await bench.skip(minutes=2)
            await bench.work_until(lambda: "killer" in began and len(facts.jobs(killer)) == len(facts.jobs()))
            await bench.crash()
    async with working(dsn, flow) as bench:
        await bench.drain()
        await bench.skip(minutes=2)
        await bench.drain()
        for run in innocent:
            assert await bench.app.result(run, timeout=10) == {"a": "done"}
            assert facts.attempts(run) == [("a", "interrupted", 1)] * 2
        with pytest.raises(RunFailed, match="interrupted 5 times"):
            await bench.app.result(killer, timeout=10)
        assert all(len(names) == 1 for names in together), together
        facts.check_rest()


async def test_a_job_that_had_done_its_work_is_no_evidence_of_a_crash(dsn: str, facts: Facts) -> None:
    """The worker died between the run's park and the end of the job; its next attempt had not begun."""

    def fail(ctx: Ctx) -> None:
        raise ValueError("no")

    flow = define("w").step("a", fail)
    async with working(dsn, flow) as dead:
        run = await dead.app.start("w")
        job = await dead.fetch()
        assert job is not None
        await dead.session.queue.tasks[job.task_name](**job.task_kwargs)
        await dead.crash()
    async with working(dsn, flow) as other:
        assert [job["status"] for job in facts.jobs()] == ["doing"]
        await other.skip(minutes=2)
        await recover.take_over_from_dead(other.engine)
        assert facts.jobs() == []
        await other.drain()
        assert facts.attempts(run) == [("a", "failed", 1), ("a", "failed", 2)]
