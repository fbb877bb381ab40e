"""``ctx.try_step`` and ``ctx.try_block``: failures as values."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failure, fault
from tests.engine.kit import Facts

from durable import Context, Result, Retry, Rollback, StepContext, Suspend, workflow


async def hang() -> None:
    await asyncio.Event().wait()


def shown(result: Result[Any]) -> dict[str, Any]:
    told = result.failure
    if told is None:
        return {"ok": result.ok, "value": result.value}
    return {
        "ok": result.ok,
        "kind": told.kind,
        "source": told.source,
        "step": told.step,
        "attempts": told.attempts,
        "message": told.error["message"],
    }


async def tried(place: Place, body: Any) -> Any:
    """What the body returns, first live, then from the journal."""

    @workflow
    async def w(ctx: Context) -> Any:
        found = shown(await body(ctx))
        await ctx.sleep(60)
        await ctx.step(abs, -1)
        return found

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=61)
        return await run.result(timeout=5)


@pytest.mark.behaviour("RV-74")
async def test_a_critical_error(place: Place, log: Log) -> None:
    assert await tried(place, lambda ctx: ctx.try_step(log.refuse, "x")) == {
        "ok": False, "kind": "critical", "source": "step", "step": "refuse", "attempts": 1, "message": "never x",
    }  # fmt: skip
    assert log == ["x"]


async def test_a_success(place: Place, log: Log) -> None:
    assert await tried(place, lambda ctx: ctx.try_step(log.do, "x", 7)) == {"ok": True, "value": 7}


async def test_out_of_attempts(place: Place, log: Log) -> None:
    retry = Retry(max_attempts=2, initial=5)
    assert await tried(place, lambda ctx: ctx.try_step(log.fail, "x", retry=retry)) == {
        "ok": False, "kind": "exhausted", "source": "step", "step": "fail", "attempts": 2, "message": "no x",
    }  # fmt: skip


async def test_one_attempt(place: Place, log: Log) -> None:
    found = await tried(place, lambda ctx: ctx.try_step(log.fail, "x", **ONCE))
    assert (found["kind"], found["attempts"]) == ("exhausted", 1)


async def test_a_timeout(place: Place) -> None:
    found = await tried(place, lambda ctx: ctx.try_step(hang, timeout=0.01))
    assert (found["kind"], found["step"], found["attempts"]) == ("timeout", "hang", 1)


async def test_what_is_caught_can_be_selected(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.try_step(log.refuse, "x", catch=("timeout",))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "never x"


@pytest.mark.parametrize("catch", ["critical", ["step"], ["criticl"]])
async def test_what_can_not_be_caught(live: Place, log: Log, catch: Any) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.try_step(log.do, "x", catch=catch)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "catch=" in await fault(run)


async def undo_all() -> None:
    raise Rollback


@pytest.mark.behaviour("RV-76")
async def test_a_rollback_passes_through(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "before", compensate=log.undo)
        await ctx.try_step(undo_all)
        await ctx.step(log.do, "never")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).kind == "rollback"
        assert log == ["before", ("undo", "before")]


@pytest.mark.behaviour("RV-77")
async def test_a_rollback_that_is_asked_for(place: Place, log: Log) -> None:
    found = await tried(place, lambda ctx: ctx.try_step(undo_all, catch=("rollback",)))
    assert (found["ok"], found["kind"], found["step"]) == (False, "rollback", "undo_all")


async def test_a_rollback_is_not_retried(place: Place, log: Log) -> None:
    async def undo_all() -> None:
        log.append("x")
        raise Rollback

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(undo_all, retry=5)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).kind == "rollback"
        assert log == ["x"]


async def test_suspending_passes_through(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        return (await ctx.try_step(suspends)).value

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).waiting_name == "suspends"
        await b.app.resume(run, "suspends", 5)
        await b.drain()
        assert await run.result(timeout=5) == "resumed"


async def suspends(ctx: StepContext[Any]) -> Any:
    return "resumed" if ctx.resume_data is not None else Suspend()


# ---------------------------------------------------------------- blocks


@pytest.mark.behaviour("RV-79", "RV-80")
@pytest.mark.parametrize("source", ["join", "race"])
async def test_branches_that_failed(place: Place, log: Log, source: str) -> None:
    def inside(c: Context) -> Any:
        branches = {"a": lambda d: d.step(log.refuse, "a"), "b": lambda d: d.step(log.refuse, "b")}
        return c.join("both", branches) if source == "join" else c.race("both", branches)

    found = await tried(place, lambda ctx: ctx.try_block("t", inside))
    assert (found["ok"], found["source"], found["kind"], found["step"]) == (False, source, "critical", "t/both")


async def test_a_step_that_failed(place: Place, log: Log) -> None:
    found = await tried(place, lambda ctx: ctx.try_block("t", lambda c: c.step(log.fail, "x", **ONCE)))
    assert found == {
        "ok": False, "kind": "exhausted", "source": "step", "step": "t/fail", "attempts": 1, "message": "no x",
    }  # fmt: skip


async def test_a_child_and_a_timeout_are_steps(place: Place) -> None:
    wait = lambda c: c.wait_for_signal("go", timeout=0)  # noqa: E731
    found = await tried(place, lambda ctx: ctx.try_block("t", wait))
    assert (found["source"], found["kind"]) == ("step", "timeout")


async def own(c: Context) -> None:
    await c.step(abs, -1)
    raise LookupError("of the block")


@pytest.mark.behaviour("RV-82")
async def test_an_error_of_the_block_itself_if_asked_for(place: Place) -> None:
    found = await tried(place, lambda ctx: ctx.try_block("t", own, catch=("block",)))
    assert (found["ok"], found["source"], found["kind"], found["message"]) == (False, "block", "error", "of the block")


async def test_an_error_of_the_block_itself_passes_through(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.try_block("t", own)
        except LookupError as error:
            await ctx.sleep(60)
            return str(error)
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "of the block"


@pytest.mark.parametrize("catch", [("step", "join", "race", "block"), ("rollback",)])
async def test_a_rollback_in_a_block(place: Place, log: Log, catch: tuple[str, ...]) -> None:
    async def inside(c: Context) -> None:
        await c.step(log.do, "x", compensate=log.undo)
        raise Rollback

    @workflow
    async def w(ctx: Context) -> Any:
        found = await ctx.try_block("t", inside, catch=catch)
        return found.failure.kind if found.failure else None

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        if catch == ("rollback",):
            assert await run.result(timeout=5) == "rollback"
            assert log == ["x"]  # it was caught: nothing is undone
        else:
            assert (await failure(run)).kind == "rollback"
            assert log == ["x", ("undo", "x")]


async def test_tries_within_tries(place: Place, log: Log) -> None:
    async def inner(c: Context) -> Any:
        found = await c.try_step(log.fail, "inner", **ONCE)
        assert not found.ok
        return await c.step(log.fail, "outer", name="outer", **ONCE)

    found = await tried(place, lambda ctx: ctx.try_block("t", inner))
    assert found["step"] == "t/outer"
    assert log == ["inner", "outer"]


@workflow
async def many(ctx: Context) -> list[bool]:
    results = [await ctx.try_step(int, "x", name=f"s{n}", retry=1) for n in range(2)]
    block = await ctx.try_block("t", lambda c: c.join("j", {"a": lambda d: d.step(int, "y", name="y", retry=1)}))
    return [*(r.ok for r in results), block.ok, (await ctx.try_step(int, "5")).value == 5]


async def test_tries_over_crashes(dsn: str) -> None:
    run = await crashing(dsn, many)
    status = await run.status()
    assert status.status == "completed", status


@pytest.mark.parametrize("catch", ["step", ["critical"]])
async def test_sources_that_there_are_not(live: Place, log: Log, catch: Any) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.try_block("t", lambda c: c.step(log.do, 1), catch=catch)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "catch=" in await fault(run)
