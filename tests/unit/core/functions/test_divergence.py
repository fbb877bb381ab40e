"""Code that no longer is what a run has passed: it waits for a person, who may bring the old code back, and retry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.core.functions.kit import deploy, give, started

from durable import Break, Context, StepFailed
from durable.values import Status, WaitingFor


async def recorded(ctx: Context) -> str:
    """The old code: one of each, then a wait."""

    async def turn(c: Context, n: int) -> Any:
        await c.step(give)
        return Break(n) if n == 1 else n + 1

    await ctx.step(give, name="a")
    await ctx.join("j", {"x": lambda c: c.step(give), "y": lambda c: c.step(give)})
    await ctx.race("r", {"x": lambda c: c.step(give), "y": lambda c: c.wait_for_signal("never")})
    await ctx.loop("l", turn, 0)
    await ctx.wait_for_signal("s")
    return "old"


async def without_a_step(ctx: Context) -> None:
    await ctx.join("j", {"x": lambda c: c.step(give), "y": lambda c: c.step(give)})


async def that_ends(ctx: Context) -> None:
    return None


async def that_fails(ctx: Context) -> None:
    raise ValueError("new")


async def with_a_sleep_instead(ctx: Context) -> None:
    await ctx.sleep(1, name="a")


async def with_another_winner(ctx: Context) -> None:
    await ctx.step(give, name="a")
    await ctx.join("j", {"x": lambda c: c.step(give), "y": lambda c: c.step(give)})
    await ctx.race("r", {"z": lambda c: c.step(give)})


async def with_another_state(ctx: Context) -> None:
    async def turn(c: Context, n: list[str]) -> Any:
        await c.step(give)
        return Break(n)

    await ctx.step(give, name="a")
    await ctx.join("j", {"x": lambda c: c.step(give), "y": lambda c: c.step(give)})
    await ctx.race("r", {"x": lambda c: c.step(give), "y": lambda c: c.wait_for_signal("never")})
    await ctx.loop("l", turn, ["a"])


async def with_another_result(ctx: Context) -> None:
    async def text() -> str:
        return "text"

    await ctx.step(text, name="a")


async def that_removed_something_else(ctx: Context) -> None:
    ctx.removed("a", "sleep")


NEW: list[tuple[Callable[..., Any], str, str]] = [
    (without_a_step, "step 'a'", "its end"),
    (that_ends, "step 'a'", "its end"),
    (that_fails, "step 'a'", "its end"),
    (with_a_sleep_instead, "step 'a'", "sleep 'a'"),
    (with_another_winner, "race 'r' won by 'x'", "a race without that branch"),
    (with_another_state, "the state of 'l[0]'", "a type that it is not of"),
    (with_another_result, "the result of step 'a'", "a type that it is not of"),
    (that_removed_something_else, "step 'a'", "a removed sleep 'a'"),
]


@pytest.mark.parametrize(("new", "expected", "found"), [pytest.param(*row, id=row[0].__name__) for row in NEW])
def test_the_run_waits_for_a_person(new: Callable[..., Any], expected: str, found: str) -> None:
    run = started(recorded)
    assert run.waits() == (WaitingFor.SIGNAL, "s")
    deploy(run, new)
    run.signal("s")
    run.world.drain()
    assert run.has(Status.SUSPENDED)
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    assert run.run.error is not None
    details = run.run.error.details or {}
    assert expected in details["expected"]
    assert found in details["found"]
    deploy(run, recorded)
    assert run.retry() == "accepted"
    run.world.drain()
    assert run.result == "old"


def test_code_that_says_what_it_removed() -> None:
    async def new(ctx: Context) -> str:
        for name, kind in (("a", "step"), ("j", "join"), ("r", "race"), ("l", "loop"), ("s", "signal")):
            ctx.removed(name, kind)
        await ctx.removed("never", "sleep")
        return "new"

    run = started(recorded)
    deploy(run, new)
    run.signal("s")
    run.world.drain()
    assert run.result == "new"


def test_a_patched_path_is_for_runs_that_come_there_first() -> None:
    async def new(ctx: Context) -> list[bool]:
        before = ctx.patched("before")
        await ctx.step(give, name="a")
        return [before, ctx.patched("before"), ctx.patched("after")]

    async def old(ctx: Context) -> list[bool]:
        await ctx.step(give, name="a")
        await ctx.wait_for_signal("s")
        return []

    async def newer(ctx: Context) -> list[bool]:
        before = ctx.patched("before")
        await ctx.step(give, name="a")
        await ctx.wait_for_signal("s")
        return [before, ctx.patched("before"), ctx.patched("after")]

    assert started(new).result == [True, True, True]
    run = started(old)
    deploy(run, newer)
    run.signal("s")
    run.world.drain()
    assert run.result == [False, False, True]


def test_a_compensator_that_is_gone() -> None:
    undone: list[Any] = []

    async def old(ctx: Context) -> None:
        await ctx.step(give, compensate=undone.append)
        await ctx.wait_for_signal("s")
        raise ValueError("no")

    async def new(ctx: Context) -> None:
        await ctx.step(give)
        await ctx.wait_for_signal("s")
        raise ValueError("no")

    run = started(old)
    deploy(run, new)
    run.signal("s")
    run.world.drain()
    assert run.has(Status.COMPENSATING)
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    assert undone == []


def test_a_failure_in_a_step_that_the_code_does_not_catch_any_more() -> None:
    """That is no divergence: the run fails as the code says."""

    async def no() -> None:
        raise ValueError("no")

    async def old(ctx: Context) -> None:
        try:
            await ctx.step(no, retry=1)
        except StepFailed:
            await ctx.wait_for_signal("s")

    async def new(ctx: Context) -> None:
        await ctx.step(no, retry=1)

    run = started(old)
    deploy(run, new)
    run.signal("s")
    run.world.drain()
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged"), "it had come further"
