"""What function runs rest on beside `test_laws.py`, one test each: without any of these a replay finds another story
than the one that happened.

`python -m tests.mutants` breaks each of them on purpose, and expects these tests to see it.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import pytest
from tests import invariants
from tests.engine.kit import Bench, Facts, until, working

from durable import Break, Context, Retry, Rollback, StepContext, workflow
from durable.core.functions.body import SUSPECT
from durable.core.transition import Call, Purpose
from durable.define.nodes import Work
from durable.values import Status

log: list[Any] = []


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    log.clear()


def restart(bench: Bench) -> None:
    """Whatever comes now is decided by a replay."""
    bench.engine.bodies.close()


async def result(run: Any) -> Any:
    """Of a run that has completed."""
    status = await run.status()
    assert status.status == "completed", status
    return await run.result()


async def do(what: Any) -> Any:
    log.append(what)
    return what


async def undo(output: Any, *args: Any) -> None:
    log.append(("undo", output))


# ---------------------------------------------------------------- messages


async def test_a_message_is_taken_once(dsn: str, facts: Facts) -> None:
    @workflow
    async def twice(ctx: Context) -> list[Any]:
        return [await ctx.wait_for_signal("go"), await ctx.wait_for_signal("go")]

    async with working(dsn, twice) as bench:
        run = await bench.app.start(twice)
        await run.signal("go", 1)
        await bench.drain()
        assert (await run.status()).status is Status.SUSPENDED
        assert facts.journal(run) == ["go"]
        await run.signal("go", 2)
        await bench.drain()
        assert await result(run) == [1, 2]


async def test_a_message_that_is_to_be_completed_is_there_for_nobody_else(dsn: str, facts: Facts) -> None:
    @workflow
    async def both(ctx: Context) -> list[Any]:
        (first,) = await ctx.receive("question", completable=True)
        (second,) = await ctx.receive("question")
        await first.complete("done")
        return [first.body, second.body]

    async with working(dsn, both) as bench:
        run = await bench.app.start(both)
        await run.signal("question", 1)
        await bench.drain()
        assert (await run.status()).status is Status.SUSPENDED
        invariants.check(dsn)
        restart(bench)
        await run.signal("question", 2)
        await bench.drain()
        assert await result(run) == [1, 2]
    facts.check_rest()
    invariants.check(dsn)


# ---------------------------------------------------------------- what is written


async def test_a_steps_entry_goes_out_with_what_follows_from_it(dsn: str, facts: Facts) -> None:
    @workflow
    async def one(ctx: Context) -> Any:
        return await ctx.block("part", lambda c: c.step(do, "a"))

    async with working(dsn, one) as bench:
        run = await bench.app.start(one)
        await bench.drain()
        assert await result(run) == "a"
        assert facts.journal(run) == ["part/do", "part", "run:result"]
        assert facts.run(run)["revision"] == 1
    invariants.check(dsn)


async def test_what_is_pruned_before_it_was_written_is_never_written(dsn: str, facts: Facts) -> None:
    """Entries that wait for the next write, and iterations that end within one transition."""

    @workflow
    async def loops(ctx: Context) -> list[Any]:
        async def cheap(c: Context, n: int) -> Any:
            await c.step(do, n, ephemeral=True)
            return Break(n) if n == 9 else n + 1

        async def at_once(c: Context, n: int) -> Any:
            await c.sleep(0)
            return Break(n) if n == 9 else n + 1

        found = [await ctx.loop("cheap", cheap, 0, history=2), await ctx.loop("at once", at_once, 0, history=2)]
        await ctx.wait_for_signal("go")
        return found

    async with working(dsn, loops) as bench:
        run = await bench.app.start(loops)
        await bench.drain()
        loop = ["cheap[8]/do", "cheap[9]/do", "cheap[8]", "cheap[9]", "cheap"]
        assert sorted(facts.journal(run)) == sorted(
            [*loop, *(key.replace("cheap", "at once").replace("/do", "/sleep") for key in loop)]
        )
        restart(bench)
        await run.signal("go")
        await bench.drain()
        assert await result(run) == [9, 9]
        assert log == [*range(10)]
    invariants.check(dsn)


async def test_a_loser_that_was_not_written_yet_never_is(dsn: str, facts: Facts) -> None:
    @workflow
    async def racing(ctx: Context) -> str:
        async def slow(c: Context) -> None:
            await c.sleep(0)
            await c.wait_for_signal("never")

        async def fast(c: Context) -> None:
            await c.sleep(0)

        return (await ctx.race("race", {"slow": slow, "fast": fast})).winner

    async with working(dsn, racing) as bench:
        run = await bench.app.start(racing)
        await bench.drain()
        assert await result(run) == "fast"
        assert facts.journal(run) == ["race/fast/sleep", "race/fast", "race", "run:result"]
    invariants.check(dsn)


async def test_a_block_that_was_retried_is_begun_no_more(dsn: str, facts: Facts) -> None:
    async def second() -> int:
        log.append("try")
        if log.count("try") < 2:
            raise RuntimeError("the first time")
        return 7

    @workflow
    async def retried(ctx: Context) -> Any:
        part = await ctx.block("part", lambda c: c.step(second, retry=1), retry=Retry(max_attempts=2, initial=5))
        await ctx.wait_for_signal("go")
        return part

    async with working(dsn, retried) as bench:
        run = await bench.app.start(retried)
        await bench.drain()
        await bench.skip(seconds=6)
        await bench.drain()
        assert list(facts.run(run)["frame"]) == ["go"]
        invariants.check(dsn)
        restart(bench)
        await run.signal("go")
        await bench.drain()
        assert await result(run) == 7


# ---------------------------------------------------------------- what is read back


async def test_the_winner_of_a_race_stays_the_winner(dsn: str, facts: Facts) -> None:
    """Both branches end in one transition, that of the second one first: by the journal's order it would have won."""

    async def when_y_sleeps(ctx: StepContext[Any]) -> None:
        await until(lambda: "race/y/sleep" in facts.run(ctx.run_id)["frame"])

    @workflow
    async def racing(ctx: Context) -> str:
        async def x(c: Context) -> None:
            await c.step(when_y_sleeps, compensate=undo)
            await c.sleep(60)

        async def y(c: Context) -> None:
            await c.step(do, "y", compensate=undo)
            await c.sleep(60)

        won = await ctx.race("race", {"x": x, "y": y})
        await ctx.wait_for_signal("go")
        return won.winner

    async with working(dsn, racing) as bench:
        run = await bench.app.start(racing)
        await bench.drain()
        await bench.skip(seconds=90)
        await bench.drain()
        keys = facts.journal(run)
        assert keys.index("race/y/sleep") < keys.index("race/x/sleep")
        (race,) = [step for step in (await run.status()).steps if step.step_id == "race"]
        restart(bench)
        await run.signal("go")
        await bench.drain()
        assert race.result == {"winner": await result(run), "value": None}
    invariants.check(dsn)


