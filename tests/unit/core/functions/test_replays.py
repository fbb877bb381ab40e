"""What a replay must come to again, where that was not so at first: times, pruned loops, blocks that are retried."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.unit.core.functions.kit import deploy, fail, give, started
from tests.unit.core.model import START, Sim, World

from durable import Break, ChildFailed, Context, Retry, Rollback, StepFailed, workflow
from durable.core.state import Begun, Claim
from durable.define.function import WorkflowFunction
from durable.engine.claims import _seconds_to_next
from durable.values import Status, WaitingFor

AGAIN = Retry(max_attempts=3, initial=1.0, jitter=False)


def restarted(run: Sim) -> None:
    """What the worker remembered is gone."""
    workflow = run.view.workflow
    assert workflow is not None
    assert workflow.body is not None
    deploy(run, workflow.body)


def test_an_iteration_begins_when_the_one_before_it_ended() -> None:
    async def body(ctx: Context) -> list[datetime]:
        async def turn(c: Context, times: list[datetime]) -> Any:
            times = [*times, c.now()]
            await c.sleep(10)
            return Break(times) if len(times) == 3 else times

        times: list[datetime] = await ctx.loop("l", turn, [])
        return times

    run = started(body)
    for _ in range(3):
        restarted(run)
        run.world.skip(10)
    assert run.result == [f"2026-01-01T00:00:{s}Z" for s in ("00", "10", "20")]


def test_a_finished_loop_of_which_one_iteration_is_left() -> None:
    async def body(ctx: Context) -> Any:
        async def turn(c: Context, n: int) -> Any:
            n += int(c.now() > START)
            await c.sleep(1)
            return Break(n) if n == 2 else n

        count = await ctx.loop("l", turn, 0, history=1)
        await ctx.wait_for_signal("s")
        return count

    run = started(body)
    run.world.drive()
    assert [key for key in run.journal if key.startswith("l[")] == ["l[2]/sleep", "l[2]"]
    restarted(run)
    run.signal("s")
    run.world.drain()
    assert run.result == 2


def test_a_checkpoint_within_what_is_undone_is_a_new_one() -> None:
    async def body(ctx: Context) -> list[int]:
        outer = await ctx.checkpoint("outer")
        inner = await ctx.checkpoint("inner")
        await ctx.step(give)
        if inner == 0:
            raise Rollback(to="inner")
        if outer == 0:
            raise Rollback(to="outer")
        return [outer, inner]

    run = started(body)
    assert run.result == [1, 1]
    assert [key for key in run.journal if key.startswith(("inner", "give"))] == [
        "inner", "give", "give:r1", "inner:r2", "give:r2", "give:r3",
    ]  # fmt: skip


def test_a_rollback_to_what_is_no_checkpoint() -> None:
    async def body(ctx: Context) -> None:
        await ctx.checkpoint("here")
        raise Rollback(to="there")

    run = started(body)
    assert run.has(Status.FAILED)
    assert "no such checkpoint was passed in a part of the body that still runs; passed: 'here'" in run.error


def test_a_rollback_to_a_checkpoint_in_a_part_that_has_ended() -> None:
    """What came after that part would be undone, and not be done again."""

    async def inner(c: Context) -> None:
        await c.checkpoint("in")

    async def turn(c: Context, n: int) -> Any:
        await c.checkpoint(f"in{n}")
        return Break(n) if n else n + 1

    async def block(ctx: Context) -> None:
        await ctx.block("b", inner)
        raise Rollback(to="in")

    async def loop(ctx: Context) -> None:
        await ctx.checkpoint("in0")
        await ctx.loop("l", turn, 0)
        raise Rollback(to="in1")

    async def through_a_block(ctx: Context) -> int:
        async def back(c: Context) -> None:
            raise Rollback(to="in")

        times = await ctx.checkpoint("in")
        if not times:
            await ctx.block("b", back)
        return times

    assert "passed: none" in started(block).error
    assert "passed: 'in0'" in started(loop).error
    assert started(through_a_block).result == 1


def test_a_first_step_that_is_undone_at_once() -> None:
    """The run's first transition takes it from pending to its rollback."""
    undone: list[int] = []

    async def body(ctx: Context) -> None:
        await ctx.step(give, compensate=undone.append)
        raise ValueError("no")

    run = started(body)
    assert run.statuses == ["pending", "compensating", "failed"]
    assert undone == [1]


