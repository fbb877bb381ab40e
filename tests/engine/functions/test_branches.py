"""``ctx.block``, ``ctx.join``, ``ctx.race``, ``ctx.child`` and ``ctx.map``: what runs side by side, and within."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failed_with, failure, fault
from tests.engine.kit import Facts, soon, until

from durable import (
    All,
    Break,
    ChildFailed,
    Context,
    Failures,
    First,
    JoinFailed,
    RaceFailed,
    Retry,
    Rollback,
    StepContext,
    StepFailed,
    define,
    workflow,
)

LATER = Retry(max_attempts=3, initial=5, jitter=False)


# ---------------------------------------------------------------- blocks


async def test_a_block_nests_and_says_its_parent(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        async def deep(c: Context) -> Any:
            async def deeper(d: Context) -> Any:
                await d.sleep(60)
                return await d.step(log.do, "in")

            return [await c.step(log.do, "out"), await c.block("deeper", deeper)]

        return await ctx.block("deep", deep)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).waiting_name == "deep/deeper/sleep"
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == ["out", "in"]
        parents = {r["step_id"]: r["parent"] for r in facts.rows("select step_id, parent from durable.journal")}
        assert parents == {
            "deep/do": "deep",
            "deep/deeper/sleep": "deep/deeper",
            "deep/deeper/do": "deep/deeper",
            "deep/deeper": "deep",
            "deep": None,
            "run:result": None,
        }


async def test_a_retried_block_takes_up_what_failed_only(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def both(c: Context) -> Any:
            await c.step(log.do, "once")
            return await c.step(log.flaky("x", 2), **ONCE)

        return await ctx.block("b", both, retry=LATER)

    async with place.working(w) as b:
        run = await b.app.start(w)
        for seconds in (6, 11, 0):
            await b.drain()
            status = await run.status()
            if seconds:
                assert (status.waiting_for, status.waiting_name) == ("retry", "b")
            await b.skip(seconds=seconds)
        assert await run.result(timeout=5) == "x"
        assert log == ["once", "x", "x", "x"]
        assert facts.attempts(run) == [
            ("b", "failed", 1), ("b/flaky", "failed", 1), ("b", "failed", 2), ("b/flaky", "failed", 1),
        ] or facts.attempts(run).count(("b", "failed", 2)) == 1  # fmt: skip


async def test_a_block_out_of_attempts(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.block("b", lambda c: c.step(log.fail, "x", **ONCE), retry=Retry(max_attempts=2, initial=0))
        except StepFailed as error:
            return [error.step, len(log)]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == ["b/fail", 2]


async def test_a_critical_error_is_not_retried_by_a_block(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.block("b", lambda c: c.step(log.refuse, "x"), retry=5)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).kind == "critical"
        assert log == ["x"]


@workflow
async def nested(ctx: Context) -> Any:
    """Everything in everything, three deep."""

    async def turn(c: Context, n: int) -> int | Break[int]:
        parts = await c.join("both", {"a": lambda d: race(d, n), "b": lambda d: d.block("b", lambda e: e.step(abs, n))})
        total = parts["a"] + parts["b"]
        return Break(total) if n == 2 else n + 1

    async def race(c: Context, n: int) -> int:
        won = await c.race("r", {"quick": lambda d: d.step(abs, -n), "slow": lambda d: d.sleep(9_999)})
        tried = await c.try_block("t", lambda d: d.step(divide, n, 0, retry=1))
        assert not tried.ok
        return int(won.value or 0)

    return await ctx.loop("turns", turn, 0)


async def divide(a: int, b: int) -> float:
    return a / b


async def test_nesting_over_crashes(dsn: str) -> None:
    run = await crashing(dsn, nested)
    assert (await run.status()).status == "completed", await run.status()


async def test_nesting(place: Place, facts: Facts) -> None:
    async with place.working(nested) as b:
        run = await b.app.start(nested)
        await b.drain()
        assert await run.result(timeout=5) == 4
        assert not any("slow" in key for key in facts.journal(run))
        assert facts.run(run)["frame"] == {}


# ---------------------------------------------------------------- join


async def test_a_join(place: Place, facts: Facts, log: Log) -> None:
    together = asyncio.Barrier(3)

    async def meet(n: int) -> int:
        await soon(together.wait())  # only if all of them run at once
        return n

    @workflow
    async def w(ctx: Context) -> dict[str, int]:
        return await ctx.join("j", {f"b{n}": _one(n, meet) for n in range(3)})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == {"b0": 0, "b1": 1, "b2": 2}
        (join,) = (await run.status()).steps
        assert (join.kind, join.result) == ("join", {"b0": 0, "b1": 1, "b2": 2})
        assert sorted(c.step_id for c in join.children) == ["j/b0", "j/b1", "j/b2"]


def _one(n: int, fn: Any) -> Any:
    return lambda c: c.step(fn, n)


@pytest.mark.behaviour("RV-61", "RV-62")
async def test_all_branches_are_allowed_to_end(place: Place, log: Log) -> None:
    failed = asyncio.Event()

    async def bad() -> None:
        failed.set()
        raise ValueError("bad")

    async def good() -> int:
        await soon(failed.wait())
        return 1

    async def slow(c: Context) -> None:
        await c.step(good)
        await c.step(log.do, "to its end")

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "before")
        await ctx.join("j", {"bad": lambda c: c.step(bad, **ONCE), "good": slow})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        for _ in range(2):  # live, and as recorded
            assert (await failure(run)).type == "durable.errors.JoinFailed"
            assert [*(await failure(run)).details["branches"]] == ["bad"]
            assert "bad" in str(await failed_with(run))
        assert log == ["before", "to its end"]


async def test_what_a_join_raises(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        branches = {"a": lambda c: c.step(log.refuse, "a"), "b": lambda c: c.step(log.do, "b"), "c": _lost}
        try:
            await ctx.join("j", branches)
        except JoinFailed as error:
            await ctx.sleep(60)
            await ctx.step(log.do, "after")
            return {name: told["type"] for name, told in error.failures.items()}

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == {"a": "durable.errors.NonRetryable", "c": "LookupError"}


async def _lost(c: Context) -> None:
    raise LookupError("lost")


@pytest.mark.behaviour("RV-64")
async def test_a_join_in_a_branch(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def inner(c: Context) -> int:
            parts = await c.join("in", {str(n): _one(n, log.do) for n in (1, 2, 3)})
            return sum(parts.values())

        return (await ctx.join("out", {"sum": inner}))["sum"]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == 6


@pytest.mark.behaviour("RV-65")
async def test_a_race_in_a_branch(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def inner(c: Context) -> str:
            won = await c.race("in", {"slow": lambda d: d.sleep(100), "quick": lambda d: d.step(log.do, "plain")})
            return f"winner:{won.value}"

        return str((await ctx.join("out", {"race": inner}))["race"])

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == "winner:plain"


async def test_it_parks_only_when_no_branch_can_move(place: Place, facts: Facts, log: Log) -> None:
    """A sleep, a retry, a signal, a child, side by side with steps that go on."""

    async def long(c: Context) -> None:
        for n in range(3):
            await c.step(log.do, n)

    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        return await ctx.join(
            "j",
            {
                "sleep": lambda c: c.sleep(5),
                "retry": lambda c: c.step(log.flaky("x", 1), retry=LATER),
                "signal": lambda c: c.wait_for_signal("go"),
                "child": lambda c: c.child(napping),
                "long": long,
            },
        )

    async with place.working(w, napping) as b:
        run = await b.app.start(w)
        await b.drain()
        assert [n for n in log if n != "x"] == [0, 1, 2]
        status = await run.status()
        assert status.status == "suspended"
        assert status.wake_at is not None
        assert facts.value("select count(*) from durable.runs where claim_token is not null") == 0
        await b.skip(seconds=6)
        await b.drain()
        assert log.count("x") == 2
        await run.signal("go", 1)
        await b.drain()
        assert (await run.status()).status == "suspended"
        await b.skip(seconds=60)
        await b.drain()
        assert await run.result(timeout=5) == {
            "sleep": None,
            "retry": "x",
            "signal": 1,
            "child": "rested",
            "long": None,
        }
        assert [n for n in log if n != "x"] == [0, 1, 2]


@workflow
async def napping(ctx: Context) -> str:
    await ctx.sleep(30)
    return "rested"


async def test_a_retry_of_the_run_takes_up_the_branch_that_failed(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        try:
            await ctx.step(log.fail, "caught", **ONCE)
        except StepFailed:
            await ctx.step(log.do, "went on")
        return await ctx.join(
            "j", {"a": lambda c: c.step(log.do, "a"), "b": lambda c: c.step(log.flaky("b", 1), **ONCE)}
        )

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.JoinFailed"
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == {"a": "a", "b": "b"}
        assert {what: log.count(what) for what in log} == {"caught": 1, "went on": 1, "a": 1, "b": 2}


async def test_results_do_not_depend_on_which_branch_ends_first(place: Place) -> None:
    """Keys are of the branch: two branches with the same steps, the first is the slower one."""
    order: list[str] = []
    second = asyncio.Event()

    async def work(ctx: StepContext[Any], which: str) -> str:
        if which == "first" and not second.is_set():
            await soon(second.wait())
        order.append(ctx.step_id)
        if ctx.step_id == "j/second/work#2":
            second.set()
        return f"{which} {ctx.step_id}"

    async def two(c: Context, which: str) -> list[str]:
        return [await c.step(work, which), await c.step(work, which), str(c.random.random()), str(c.uuid4())]

    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        found = await ctx.join("j", {"first": lambda c: two(c, "first"), "second": lambda c: two(c, "second")})
        await ctx.sleep(60)
        return found

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        before = (await run.status()).steps[0].result
        await b.skip(seconds=61)
        await b.drain()
        found = await run.result(timeout=5)
        assert found == before
        assert found["first"][:2] == ["first j/first/work", "first j/first/work#2"]
        assert found["second"][:2] == ["second j/second/work", "second j/second/work#2"]
        assert found["first"][2] != found["second"][2]
        assert order[:2] == ["j/second/work", "j/second/work#2"]


async def test_the_outer_context_in_a_branch(live: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"a": lambda c: ctx.step(log.do, 1)})

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "context of the code around it" in await fault(run)
        assert log == []


@pytest.mark.parametrize("branches", [{}, None, ["a"], {"a": 5}, {"a/b": abs}])
async def test_what_are_no_branches(place: Place, branches: Any) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", branches)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await failure(run)


async def test_a_branch_that_is_no_async_function(live: Place) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"a": lambda c: 5})  # type: ignore[dict-item, return-value]

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "async function" in await fault(run)


# ---------------------------------------------------------------- race


@pytest.mark.behaviour("RV-67", "RV-68", "RV-70")
async def test_a_race(place: Place, facts: Facts, log: Log) -> None:
    started = asyncio.Event()
    canceled = asyncio.Event()

    async def slow() -> None:
        log.append("slow")
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            canceled.set()
            raise

    async def fast() -> str:
        await soon(started.wait())
        log.append("fast")
        return "fast"

    @workflow
    async def w(ctx: Context) -> list[Any]:
        won = await ctx.race("r", {"slow": lambda c: c.step(slow), "fast": lambda c: c.step(fast)})
        await ctx.sleep(60)
        return [won.winner, won.value]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert canceled.is_set()
        assert facts.journal(run) == ["r/fast/fast", "r/fast", "r"]
        assert [*facts.run(run)["frame"]] == ["sleep"]
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == ["fast", "fast"]
        assert log == ["slow", "fast"]
        assert "branch_discarded" in [e.kind for e in await run.history()]


async def test_sync_losers_see_that_they_lost(place: Place, log: Log) -> None:
    import threading

    started = threading.Event()

    def slow(ctx: StepContext[Any]) -> None:
        started.set()
        while not ctx.cancelled:
            pass
        log.append("seen")

    def fast() -> str:
        assert started.wait(30)
        return "fast"

    @workflow
    async def w(ctx: Context) -> str:
        return (await ctx.race("r", {"slow": lambda c: c.step(slow), "fast": lambda c: c.step(fast)})).winner

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == "fast"
        await until(lambda: log == ["seen"])


@pytest.mark.behaviour("RV-71")
async def test_a_join_in_the_winning_branch(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        async def fast(c: Context) -> int:
            return sum((await c.join("j", {"a": _one(1, log.do), "b": _one(2, log.do)})).values())

        won = await ctx.race("r", {"slow": lambda c: c.wait_for_signal("never"), "fast": fast})
        return [won.winner, won.value]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == ["fast", 3]


@pytest.mark.behaviour("RV-73")
async def test_a_retry_does_not_lose_a_race(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        flaky = log.flaky("x", 1)
        won = await ctx.race("r", {"nap": lambda c: c.sleep(200), "flaky": lambda c: c.step(flaky, retry=LATER)})
        return won.winner

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        assert await run.result(timeout=5) == "flaky"
        assert log == ["x", "x"]


async def test_a_branch_that_fails_is_out_of_the_race(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        branches = {"bad": lambda c: c.step(log.refuse), "nap": lambda c: c.sleep(60)}
        return (await ctx.race("r", branches)).winner

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "nap"


async def test_all_have_failed(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        try:
            await ctx.race("r", {"a": lambda c: c.step(log.refuse, "a"), "b": lambda c: c.step(log.refuse, "b")})
        except RaceFailed as error:
            return {name: told["message"] for name, told in error.failures.items()}

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == {"a": "never a", "b": "never b"}


async def test_a_race_that_a_sleep_wins(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        won = await ctx.race("r", {"signal": lambda c: c.wait_for_signal("go"), "nap": lambda c: c.sleep(60)})
        return [won.winner, await ctx.wait_for_signal("go", timeout=60, on_timeout="none")]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        await run.signal("go", "late")
        await b.drain()
        assert await run.result(timeout=5) == ["nap", "late"]  # the loser's wait is gone: it takes nothing any more


async def test_children_of_losers_are_canceled(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def fast(c: Context) -> None:
            await c.wait_for_signal("go")

        won = await ctx.race(
            "r",
            {
                "child": lambda c: c.child(napping),
                "map": lambda c: c.map("m", napping, [None, None]),
                "fast": fast,
            },
        )
        return won.winner

    async with place.working(w, napping) as b:
        run = await b.app.start(w)
        await b.drain()
        assert facts.value("select count(*) from durable.runs where workflow = 'napping'") == 3
        await run.signal("go")
        await b.drain()
        assert await run.result(timeout=5) == "fast"
        statuses = facts.rows("select distinct status from durable.runs where workflow = 'napping'")
        assert statuses == [{"status": "canceled"}]
        facts.check_rest()


async def test_losers_with_something_to_undo_are_undone_with_the_run(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        async def booked(c: Context) -> None:
            await c.step(log.do, "booked", compensate=log.undo)
            await c.wait_for_signal("never")

        async def fast(c: Context) -> None:
            await c.wait_for_signal("go")

        await ctx.race("r", {"booked": booked, "fast": fast})
        await ctx.step(log.do, "after", compensate=log.undo)
        raise ValueError("undo all")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.signal("go")
        await b.drain()
        assert (await failure(run)).message == "undo all"
        assert log == ["booked", "after", ("undo", "after"), ("undo", "booked")]


async def test_ties_go_to_who_finished_first(dsn: str, log: Log) -> None:
    """Both are over before the run looks again: the journal's order decides, the same on every replay."""
    winners = set()
    for replays in (False, True):

        @workflow(name=f"w{replays}")
        async def w(ctx: Context) -> str:
            won = await ctx.race("r", {"late": lambda c: c.sleep(20), "early": lambda c: c.sleep(10)})
            await ctx.sleep(1)
            return won.winner

        async with Place(dsn, replays=replays).working(w) as b:
            run = await b.app.start(w)
            await b.drain()
            await b.skip(seconds=30)
            await b.drain()
            first = (await run.status()).steps[0].result["winner"]
            await b.skip(seconds=2)
            await b.drain()
            assert await run.result(timeout=5) == first
            winners.add(first)
    assert len(winners) == 1


