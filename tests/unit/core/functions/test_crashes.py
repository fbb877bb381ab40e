"""Workers that die of a body, or of its steps; and bodies that clean up after a cancel."""

from __future__ import annotations

from typing import Any

from tests.unit.core.functions.kit import give, of
from tests.unit.core.model import Crash, World

from durable import Canceled, Context, Rollback
from durable.values import Status, WaitingFor


def test_a_body_that_kills_its_worker_fails_in_the_end() -> None:
    deaths = []

    async def body(ctx: Context) -> None:
        deaths.append(ctx.run_id)
        world.dies = True
        await ctx.step(give, name="never")

    world = World(of(body), max_crashes=3, doubts=False)
    run = world.start("w")
    world.drive()
    assert run.has(Status.FAILED)
    assert "the worker died 3 times while the body itself ran" in run.error
    assert len(deaths) == 3


def test_a_body_that_survives_is_cleared_of_it() -> None:
    """A crash is charged to the step, once the body has come through."""

    async def dies(ctx: Any = None) -> None:
        raise Crash

    async def body(ctx: Context) -> None:
        await ctx.step(dies)

    world = World(of(body), max_crashes=3)
    run = world.start("w")
    world.drive()
    assert run.has(Status.FAILED)
    assert run.error.startswith("StepInterrupted: step 'dies'")
    assert [(attempt.step_id, attempt.kind) for attempt in run.attempts] == [("dies", "interrupted")] * 3


def test_repeated_deaths_of_a_body_back_off() -> None:
    async def body(ctx: Context) -> None:
        world.dies = True

    world = World(of(body), max_crashes=5, doubts=False)
    run = world.start("w")
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "run:body")
    assert run.run.wake_at is not None
    assert run.run.wake_at > world.now


def cleaning(cleaned: list[str]) -> Any:
    async def clean(what: str) -> None:
        cleaned.append(what)

    async def body(ctx: Context) -> None:
        await ctx.step(give, compensate=lambda output: cleaned.append("undone"))
        try:
            await ctx.wait_for_signal("s")
        except Canceled:
            await ctx.step(clean, "up", on_cancel=True)
            await ctx.step(clean, "no such thing")

    return body


def test_a_canceled_body_cleans_up() -> None:
    cleaned: list[str] = []
    world = World(of(cleaning(cleaned)))
    run = world.start("w")
    world.drain()
    assert run.run.cleanup
    assert run.cancel("enough")
    world.drain()
    assert run.has(Status.CANCELED)
    assert run.run.reason == "enough"
    assert cleaned == ["up"]


def test_after_its_clean_up_it_is_undone_if_that_was_asked_for() -> None:
    cleaned: list[str] = []
    world = World(of(cleaning(cleaned)))
    run = world.start("w")
    world.drain()
    assert run.cancel("enough", compensate=True)
    world.drain()
    assert run.has(Status.CANCELED)
    assert cleaned == ["up", "undone"]


def test_a_clean_up_has_its_time() -> None:
    async def busy() -> None:
        raise ValueError("busy")

    async def body(ctx: Context) -> None:
        try:
            await ctx.wait_for_signal("s")
        finally:
            await ctx.step(busy, on_cancel=True, retry=1_000)

    world = World(of(body, cancel_timeout=5))
    run = world.start("w")
    world.drain()
    assert run.cancel("enough")
    world.drain()
    assert run.has(Status.SUSPENDED)
    began = world.now
    world.drive()
    assert run.has(Status.CANCELED)
    assert (world.now - began).total_seconds() == 5


def test_a_body_without_clean_up_is_canceled_at_once() -> None:
    async def body(ctx: Context) -> None:
        await ctx.wait_for_signal("s")

    world = World(of(body))
    run = world.start("w")
    world.drain()
    assert run.cancel("enough")
    assert run.has(Status.CANCELED)


def test_branches_are_canceled_too() -> None:
    seen: list[str] = []

    async def waits(c: Context) -> None:
        try:
            await c.wait_for_signal("s")
        except Canceled:
            seen.append("branch")
            raise

    async def body(ctx: Context) -> None:
        try:
            await ctx.join("j", {"x": waits, "y": waits})
        except Canceled:
            seen.append("body")
            raise

    world = World(of(body), doubts=False)
    run = world.start("w")
    world.drain()
    run.cancel("enough")
    world.drain()
    assert run.has(Status.CANCELED)
    assert seen == ["branch", "branch", "body"]


def test_a_rollback_that_a_step_asks_for_is_caught_only_if_that_is_said() -> None:
    async def goes_back() -> None:
        raise Rollback

    async def body(ctx: Context) -> list[Any]:
        result = await ctx.try_step(goes_back, catch=("rollback",))
        assert result.failure is not None
        first = [result.failure.kind, result.failure.source]
        await ctx.try_step(goes_back)
        return first

    world = World(of(body))
    run = world.start("w")
    world.drain()
    assert run.has(Status.FAILED)
    assert run.run.error is not None
    assert run.run.error.kind == "rollback"
    assert run.keys("failed") == ["goes_back", "goes_back#2"]