def test_a_retried_block_keeps_what_it_went_on_from() -> None:
    """A failure that was caught is no failure of the block: it is not taken up anew."""
    called = []

    async def counted(what: str) -> None:
        called.append(what)
        if what == "caught" or called.count(what) < 3:
            raise ValueError(what)

    async def inner(c: Context) -> None:
        try:
            await c.step(counted, "caught", name="caught", retry=1)
        except StepFailed:
            await c.step(give, name="instead")
        await c.step(counted, "flaky", name="flaky", retry=1)

    async def body(ctx: Context) -> None:
        await ctx.block("b", inner, retry=AGAIN)

    run = started(body)
    restarted(run)
    run.world.drive()
    assert run.has(Status.COMPLETED)
    assert called == ["caught", "flaky", "flaky", "flaky"]
    assert [attempt.step_id for attempt in run.attempts] == ["b", "b/flaky", "b", "b/flaky"]


def test_a_failure_while_another_is_handled() -> None:
    """What failed first was gone on from."""
    called = []

    async def counted(what: str) -> None:
        called.append(what)
        if what == "first" or called.count(what) < 2:
            raise ValueError(what)

    async def inner(c: Context) -> None:
        try:
            await c.step(counted, "first", name="first", retry=1)
        except StepFailed:
            await c.step(give)
            await c.step(counted, "second", name="second", retry=1)

    async def body(ctx: Context) -> None:
        await ctx.block("b", inner, retry=AGAIN)

    run = started(body)
    restarted(run)
    run.world.drive()
    assert run.has(Status.COMPLETED)
    assert called == ["first", "second", "second"]


def test_a_loop_in_a_retried_block_is_not_run_again() -> None:
    called = []

    async def counted(n: int) -> int:
        called.append(n)
        return n + 1

    async def turn(c: Context, n: int) -> Any:
        n = await c.step(counted, n)
        return Break(n) if n == 3 else n

    async def inner(c: Context) -> int:
        count: int = await c.loop("l", turn, 0, history=1)
        if len(called) == 3:
            called.append(-1)
            raise ValueError("once")
        return count

    async def body(ctx: Context) -> int:
        return await ctx.block("b", inner, retry=AGAIN)

    run = started(body, doubts=False)
    run.world.drive()
    assert run.result == 3
    assert called == [0, 1, 2, -1]


def test_a_child_of_a_retried_block_is_another_each_time() -> None:
    @workflow
    async def kid(ctx: Context) -> None:
        raise ValueError("no")

    async def body(ctx: Context) -> list[str]:
        try:
            await ctx.block("b", lambda c: c.child(kid), retry=AGAIN)
        except ChildFailed as error:
            return [error.status]
        return []

    run = started(body, None, kid)
    run.world.drive()
    assert run.result == ["failed"]
    assert len(run.world.runs) == 1 + 3


def test_a_block_within_a_retried_block_has_all_its_tries_each_time() -> None:
    async def body(ctx: Context) -> None:
        async def outer(c: Context) -> None:
            await c.block("inner", lambda i: i.step(fail, retry=1), retry=AGAIN)

        await ctx.block("outer", outer, retry=Retry(max_attempts=2, initial=1.0))

    run = started(body)
    run.world.drive()
    assert run.has(Status.FAILED)
    blocks = [attempt.step_id for attempt in run.attempts if attempt.step_id.count("/") < 2]
    assert blocks == ["outer/inner", "outer/inner", "outer", "outer/inner", "outer/inner"]