# ---------------------------------------------------------------- children and maps


class Item(BaseModel):
    n: int


class Answer(BaseModel):
    square: int


@workflow
async def squared(ctx: Context, item: Item) -> Answer:
    if item.n < 0:
        await ctx.step(_refuse, item.n)
    return Answer(square=await ctx.step(_square, item.n))


def _square(n: int) -> int:
    return n * n


async def _refuse(n: int) -> None:
    from durable import NonRetryable

    raise NonRetryable(f"no {n}")


async def test_a_child_has_typed_input_and_result(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Answer:
        answer = await ctx.child(squared, Item(n=3))
        await ctx.sleep(60)
        assert type(answer) is Answer
        again = await ctx.child("squared", {"n": 4}, name="by name")
        assert type(again) is Answer
        return Answer(square=answer.square + again.square)

    async with place.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == Answer(square=25)
        status = await run.status()
        assert [s.step_id for s in status.steps] == ["squared", "sleep", "by name"]
        assert [(c.workflow, c.parent_step, c.status) for c in status.children] == [
            ("squared", "squared", "completed"), ("squared", "by name", "completed"),
        ]  # fmt: skip


async def test_a_child_may_be_of_the_builder_and_the_parent_too(place: Place) -> None:
    built = define("built").step("a", lambda ctx: 1)
    parent = define("parent").child_workflow("c", squared, map_input=lambda ctx: {"n": 5})

    @workflow
    async def w(ctx: Context) -> Any:
        return await ctx.child(built)

    async with place.working(w, built, parent, squared) as b:
        run, other = await b.app.start(w), await b.app.start(parent)
        await b.drain()
        assert await run.result(timeout=5) == {"a": 1}
        assert await other.result(timeout=5) == {"c": {"square": 25}}


async def test_a_child_that_fails(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.child(squared, Item(n=-1))
        except ChildFailed as error:
            await ctx.sleep(60)
            return [error.step, error.status, error.error["message"], str(error.run_id)]
        return []

    async with place.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        (child,) = (await run.status()).children
        assert await run.result(timeout=5) == ["squared", "failed", "no -1", str(child.id)]


async def test_input_that_a_child_does_not_take(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.child(squared, {"n": "many"})
        except (ChildFailed, StepFailed) as error:
            return str(error)
        return "?"

    async with place.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "squared" in await run.result(timeout=5)
        assert (await run.status()).children == ()


async def test_a_child_that_nobody_knows_yet(place: Place) -> None:
    """The run is parked until a worker knows it."""

    @workflow
    async def w(ctx: Context) -> Any:
        return (await ctx.child("squared", {"n": 2})).square

    async with place.app(w) as app:
        async with place.bench(app) as b:
            run = await app.start(w)
            await b.drain()
            assert (await run.status()).waiting_for == "definition"
        app.register(squared)
        async with place.bench(app) as b:
            await b.drain()
            assert await run.result(timeout=5) == 4


async def test_cancel_reaches_children(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.child(napping)

    async with place.working(w, napping) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.cancel()
        await b.drain()
        assert {r["status"] for r in facts.rows("select status from durable.runs")} == {"canceled"}


async def test_a_map_over_hundreds_of_items(dsn: str, facts: Facts) -> None:
    """Bounded: never more children at once than asked for; results in order."""

    @workflow
    async def w(ctx: Context) -> list[int]:
        answers = await ctx.map("m", squared, [Item(n=n) for n in range(300)], concurrency=7)
        assert all(type(answer) is Answer for answer in answers)
        return [answer.square for answer in answers if answer]

    async with Place(dsn, replays=False).working(w, squared) as b:
        run = await b.app.start(w)
        await b.work_until(lambda: bool(facts.run(run)["finished_at"]))
        assert await run.result(timeout=5) == [n * n for n in range(300)]
    most = """
        select max((
          select count(*) from durable.runs other
          where other.workflow = 'squared' and other.created_at <= child.created_at
            and other.finished_at > child.created_at
        ))
        from durable.runs child where child.workflow = 'squared'
    """
    assert facts.value(most) == 7


async def test_a_map_over_crashes(dsn: str) -> None:
    run = await crashing(dsn, mapping, None, squared)
    assert (await run.status()).status == "completed"


@workflow
async def mapping(ctx: Context) -> list[int]:
    answers = await ctx.map("m", squared, [{"n": n} for n in range(4)], concurrency=2)
    return [answer.square for answer in answers if answer]


@pytest.mark.parametrize(
    ("policy", "items", "expected"),
    [
        (All(), [1, -2, 3], {"1"}),
        (All(), [1, 2, 3], [1, 4, 9]),
        (All, [], []),
        (Failures(1), [1, -2, 3], [1, None, 9]),
        (Failures(1), [-1, -2, 3], {"0", "1"}),
        (Failures(0.5), [-1, -2, 3, 4], [None, None, 9, 16]),
        (Failures(0.25), [-1, -2, 3, 4], {"0", "1"}),
        (First(2), [1, 2], [1, 4]),
        (First(1), [-1, 2], [4]),
        (First(2), [-1, 2], {"0"}),
    ],
)
async def test_policies_of_a_map(place: Place, policy: Any, items: list[int], expected: Any) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        try:
            answers = await ctx.map("m", squared, [Item(n=n) for n in items], policy=policy)
        except JoinFailed as error:
            return {"failed": [*error.failures]}
        await ctx.step(abs, 1)
        return [None if answer is None else answer.square for answer in answers]

    async with place.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        found = await run.result(timeout=5)
        assert found == ({"failed": sorted(expected)} if isinstance(expected, set) else expected)


async def test_all_stops_at_the_first_failure(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.map("m", squared, [Item(n=n) for n in (1, -2, 3, 4, 5)], concurrency=1)

    async with place.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.JoinFailed"
        assert facts.value("select count(*) from durable.runs where workflow = 'squared'") == 2


async def test_first_cancels_the_rest(place: Place, facts: Facts) -> None:
    @workflow
    async def child(ctx: Context, item: int) -> int:
        if item:
            await ctx.sleep(3600)
        return item

    @workflow
    async def w(ctx: Context) -> list[Any]:
        return list(await ctx.map("m", child, [1, 0, 2], policy=First(1)))

    async with place.working(w, child) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [0]
        found = facts.rows("select parent_step, status from durable.runs where parent_id is not null")
        assert {r["parent_step"]: r["status"] for r in found} == {
            "m[0]": "canceled", "m[1]": "completed", "m[2]": "canceled",
        }  # fmt: skip
        facts.check_rest()


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"concurrency": True}, {"policy": 5}])
async def test_options_of_a_map(live: Place, options: Any) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.map("m", squared, [], **options)

    async with live.working(w, squared) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "'m'" in await fault(run)


# ---------------------------------------------------------------- one within another


async def test_a_block_is_retried_while_another_branch_works(place: Place, log: Log) -> None:
    go = asyncio.Event()

    async def slow() -> str:
        await soon(go.wait())
        return "slow"

    async def again(c: Context) -> Any:
        async def inner(d: Context) -> Any:
            await d.step(log.do, "once")
            found = await d.step(log.flaky("x", 2), **ONCE)
            await d.step(release)
            return found

        return await c.block("b", inner, retry=Retry(initial=0))

    async def release() -> None:
        go.set()

    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        return await ctx.join("j", {"slow": lambda c: c.step(slow), "again": again})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == {"slow": "slow", "again": "x"}
        assert log == ["once", "x", "x", "x"]


async def test_a_retried_block_with_branches_in_it(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def inner(c: Context) -> Any:
            return await c.join(
                "j", {"good": lambda d: d.step(log.do, "good"), "bad": lambda d: d.step(log.flaky("bad", 1), **ONCE)}
            )

        return await ctx.block("b", inner, retry=LATER)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        assert await run.result(timeout=5) == {"good": "good", "bad": "bad"}
        assert sorted(log) == ["bad", "bad", "good"]


async def test_ephemeral_and_transactional_steps_in_branches(place: Place, facts: Facts, log: Log) -> None:
    facts.execute("create table public.effects (value int)")

    async def write(ctx: StepContext[Any], value: int) -> int:
        connection = await ctx.async_connection()
        await connection.execute(text("insert into public.effects values (:value)"), {"value": value})
        return value

    def branch(n: int) -> Any:
        async def run(c: Context) -> Any:
            await c.step(log.do, n, ephemeral=True)
            return await c.step(write, n) + await c.step(write, n * 10, name="again")

        return run

    @workflow
    async def w(ctx: Context) -> dict[str, int]:
        return await ctx.join("j", {str(n): branch(n) for n in (1, 2, 3)})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == {"1": 11, "2": 22, "3": 33}
        rows = facts.rows("select value from public.effects order by value")
        assert [row["value"] for row in rows] == [1, 2, 3, 10, 20, 30]
        assert sorted(log) == [1, 2, 3]


async def test_completable_messages_in_branches(place: Place, facts: Facts) -> None:
    """Each branch has its own open message."""

    async def serve(c: Context) -> Any:
        (message,) = await c.receive("m", completable=True)
        await c.sleep(5)
        await message.complete(message.body)
        return message.body

    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        return await ctx.join("j", {"a": serve, "b": serve})

    async with place.working(w) as b:
        run = await b.app.start(w)
        asked = [asyncio.create_task(b.app.request(run, "m", n, timeout=30)) for n in (1, 2)]
        await until(lambda: len(facts.inbox(run)) == 2)
        await b.drain()
        await b.skip(seconds=6)
        await b.work_until(lambda: all(task.done() for task in asked))
        assert [task.result() for task in asked] == [1, 2]
        await b.drain()
        assert sorted((await run.result(timeout=5)).values()) == [1, 2]


async def test_a_rollback_in_a_branch_ends_the_others(place: Place, log: Log) -> None:
    started = asyncio.Event()

    async def long() -> None:
        started.set()
        await asyncio.Event().wait()

    async def bad(c: Context) -> None:
        await c.step(booked, compensate=log.undo)
        raise Rollback

    async def booked() -> str:
        await soon(started.wait())
        return "booked"

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"long": lambda c: c.step(long), "bad": bad})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).kind == "rollback"
        assert log == [("undo", "booked")]


async def test_a_cancel_ends_all_branches(place: Place, facts: Facts, log: Log) -> None:
    started = asyncio.Barrier(3)

    async def long(n: int) -> None:
        await soon(started.wait())
        try:
            await asyncio.Event().wait()
        finally:
            log.append(n)

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.join("j", {"a": lambda c: c.step(long, 1), "b": lambda c: c.step(long, 2)})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await soon(started.wait())
        await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert sorted(log) == [1, 2]
        facts.check_rest()


async def test_races_in_a_loop_leave_nothing_behind(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        async def body(c: Context, n: int) -> int | Break[int]:
            await c.race(
                "r",
                {
                    "loses": lambda d: d.block("b", lambda e: e.sleep(9_999)),
                    "child": lambda d: d.child(napping),
                    "wins": lambda d: d.step(log.do, n),
                },
            )
            return Break(n) if n == 5 else n + 1

        return await ctx.loop("poll", body, 0, history=2)

    async with place.working(w, napping) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == 5
        assert log == list(range(6))
        assert {key.partition("]")[0] for key in facts.journal(run) if "[" in key} == {"poll[4", "poll[5"}
        assert {c.status for c in (await run.status()).children} <= {"canceled"}
        facts.check_rest()
