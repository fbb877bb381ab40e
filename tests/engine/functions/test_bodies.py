"""What a body may do and what not: awaits, spinning, clean-up, time and chance; cancel, pause, deadlines, retry."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failure, fault, forget_bodies, told
from tests.engine.kit import Facts, soon

from durable import Break, Canceled, Context, DefinitionError, RunCanceled, StepFailed, workflow
from durable.engine.points import Point


def line_of(message: str) -> str:
    """The line of this file that a message names."""
    _, _, after = message.partition("test_bodies.py:")
    number = int("".join(c for c in after[:6] if c.isdigit()))
    with open(__file__, encoding="utf-8") as source:  # noqa: PTH123
        return source.read().splitlines()[number - 1]


async def run_once(place: Place, what: Any, *given: Any) -> Any:
    async with place.working(what) as b:
        run = await b.app.start(what, *given)
        await b.drain()
        return run, await run.status(), b.app


# ---------------------------------------------------------------- foreign awaits


async def sleeping() -> None:
    await asyncio.sleep(0.01)  # foreign


async def at_once() -> None:
    await asyncio.sleep(0)  # foreign


async def gathering() -> None:
    await asyncio.gather(sleeping(), sleeping())  # foreign


async def future() -> None:
    await asyncio.get_running_loop().create_future()  # foreign


async def timing() -> None:
    async with asyncio.timeout(5):  # foreign
        await sleeping()


async def tasks() -> None:
    await asyncio.create_task(sleeping())  # foreign


async def threads() -> None:
    await asyncio.to_thread(time.monotonic)  # foreign


async def events() -> None:
    await asyncio.Event().wait()  # foreign


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # it is, to be sure: by nobody
@pytest.mark.parametrize("foreign", [sleeping, at_once, gathering, future, timing, tasks, threads, events])
async def test_foreign_awaits(dsn: str, foreign: Any, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1)
        try:
            await foreign()
        finally:
            log.append("finally")

    async with Place(dsn, replays=False).working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        message = await fault(run)
        assert "foreign" in line_of(message), message
        assert "step" in message
        assert "ctx.join" in message


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # it is, to be sure: by nobody
@pytest.mark.parametrize("foreign", [sleeping, at_once, gathering, future, tasks, threads, events])
async def test_no_except_hides_a_foreign_await(place: Place, foreign: Any, log: Log) -> None:
    @workflow
    async def swallowing(ctx: Context) -> str:
        try:
            await foreign()
        except Exception:
            await ctx.step(log.do, "went on", name="on")
        return "as if nothing had happened"

    run, _, _ = await run_once(place, swallowing)
    assert "foreign" in line_of(await fault(run))
    assert log == []


async def test_the_event_loop_works_on_after_a_foreign_await(dsn: str) -> None:
    @workflow
    async def bad(ctx: Context) -> None:
        await asyncio.sleep(1)

    @workflow
    async def good(ctx: Context) -> int:
        return int(await ctx.step(abs, -1))

    async with Place(dsn, replays=False).working(bad, good) as b:
        run, other = await b.app.start(bad), await b.app.start(good)
        await b.drain()
        await fault(run)
        assert await other.result(timeout=5) == 1
        await asyncio.sleep(0)


# ---------------------------------------------------------------- spinning and blocking


async def test_a_spinning_body_is_stopped(dsn: str) -> None:
    @workflow
    async def spin(ctx: Context) -> None:
        await ctx.step(abs, -1)
        while True:
            pass  # it spins

    @workflow
    async def other(ctx: Context, n: int) -> int:
        return int(await ctx.step(abs, n))

    async with Place(dsn, replays=False).working(spin, other) as b:
        run = await b.app.start(spin)
        others = [await b.app.start(other, n) for n in range(5)]
        await b.drain()
        message = await fault(run)
        assert "without awaiting" in message
        assert "test_bodies.py:" in message
        assert [await o.result(timeout=5) for o in others] == [0, 1, 2, 3, 4]


async def test_a_body_that_swallows_being_stopped(dsn: str) -> None:
    @workflow
    async def spin(ctx: Context) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    async with Place(dsn, replays=False).working(spin) as b:
        run = await b.app.start(spin)
        await b.drain()
        assert "without awaiting" in await fault(run)


async def test_a_body_with_many_operations_is_not_stopped(dsn: str) -> None:
    """The limit is for one stretch of code, not for a replay."""

    @workflow
    async def w(ctx: Context) -> int:
        total = 0
        for n in range(60):
            await ctx.step(abs, n)
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                total += 0
        return total

    place = Place(dsn, replays=False)
    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == 0
        forked = await b.app.fork(run, "abs#60")  # a replay of all of it, in one go
        await b.drain()
        assert await forked.result(timeout=5) == 0


# ---------------------------------------------------------------- clean-up at parking


@contextmanager
def opened(log: Log) -> Iterator[None]:
    log.append("open")
    try:
        yield
    finally:
        log.append("close")


async def test_finally_and_with_when_a_run_parks(dsn: str, log: Log) -> None:
    """When its coroutine is closed, plain code in them runs, each time; operations in them do nothing."""

    @workflow
    async def w(ctx: Context) -> str:
        with opened(log):
            try:
                await ctx.sleep(60)
            finally:
                await ctx.step(log.do, "cleaned")
                log.append("finally")
        return "done"

    async with Place(dsn, replays=True).working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert log[:3] == ["open", "finally", "close"]
        assert "cleaned" not in log
        assert (await run.status()).waiting_name == "sleep"
        log.clear()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "done"
        assert log.count("cleaned") == 1
        assert log[-2:] == ["finally", "close"]


async def test_a_body_that_is_kept_is_not_closed_when_it_parks(dsn: str, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        with opened(log):
            await ctx.sleep(60)

    async with Place(dsn, replays=False).working(w) as b:
        await b.app.start(w)
        await b.drain()
        assert log == ["open"]
        await b.skip(seconds=61)
        await b.drain()
        assert log == ["open", "close"]


async def test_a_body_that_misbehaves_when_it_is_closed(dsn: str, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.sleep(60)
        except GeneratorExit:
            log.append("refuses")
            raise ValueError("never mind") from None
        return "done"

    async with Place(dsn, replays=True).working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "done"
        assert "refuses" in log


# ---------------------------------------------------------------- time and chance


@workflow
async def chance(ctx: Context) -> list[str]:
    found = [str(ctx.now()), str(ctx.random.random()), str(ctx.uuid4()), str(ctx.run_id)]
    await ctx.step(abs, 1)
    found += [str(ctx.now()), str(ctx.uuid4()), str(ctx.random.choice("abc"))]
    await ctx.sleep(60)
    inner = await ctx.block("b", drawing)
    parts = await ctx.join("j", {"x": drawing, "y": drawing})
    found += [*inner, *parts["x"], *parts["y"]]
    await ctx.step(collect, found)
    return found


async def drawing(c: Context) -> list[str]:
    return [str(c.now()), str(c.random.random()), str(c.uuid4())]


collected: list[list[str]] = []


def collect(found: list[str]) -> None:
    collected.append(found)


async def test_now_and_chance_are_the_same_on_replay(place: Place) -> None:
    collected.clear()
    async with place.working(chance) as b:
        run = await b.app.start(chance)
        await b.drain()
        forget_bodies(b)
        await b.skip(seconds=61)
        await b.drain()
        found = await run.result(timeout=5)
        assert collected == [found]
        ids = [text for text in found if len(text) == 36]
        assert len({*ids}) == len(ids)
        assert all(uuid.UUID(i).version == 4 for i in ids if i != str(run.id))
        assert [datetime.fromisoformat(t).tzinfo for t in found if t.endswith("+00:00")] == [UTC] * 5


async def test_now_and_chance_over_crashes(dsn: str) -> None:
    collected.clear()
    run = await crashing(dsn, chance)
    assert (await run.status()).status == "completed"
    (found,) = collected
    assert len(found) == 16


async def test_now_goes_on_with_what_is_passed(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[bool]:
        begun = ctx.now()
        await ctx.sleep(3_600)
        later = ctx.now()
        return [begun == ctx.now(), (later - begun).total_seconds() >= 3_600, ctx.now() == later]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=3_601)
        await b.drain()
        assert await run.result(timeout=5) == [False, True, True]


async def test_two_runs_share_nothing(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        first = ctx.random.random()
        await ctx.wait_for_signal("go")
        return [first, ctx.random.random(), str(ctx.uuid4())]

    async with place.working(w) as b:
        runs = [await b.app.start(w) for _ in range(3)]
        await b.drain()
        for run in runs:
            await run.signal("go")
        await b.drain()
        found = [await run.result(timeout=5) for run in runs]
        assert len({str(values) for values in found}) == 3


async def test_the_logger_is_silent_in_replay(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        ctx.logger.info("before")
        await ctx.step(abs, 1)
        ctx.logger.info("between")
        await ctx.block("b", inside)
        await ctx.sleep(60)
        ctx.logger.info("after %s", "all")

    async def inside(c: Context) -> None:
        c.logger.info("inside")
        await c.step(abs, 1)

    with caplog.at_level(logging.INFO, logger="durable.workflow"):
        async with Place(dsn, replays=True).working(w) as b:
            run = await b.app.start(w)
            await b.drain()
            await b.skip(seconds=61)
            await b.drain()
            assert (await run.status()).status == "completed"
    records = [record for record in caplog.records if record.name == "durable.workflow"]
    said = [record.getMessage() for record in records]
    assert said.count("after all") == 1
    assert {*said} == {"before", "between", "inside", "after all"}
    assert {record.__dict__["run"] for record in records} == {str(run.id)}


# ---------------------------------------------------------------- cancel


@pytest.mark.behaviour("RV-88")
async def test_cancel(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1, compensate=log.undo)
        await ctx.sleep(3_600)

    async with place.working(w) as b:
        run = await b.app.start(w, key="k")
        await b.drain()
        waiting = asyncio.create_task(run.result(timeout=30))
        assert await run.cancel(reason="changed my mind")
        with pytest.raises(RunCanceled, match="changed my mind"):
            await soon(waiting)
        status = await run.status()
        assert (status.status, status.wake_at, status.reason) == ("canceled", None, "changed my mind")
        assert not await run.cancel()
        assert not await run.signal("x")
        assert (await b.app.start(w, key="k")).id == run.id  # it is not run again
        await b.skip(seconds=3_601)
        await b.drain()
        assert log == [1]  # a cancel undoes nothing unless asked
        assert (await run.status()).status == "canceled"
        facts.check_rest()


async def test_cancel_and_undo(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1, compensate=log.undo)
        await ctx.sleep(3_600)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel(compensate=True)
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert log == [1, ("undo", 1)]


async def test_canceled_is_raised_where_the_body_waits(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        await ctx.step(log.do, "before", compensate=log.undo)
        try:
            await ctx.sleep(3_600)
        except Exception:
            await ctx.step(log.do, "swallowed")
        except Canceled:
            await ctx.step(log.do, "clean-up", on_cancel=True)
            try:
                await ctx.step(log.do, "not allowed")
            except Canceled:
                await ctx.step(log.do, "again", name="again", on_cancel=True)
            raise
        finally:
            await ctx.step(log.do, "last", name="last", on_cancel=True)
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel(compensate=True)
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert log == ["before", "clean-up", "again", "last", ("undo", "before")]


async def test_a_body_cannot_survive_a_cancel(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.sleep(3_600)
        except Canceled:
            log.append("swallowed")
        return "all is well"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert "swallowed" in log


async def test_clean_up_has_its_time(place: Place, log: Log) -> None:
    @workflow(cancel_timeout=20)
    async def w(ctx: Context) -> None:
        try:
            await ctx.sleep(3_600)
        finally:
            await ctx.step(log.flaky("x", 9), name="x", on_cancel=True)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel()
        for _ in range(9):
            await b.drain()
            await b.skip(seconds=7)
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert 1 < log.count("x") < 6


async def test_clean_up_of_all_branches(place: Place, log: Log) -> None:
    def branch(name: str) -> Any:
        async def run(c: Context) -> None:
            try:
                await c.sleep(3_600)
            finally:
                await c.step(log.do, name, on_cancel=True)

        return run

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"a": branch("a"), "b": branch("b")})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert sorted(log) == ["a", "b"]


async def test_clean_up_of_one_branch_does_not_end_that_of_another(place: Place, log: Log) -> None:
    first = asyncio.Event()

    async def after_the_first() -> None:
        await soon(first.wait())
        await asyncio.sleep(0)
        log.append("second")

    async def quick(c: Context) -> None:
        try:
            await c.sleep(3_600)
        finally:
            await c.step(log.do, "first", on_cancel=True)
            await c.step(first.set, name="told", on_cancel=True)

    async def slow(c: Context) -> None:
        try:
            await c.sleep(3_600)
        finally:
            await c.step(after_the_first, on_cancel=True)

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"slow": slow, "quick": quick})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert log == ["first", "second"]


async def test_an_executing_handler_is_interrupted_by_a_cancel(place: Place, log: Log) -> None:
    started = asyncio.Event()

    async def long() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append("interrupted")
            raise

    @workflow
    async def w(ctx: Context) -> None:
        try:
            await ctx.step(long, transactional=False)
        finally:
            await ctx.step(log.do, "clean-up", on_cancel=True)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await soon(started.wait())
        await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert log == ["interrupted", "clean-up"]


async def test_clean_up_over_crashes(dsn: str, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        try:
            await ctx.sleep(3_600)
        finally:
            for n in range(3):
                await ctx.step(log.do, n, on_cancel=True)

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        async with place.bench(app) as b:
            run = await app.start(w)
            await b.drain()
            await run.cancel()
            b.points.on(Point.AFTER_COMMIT, lambda: b.points.on(Point.AFTER_COMMIT, b.points.die))
            await b.work_until(lambda: b.points.dead)
            await b.crash()
        async with place.bench(app) as b:
            await b.drain()
            assert (await run.status()).status == "canceled"
    assert log == [0, 1, 2]


# ---------------------------------------------------------------- pause, deadline


async def test_pause_and_resume(place: Place, log: Log) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def long() -> str:
        started.set()
        await go.wait()
        return "long"

    @workflow
    async def w(ctx: Context) -> list[Any]:
        return [await ctx.step(long), await ctx.step(log.do, 2)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await soon(started.wait())
        await b.app.pause(run)
        go.set()
        await b.drain()
        assert (await run.status()).status == "paused"
        assert log == []
        assert (await b.app.resume(run)).accepted
        await b.drain()
        assert await run.result(timeout=5) == ["long", 2]


async def test_a_pause_during_the_last_step(place: Place, log: Log) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def long() -> str:
        started.set()
        await go.wait()
        log.append("long")
        return "long"

    @workflow
    async def w(ctx: Context) -> list[Any]:
        await ctx.step(abs, 1, ephemeral=True)
        found = await ctx.step(long)
        await ctx.sleep(0)
        return [found]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await soon(started.wait())
        await b.app.pause(run)
        go.set()
        await b.drain()
        assert (await run.status()).status == "paused"
        await b.app.resume(run)
        await b.drain()
        assert await run.result(timeout=5) == ["long"]
        assert [s.step_id for s in (await run.status()).steps] == ["abs", "long", "sleep"]
        assert log == ["long"]


async def test_what_a_body_does_between_its_last_step_and_its_end_is_journaled(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.step(abs, 1)
        await ctx.sleep(0)
        found = await ctx.receive("m")
        await ctx.checkpoint("c")
        return found[0].body

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", 5)
        await b.drain()
        assert await run.result(timeout=5) == 5
        assert facts.journal(run) == ["abs", "sleep", "receive", "c", "run:result"]
        assert facts.inbox(run) == [("signal", "m", "taken")]


async def test_a_deadline(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1, compensate=log.undo)
        try:
            await ctx.sleep(3_600)
        except BaseException as error:
            log.append(type(error).__name__)
            raise

    async with place.working(w) as b:
        run = await b.app.start(w, timeout=60)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        error = await failure(run)
        assert (error.type, error.kind) == ("TimeoutError", "timeout")
        assert [what for what in log if what != "GeneratorExit"] == [1, ("undo", 1)]


async def test_a_delayed_start(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1)

    async with place.working(w) as b:
        run = await b.app.start(w, delay=60)
        await b.drain()
        assert log == []
        await b.skip(seconds=61)
        await b.drain()
        assert (await run.status()).status == "completed"


# ---------------------------------------------------------------- errors of the body, and retry


async def test_a_body_that_fails_is_retried_by_fixed_code(place: Place, log: Log) -> None:
    @workflow(name="w")
    async def broken(ctx: Context) -> str:
        value = await ctx.step(log.do, "a")
        raise KeyError(value)

    @workflow(name="w")
    async def fixed(ctx: Context) -> str:
        return str(await ctx.step(log.do, "a")) + " fixed"

    async with place.working(broken) as b:
        run = await b.app.start("w")
        await b.drain()
        error = await failure(run)
        assert (error.type, error.message) == ("KeyError", "'a'")
        assert error.traceback is not None
        assert "broken" in error.traceback
    async with place.working(fixed) as b:
        run = b.app.get(run.id)
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "a fixed"
        assert log == ["a"]


async def test_a_retry_after_a_fault(live: Place, log: Log) -> None:
    @workflow(name="w")
    async def broken(ctx: Context) -> str:
        await ctx.step(log.do, "a")
        await asyncio.sleep(1)
        return "?"

    @workflow(name="w")
    async def fixed(ctx: Context) -> str:
        await ctx.step(log.do, "a")
        await ctx.sleep(0)
        return "fixed"

    async with live.working(broken) as b:
        run = await b.app.start("w")
        await b.drain()
        await fault(run)
    async with live.working(fixed) as b:
        run = b.app.get(run.id)
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "fixed"
        assert log == ["a"]


async def test_a_retry_goes_on_at_the_failed_step(place: Place, log: Log) -> None:
    """Not at one whose failure was caught before it."""

    @workflow
    async def w(ctx: Context) -> list[Any]:
        found = []
        try:
            await ctx.step(log.fail, "caught", **ONCE)
        except StepFailed as error:
            found.append(error.step)

        async def inner(c: Context) -> Any:
            await c.step(log.do, "inner")
            return await c.step(log.flaky("failed", 1), **ONCE)

        return [*found, await ctx.block("b", inner)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "not yet: 1"
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == ["fail", "failed"]
        assert log == ["caught", "inner", "failed", "failed"]


async def test_a_retry_of_a_failure_that_was_raised_anew(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        try:
            return await ctx.step(log.flaky("x", 1), **ONCE)
        except StepFailed as error:
            raise RuntimeError("in other words") from error

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).type == "RuntimeError"
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "x"


async def test_a_retry_in_a_loop(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def body(c: Context, n: int) -> int | Break[int]:
            await c.step(log.do, n)
            if n == 2:
                await c.step(log.flaky("x", 1), **ONCE)
            return Break(n) if n == 3 else n + 1

        return await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == 3
        assert log == [0, 1, 2, "x", "x", 3]


async def test_a_retry_of_a_child(place: Place, log: Log) -> None:
    @workflow
    async def child(ctx: Context) -> Any:
        return await ctx.step(log.flaky("x", 1), **ONCE)

    @workflow
    async def w(ctx: Context) -> Any:
        return await ctx.child(child)

    async with place.working(w, child) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.ChildFailed"
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "x"


async def test_a_retry_of_a_try_that_let_it_through(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        found = await ctx.try_block("t", lambda c: c.step(log.flaky("x", 1), **ONCE), catch=("race",))
        return found.value

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "x"


# ---------------------------------------------------------------- results


async def test_a_result_that_is_not_what_the_body_declares(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        await ctx.step(log.do, 1, compensate=log.undo)
        return "text"  # type: ignore[return-value]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert error.type == "durable.errors.PayloadError"
        assert "result" in error.message
        assert log == [1, ("undo", 1)]


async def test_a_body_without_any_operation(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> int:
        return n + 1

    async with place.working(w) as b:
        run = await b.app.start(w, 1)
        await b.drain()
        assert await run.result(timeout=5) == 2
        assert await told(run) == ["created", "started", "completed"]
        assert facts.run(run)["revision"] == 1


@pytest.mark.parametrize("wrong", ["sync", "class", "lambda", "arguments", "version"])
def test_what_is_no_workflow(wrong: str) -> None:
    def sync(ctx: Context) -> None: ...

    class A: ...

    async def many(ctx: Context, a: int, b: int) -> None: ...

    async def fine(ctx: Context) -> None: ...

    what: Any = {"sync": sync, "class": A, "lambda": lambda ctx: None, "arguments": many, "version": fine}[wrong]
    with pytest.raises(DefinitionError):
        workflow(version=2 if wrong == "version" else "2")(what)  # type: ignore[arg-type]


async def test_the_context_of_a_body_is_not_for_handlers(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def misuse() -> None:
            await ctx.step(log.do, 1)

        return str((await ctx.try_step(misuse, retry=1)).failure)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "for the body alone" in await run.result(timeout=5)
        assert log == []