async def test_a_patch_is_taken_by_the_run_that_took_it(dsn: str, facts: Facts) -> None:
    @workflow
    async def patched(ctx: Context) -> list[Any]:
        new = ctx.patched("better")
        await ctx.step(do, "new" if new else "old", name="new" if new else "old")
        await ctx.wait_for_signal("go")
        return [new, log]

    async with working(dsn, patched) as bench:
        run = await bench.app.start(patched)
        await bench.drain()
        restart(bench)
        await run.signal("go")
        await bench.drain()
        assert await result(run) == [True, ["new"]]


async def test_code_that_has_lost_an_operation_parks_the_run(dsn: str, facts: Facts) -> None:
    @workflow(name="changes")
    async def before(ctx: Context) -> None:
        await ctx.step(do, "a")
        await ctx.wait_for_signal("go")

    @workflow(name="changes")
    async def after(ctx: Context) -> None:
        await ctx.wait_for_signal("go")

    async with working(dsn, before) as bench:
        run = await bench.app.start("changes")
        await bench.drain()
    async with working(dsn, after) as bench:
        await bench.app.signal(run.id, "go")
        await bench.drain()
        status = await bench.app.status(run.id)
        assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "person", "HistoryDiverged")
        assert "step 'do'" in str(status.error)


async def test_a_body_is_of_no_use_once_another_worker_had_the_run(dsn: str, facts: Facts) -> None:
    @workflow
    async def passed_on(ctx: Context) -> list[Any]:
        found = []
        for name in ("a", "b", "c"):
            await ctx.wait_for_signal(name)
            found.append(await ctx.step(do, name))
        return found

    async with working(dsn, passed_on) as one, working(dsn, passed_on) as other:
        run = await one.app.start(passed_on)
        await one.drain()
        for bench, name in ((other, "a"), (one, "b"), (other, "c")):
            await run.signal(name)
            await bench.drain()
            assert log[-1:] == [name]
        assert await result(run) == log == ["a", "b", "c"]


