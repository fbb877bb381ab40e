"""Compensation, ``ctx.checkpoint`` and ``raise Rollback``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from tests.engine.functions.kit import ONCE, Log, Place, failure, fault
from tests.engine.kit import Facts, an_app

from durable import (
    Break,
    Context,
    RetryRefused,
    Rollback,
    StepContext,
    StepFailed,
    workflow,
)
from durable.engine.points import Point
from durable.testing.harness import AsyncHarness


@pytest.mark.behaviour("RV-83")
async def test_newest_first_with_each_steps_output(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.checkpoint("start")
        await ctx.step(log.do, "first", "one", compensate=undo("first"))
        await ctx.step(log.do, "second", "two", compensate=undo("second"))
        raise ValueError("the original")

    def undo(name: str) -> Any:
        async def undo(output: str, *args: Any) -> None:
            log.append(f"{name}:{output}")

        return undo

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert (error.type, error.message) == ("ValueError", "the original")
        assert log == ["first", "second", "second:two", "first:one"]
        kinds = [(e.kind, e.step) for e in await run.history()]
        assert [k for k in kinds if k[0] == "compensated"] == [("compensated", "do#2"), ("compensated", "do")]


async def test_what_a_compensator_is_given(place: Place, log: Log) -> None:
    async def with_context(ctx: StepContext[Any], output: Any, *args: Any) -> None:
        log.append([ctx.step_id, ctx.output, output, *args])

    def without(output: Any, what: Any, value: Any) -> None:
        log.append([output, what, value])

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", 1, compensate=with_context)
        await ctx.step(log.do, "b", 2, compensate=without)
        raise ValueError

    async with place.working(w) as b:
        await b.app.start(w)
        await b.drain()
        assert log == ["a", "b", [2, "b", 2], ["undo:do", 1, 1, "a", 1]]


@pytest.mark.behaviour("RV-85")
@pytest.mark.parametrize("point", [Point.BEFORE_COMMIT, Point.AFTER_COMMIT, Point.AFTER_HANDLER])
async def test_a_crash_during_the_rollback(dsn: str, facts: Facts, log: Log, point: Point) -> None:
    async def undo(output: str, *args: Any) -> None:
        log.append(output)

    @workflow
    async def w(ctx: Context) -> None:
        for name in ("first", "second", "third"):
            await ctx.step(str, name, name=name, compensate=undo)
        raise ValueError("the original")

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        run = await app.start(w)
        async with place.bench(app) as b:

            def die_at_second() -> None:
                if "undo:third" in facts.journal(run):
                    b.points.die()
                b.points.on(point, die_at_second, what="undo")

            b.points.on(point, die_at_second, what="undo")
            await b.work_until(lambda: b.points.dead)
            await b.crash()
        status = await run.status()
        assert status.status == "compensating"
        assert facts.journal(run)[:4] == ["first", "second", "third", "undo:third"]
        async with place.bench(app) as b:
            await b.drain()
        assert (await failure(run)).message == "the original"
    assert facts.journal(run) == ["first", "second", "third", "undo:third", "undo:second", "undo:first"]
    # a compensator whose record was lost runs again, as any step does; one that was recorded does not
    again = 1 if point is not Point.AFTER_COMMIT else 0
    assert log.count("second") <= 1 + again
    assert (log.count("third"), log.count("first")) == (1, 1)


@pytest.mark.behaviour("RV-86")
async def test_loops_are_rolled_back_too(place: Place, facts: Facts, log: Log) -> None:
    """Driving the body for its compensators moves no loop on."""

    @workflow
    async def w(ctx: Context) -> None:
        async def body(c: Context, n: int) -> int:
            await c.step(log.do, f"in {n}", compensate=log.undo)
            if n == 1:
                raise ValueError("the original")
            return n + 1

        await ctx.step(log.do, "out", compensate=log.undo)
        await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "the original"
        assert log == ["out", "in 0", "in 1", ("undo", "in 1"), ("undo", "in 0"), ("undo", "out")]
        iterations = [k for k in facts.journal(run) if k.startswith("poll[") and k.endswith("]")]
        assert iterations == ["poll[0]"]


async def test_branches_are_rolled_back_too(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        async def good(c: Context) -> None:
            await c.step(log.do, "a", compensate=log.undo)
            await c.block("b", lambda d: d.step(log.do, "b", compensate=log.undo))

        await ctx.join("j", {"good": good, "bad": lambda c: c.wait_for_signal("go", timeout=5)})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.JoinFailed"
        assert log == ["a", "b", ("undo", "b"), ("undo", "a")]


async def test_a_compensator_is_tried_again_and_given_up(place: Place, facts: Facts, log: Log) -> None:
    async def give_up(output: Any, *args: Any) -> None:
        log.append("tried")
        raise ValueError("can't")

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", compensate=log.undo)
        await ctx.step(log.do, "b", compensate=give_up)
        raise ValueError("the original")

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(4):
            await b.drain()
            await b.skip(minutes=2)
        assert (await failure(run)).message == "the original"
        assert log == ["a", "b", "tried", "tried", "tried", ("undo", "a")]
        assert (await run.status()).not_undone == ("do#2",)


async def test_a_caught_failure_undoes_nothing(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        await ctx.step(log.do, "a", compensate=log.undo)
        with suppress(StepFailed):
            await ctx.step(log.fail, **ONCE)
        return "went on"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == "went on"
        assert log == ["a", "fail"]


async def test_the_failed_step_is_not_undone(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.fail, compensate=log.undo, **ONCE)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "no fail"
        assert log == ["fail"]


async def test_children_are_rolled_back_if_asked_for(place: Place, log: Log) -> None:
    @workflow
    async def child(ctx: Context, n: int) -> int:
        return int(await ctx.step(log.do, n, compensate=log.undo))

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.child(child, 1, compensate=True)
        await ctx.child(child, 2)
        raise ValueError("the original")

    async with place.working(w, child) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "the original"
        assert log == [1, 2, ("undo", 1)]
        assert sorted(c.status for c in (await run.status()).children) == ["canceled", "completed"]


# ---------------------------------------------------------------- Rollback


async def test_rollback_undoes_everything(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", compensate=log.undo)
        try:
            raise Rollback
        except Exception:
            await ctx.step(log.do, "swallowed")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert (error.kind, error.type) == ("rollback", "durable.Rollback")
        assert log == ["a", ("undo", "a")]


async def test_a_handler_may_roll_back_to_a_checkpoint(place: Place, log: Log) -> None:
    async def check() -> str:
        log.append("check")
        if log.count("check") < 3:
            raise Rollback(to="here")
        return "fine"

    @workflow
    async def w(ctx: Context) -> list[Any]:
        await ctx.step(log.do, "before", compensate=log.undo)
        n = await ctx.checkpoint("here")
        await ctx.step(log.do, f"work {n}", compensate=log.undo)
        return [n, await ctx.step(check)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [2, "fine"]
        assert log == [
            "before", "work 0", "check", ("undo", "work 0"), "work 1", "check", ("undo", "work 1"), "work 2", "check",
        ]  # fmt: skip


@workflow
async def going_back(ctx: Context) -> list[Any]:
    first = await ctx.step(note, "first", compensate=forget)
    a = await ctx.checkpoint("a")
    second = await ctx.step(note, f"second {a}", compensate=forget)
    b = await ctx.checkpoint("b")
    await ctx.step(note, f"third {a} {b}", compensate=forget)
    if b < 1:
        raise Rollback(to="b")
    if a < 1:
        raise Rollback(to="a")
    return [first, second, a, b]


noted: list[str] = []


def note(what: str) -> str:
    noted.append(what)
    return what


def forget(output: str, *args: Any) -> None:
    noted.append(f"undo {output}")


GONE_BACK = [
    "first", "second 0", "third 0 0", "undo third 0 0", "third 0 1", "undo third 0 1", "undo second 0", "second 1",
]  # fmt: skip


async def test_checkpoints_within_each_other(place: Place, facts: Facts) -> None:
    noted.clear()
    async with place.working(going_back) as b:
        run = await b.app.start(going_back)
        await b.drain()
        found = await run.result(timeout=5)
        assert found[:3] == ["first", "second 1", 1], noted
        assert noted[: len(GONE_BACK)] == GONE_BACK
        facts.check_rest()


async def test_going_back_over_crashes(dsn: str) -> None:
    """Each effect and each undo happens once whatever crashes: a journaled step is never run again."""
    noted.clear()
    async with an_app(dsn, going_back) as app, AsyncHarness(app) as t:
        run = await app.start(going_back)
        for _ in range(60):
            if not await t.drain(max_steps=1):
                if (await run.status()).ended:
                    break
                await t.skip(hours=1)
        assert (await run.result(timeout=5))[:3] == ["first", "second 1", 1]
    assert noted[: len(GONE_BACK)] == GONE_BACK
    assert len(noted) == len({*noted})


async def test_a_checkpoint_in_a_loop_and_a_block(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def body(c: Context, state: list[int]) -> list[int] | Break[list[int]]:
            async def inner(d: Context) -> int:
                n = await d.checkpoint("in")
                await d.step(log.do, [len(state), n], compensate=log.undo)
                if n < len(state):
                    raise Rollback(to="in")
                return n

            found = [*state, await c.block("b", inner)]
            return Break(found) if len(found) == 3 else found

        return await ctx.loop("poll", body, [])

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [0, 1, 2]
        assert log == [
            [0, 0], [1, 0], ("undo", [1, 0]), [1, 1], [2, 0], ("undo", [2, 0]), [2, 1], ("undo", [2, 1]), [2, 2],
        ]  # fmt: skip


async def test_a_loop_after_a_checkpoint_begins_anew(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        n = await ctx.checkpoint("here")

        async def body(c: Context, i: int) -> int | Break[int]:
            await c.step(log.do, [n, i], compensate=log.undo)
            return Break(i) if i == 2 else i + 1

        last = await ctx.loop("poll", body, 0)
        parts = await ctx.join("j", {"a": lambda c: c.step(log.do, [n, "a"], compensate=log.undo)})
        await ctx.sleep(5)
        if n == 0:
            raise Rollback(to="here")
        return last + len(parts)

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=6)
        assert await run.result(timeout=5) == 3
        undone = [("undo", value) for value in ([0, "a"], [0, 2], [0, 1], [0, 0])]
        assert log == [[0, 0], [0, 1], [0, 2], [0, "a"], *undone, [1, 0], [1, 1], [1, 2], [1, "a"]]


async def test_after_going_back_a_failure_undoes_what_is_left(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "before", compensate=log.undo)
        n = await ctx.checkpoint("here")
        await ctx.step(log.do, f"work {n}", compensate=log.undo)
        if n == 0:
            raise Rollback(to="here")
        raise ValueError("in the end")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "in the end"
        assert log == ["before", "work 0", ("undo", "work 0"), "work 1", ("undo", "work 1"), ("undo", "before")]


async def test_a_checkpoint_that_was_not_passed(live: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", compensate=log.undo)
        await ctx.checkpoint("here")
        raise Rollback(to="there")

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        message = await fault(run)
        assert "'there'" in message
        assert "'here'" in message
        assert log == ["a", ("undo", "a")]


async def test_no_checkpoints_in_branches(live: Place) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"a": lambda c: c.checkpoint("x")})

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "outside of branches" in await fault(run)


async def test_an_open_wait_is_dropped_by_going_back(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        n = await ctx.checkpoint("here")
        if n:
            return [n, await ctx.wait_for_signal("go", timeout=5, on_timeout="none")]

        async def late(c: Context) -> None:
            await c.sleep(5)
            raise Rollback(to="here")

        waits = {"wait": lambda c: c.wait_for_signal("go"), "child": lambda c: c.child(resting)}
        await ctx.join("j", {**waits, "late": late})
        return []

    async with place.working(w, resting) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        await run.signal("go", "hello")
        await b.drain()
        assert await run.result(timeout=5) == [1, "hello"]
        assert facts.rows("select status from durable.runs where workflow = 'resting'") == [{"status": "canceled"}]


@workflow
async def resting(ctx: Context) -> None:
    await ctx.sleep(3_600)


# ---------------------------------------------------------------- and retry


async def test_no_retry_after_something_was_undone(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", compensate=log.undo)
        await ctx.step(log.fail, **ONCE)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        with pytest.raises(RetryRefused):
            await b.app.retry(run)


async def test_retry_after_going_back_to_a_checkpoint(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        n = await ctx.checkpoint("here")
        await ctx.step(log.do, f"work {n}", compensate=None if n else log.undo)
        if n == 0:
            raise Rollback(to="here")
        return [n, await ctx.step(log.flaky("x", 1), **ONCE)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "not yet: 1"
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == [1, "x"]
        assert log == ["work 0", ("undo", "work 0"), "work 1", "x", "x"]