def test_branches_that_end_where_they_are_are_closed() -> None:
    closed = []

    async def waits(c: Context) -> None:
        try:
            await c.wait_for_signal("never")
        finally:
            closed.append(c.run_id)

    async def goes_back(c: Context) -> None:
        await c.step(give)
        raise Rollback

    async def body(ctx: Context) -> None:
        await ctx.join("j", {"x": waits, "y": goes_back})

    run = started(body, doubts=False)
    assert run.has(Status.FAILED)
    assert closed
    assert not run.world.held


def test_what_has_come_due_does_not_keep_an_owner_awake() -> None:
    """The wait of a block's last try stays in the frame while the block runs."""

    async def body(ctx: Context) -> None:
        await ctx.wait_for_signal("s", timeout=timedelta(seconds=30))

    run = started(body)
    past = Begun(attempts=1, due=run.world.now, waits=WaitingFor.RETRY)
    now = run.world.now
    assert _seconds_to_next(_with(run, past=past), now, now) == 30
    assert _seconds_to_next(_with(run, past=past), now - timedelta(seconds=1), now) == 0  # it was not due when planned
    assert _seconds_to_next(_with(started(_nothing), past=past), now, now) is None


async def _nothing(ctx: Context) -> None:
    return None


def _with(run: Sim, **frame: Begun) -> Any:
    claimed = replace(run.run, frame={**run.run.frame, **frame}, claim=Claim(1, run.id))
    return replace(run.view, run=claimed)


def test_children_and_waits_side_by_side_wait_for_the_same_thing_later() -> None:
    """Else every wake-up would be a transition that only changes what the run is said to wait for."""

    @workflow
    async def kid(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    async def body(ctx: Context) -> None:
        await ctx.join("j", {"x": lambda c: c.map("m", kid, [None]), "y": lambda c: c.child(kid)})

    run = started(body, None, kid)
    before = run.run.revision
    run.world.skip(5)
    run.signal("noise")
    run.world.drain()
    assert run.run.revision == before


def two_versions(old: Any, new: Any) -> tuple[World, WorkflowFunction[Any, Any]]:
    made: WorkflowFunction[Any, Any] = workflow(name="w")(old)
    later: WorkflowFunction[Any, Any] = workflow(name="w", version="2")(new)
    return World(made), later


def test_a_run_goes_on_as_new_in_the_newest_version() -> None:
    async def old(ctx: Context, n: int) -> None:
        await ctx.step(give)
        ctx.continue_as_new(n + 1)

    async def new(ctx: Context, n: int) -> list[Any]:
        return [n, await ctx.wait_for_signal("s")]

    world, later = two_versions(old, new)
    run = world.start("w", 1)
    run.signal("s", "told the first one")
    world.registry.add(later)
    world.drain()
    assert run.run.successor is not None
    assert world.runs[run.run.successor].result == [2, "told the first one"]
    assert run.signal("late") is False


@pytest.mark.parametrize("of_the_run", [False, True])
def test_a_failure_that_was_handled_before_the_code_gave_up(of_the_run: bool) -> None:
    """The retry takes up the step that led to the error; the steps between both are not on its way any more."""
    called = []

    async def counted() -> None:
        called.append(1)
        if len(called) == 1:
            raise ValueError("once")

    async def inner(c: Context) -> str:
        try:
            await c.step(counted, retry=1)
        except StepFailed as error:
            await c.step(give, name="handle")
            raise RuntimeError("given up") from error
        return "done"

    async def body(ctx: Context) -> str:
        return await ctx.block("b", inner, retry=None if of_the_run else AGAIN)

    run = started(body)
    if of_the_run:
        assert run.retry() == "accepted"
    run.world.drive()
    assert run.has(Status.COMPLETED), run.waits()
    assert run.result == "done"