# ---------------------------------------------------------------- rollback


async def test_each_step_is_undone_once_and_in_reverse(dsn: str, facts: Facts) -> None:
    """Old iterations are kept for that."""

    @workflow
    async def saga(ctx: Context) -> None:
        async def turn(c: Context, n: int) -> Any:
            await c.step(do, n, compensate=undo if n == 1 else None)
            return Break(n) if n == 9 else n + 1

        await ctx.step(do, "a", compensate=undo)
        await ctx.loop("loop", turn, 0, history=2)
        await ctx.step(do, "b", compensate=undo)
        await ctx.sleep(timedelta(hours=1))
        raise RuntimeError("all for nothing")

    async with working(dsn, saga) as bench:
        run = await bench.app.start(saga)
        await bench.drain()
        invariants.check(dsn)
        restart(bench)
        await bench.skip(hours=2)
        await bench.drain()
        assert (await run.status()).status == "failed"
        assert log == ["a", *range(10), "b", ("undo", "b"), ("undo", 1), ("undo", "a")]
    invariants.check(dsn)


async def test_what_a_checkpoint_has_undone_is_not_undone_again(dsn: str, facts: Facts) -> None:
    @workflow
    async def there_and_back(ctx: Context) -> None:
        await ctx.step(do, "a", compensate=undo)
        times = await ctx.checkpoint("here")
        await ctx.step(do, f"b{times}", compensate=undo)
        raise Rollback(to=None if times else "here")

    async with working(dsn, there_and_back) as bench:
        run = await bench.app.start(there_and_back)
        await bench.drain()
        assert (await run.status()).status == "failed"
        assert log == ["a", "b0", ("undo", "b0"), "b1", ("undo", "b1"), ("undo", "a")]
    invariants.check(dsn)


# ---------------------------------------------------------------- crashes


async def test_a_body_that_may_have_killed_is_not_driven_beside_another_suspect(dsn: str, facts: Facts) -> None:
    @workflow
    async def suspected(ctx: Context) -> Any:
        log.append("driven")
        return await ctx.step(do, "a")

    watched = Call("step", Purpose.STEP, Work(do), crashes=2)
    async with working(dsn, suspected) as bench:
        run = await bench.app.start(suspected)
        facts.execute("update durable.runs set frame = %s where id = %s", f'{{"{SUSPECT}": {{"crashes": 1}}}}', run.id)
        with bench.engine.suspects.admit(uuid.uuid4(), watched):
            await bench.drain()
            assert log == []
            assert (await run.status()).waiting_for == "retry"
        await bench.skip(seconds=2)
        await bench.drain()
        assert await result(run) == "a"
