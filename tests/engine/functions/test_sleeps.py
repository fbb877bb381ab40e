"""``ctx.sleep`` and ``ctx.sleep_until``."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.engine.functions.kit import Log, Place, fault, told
from tests.engine.kit import Facts

from durable import Break, Context, workflow


@pytest.mark.behaviour("RV-53", "RV-55", "RV-58")
async def test_a_long_sleep(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.sleep(3600)
        await ctx.step(log.do, "after")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        status = await run.status()
        assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "sleep", "sleep")
        assert status.wake_at is not None
        assert status.started_at is not None
        assert timedelta(minutes=59) < status.wake_at - status.started_at < timedelta(minutes=61)
        assert facts.jobs() == []
        await b.skip(minutes=59)
        await b.drain()
        assert log == []
        assert (await run.status()).wake_at == status.wake_at  # looking again does not prolong it
        await b.skip(minutes=2)
        await b.drain()
        assert log == ["after"]
        done = await run.status()
        assert (done.status, done.wake_at) == ("completed", None)
        assert await told(run) == [
            "created", "started", "sleep_waiting sleep", "suspended", "sleep_elapsed sleep",
            "attempt_started do", "attempt_succeeded do", "completed",
        ]  # fmt: skip


async def test_a_very_short_sleep_stays_in_the_worker(live: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        for _ in range(3):
            await ctx.sleep(0.02)
            await ctx.step(log.do, "step")

    async with live.working(w) as b:
        run = await b.app.start(w)
        job = await b.fetch()
        assert job is not None
        await b.perform(job)  # one job is all that it takes
        assert (await run.status()).status == "completed"
        assert facts.jobs() == []
        assert facts.value("select last_value from durable.procrastinate_jobs_id_seq") == 1
        assert [event.kind for event in await run.history()].count("sleep_elapsed") == 3


async def test_a_restart_does_not_sleep_anew(dsn: str) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        await ctx.sleep(timedelta(hours=1))
        return "awake"

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        async with place.bench(app) as b:
            run = await app.start(w)
            await b.drain()
            await b.skip(minutes=59)
        async with place.bench(app) as b:
            await b.drain()
            assert (await run.status()).status == "suspended"
            await b.skip(minutes=2)
            await b.drain()
            assert await run.result(timeout=5) == "awake"


@pytest.mark.behaviour("RV-56")
@pytest.mark.parametrize("past", [0, -5, timedelta(seconds=-1), datetime(2020, 1, 1, tzinfo=UTC)])
async def test_what_lies_in_the_past(place: Place, facts: Facts, past: Any) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        if isinstance(past, datetime):
            await ctx.sleep_until(past)
        else:
            await ctx.sleep(past)
        return "at once"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == "at once"
        assert facts.run(run)["revision"] == 1  # nothing was parked


async def test_sleep_until(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> bool:
        until = ctx.now() + timedelta(days=2)
        await ctx.sleep_until(until)
        return ctx.now() >= until

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(days=1)
        await b.drain()
        assert (await run.status()).status == "suspended"
        await b.skip(days=1, seconds=1)
        await b.drain()
        assert await run.result(timeout=5) is True


async def test_a_short_sleep_in_a_branch_stays_with_its_owner(place: Place, log: Log) -> None:
    """A branch wakes although another one's handler is still running."""
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    async def napping(c: Context) -> None:
        await c.sleep(0.01)
        await c.step(log.do, "awake")
        go.set()

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"slow": lambda c: c.step(slow), "nap": napping})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).status == "completed"
        assert log == ["awake"]


@pytest.mark.behaviour("RV-59")
async def test_a_sleep_in_a_loop(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def body(c: Context, n: int) -> Any:
            if n == 0:
                await c.step(log.do, "work")
                return 1
            await c.sleep(60)
            return Break("woke")

        return str(await ctx.loop("poll", body, 0))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).waiting_name == "poll[1]/sleep"
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "woke"
        assert log == ["work"]


async def test_names(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.sleep(0)
        await ctx.sleep(0, name="cooling")
        await ctx.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert [s.step_id for s in (await run.status()).steps] == ["sleep", "cooling", "sleep#2"]


@pytest.mark.parametrize("wrong", ["5", None, True, float("nan")])
async def test_what_is_no_duration(live: Place, wrong: Any) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.sleep(wrong)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "'sleep'" in await fault(run)


@pytest.mark.parametrize(
    "wrong",
    [datetime(2026, 1, 1), datetime(9999, 1, 1, tzinfo=UTC), 5],  # noqa: DTZ001 - naive on purpose
)
async def test_what_is_no_time(live: Place, wrong: Any) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.sleep_until(wrong)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "'sleep'" in await fault(run)


@pytest.mark.behaviour("RV-22")
async def test_a_wake_up_while_it_runs_changes_nothing(dsn: str, facts: Facts, log: Log) -> None:
    """Only a parked run is woken: a doorbell for one that is executing enqueues nothing of its own."""
    started, go = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        log.append("work")
        started.set()
        await go.wait()

    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.step(work)
        return await ctx.wait_for_signal("m")

    async with Place(dsn, replays=False).working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await started.wait()
        await run.signal("m", 1)
        assert facts.tasks(run).count("durable.advance") <= 1
        go.set()
        await b.drain()
        assert await run.result(timeout=5) == 1
        assert log == ["work"]
