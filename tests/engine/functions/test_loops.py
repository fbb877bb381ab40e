"""``ctx.loop``: states, Break, crashes within iterations, and what of old ones stays in the journal."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failure, fault
from tests.engine.kit import Facts

from durable import Break, Context, Retry, StepFailed, workflow


class Tracking(BaseModel):
    seen: int = 0
    places: list[str] = []


def iterations(facts: Facts, run: Any, loop: str = "poll") -> list[int]:
    """The iterations of which anything is stored."""
    found = {key.partition("[")[2].partition("]")[0] for key in facts.journal(run) if key.startswith(f"{loop}[")}
    return sorted(map(int, found))


@pytest.mark.behaviour("RV-25", "RV-26")
async def test_a_loop_without_state(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def body(c: Context, _: None) -> Break[str] | None:
            await c.step(log.do, len(log))
            return Break("done") if len(log) == 3 else None

        return str(await ctx.loop("poll", body))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == "done"
        assert log == [0, 1, 2]
        (loop,) = (await run.status()).steps
        assert (loop.step_id, loop.kind, loop.result) == ("poll", "loop", "done")
        assert [c.step_id for c in loop.children] == ["poll[0]", "poll[1]", "poll[2]"]
        assert [c.step_id for c in loop.children[0].children] == ["poll[0]/do"]


async def test_a_state_is_of_its_type_in_each_iteration(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Tracking:
        async def follow(c: Context, state: Tracking) -> Tracking | Break[Tracking]:
            assert type(state) is Tracking
            place = await c.step(log.do, f"p{state.seen}")
            state.places.append(place)  # of one's own: the journal has the state as it was returned
            return Break(state) if state.seen == 2 else Tracking(seen=state.seen + 1, places=state.places)

        return await ctx.loop("poll", follow, state=Tracking())

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == Tracking(seen=2, places=["p0", "p1", "p2"])
        assert log == ["p0", "p1", "p2"]


@workflow
async def five(ctx: Context) -> int:
    async def body(c: Context, n: int) -> int | Break[int]:
        m: int = await c.step(increase, n)
        await c.step(increase, n, name="again")
        return Break(m) if m >= 5 else m

    return await ctx.loop("poll", body, 0, history=2)


increased: list[int] = []


def increase(n: int) -> int:
    increased.append(n)
    return n + 1


@pytest.mark.behaviour("RV-31", "RV-35")
async def test_a_crash_after_each_step(dsn: str, facts: Facts) -> None:
    """It begins again at the iteration that it was in, with that one's state."""
    increased.clear()
    run = await crashing(dsn, five)
    assert (await run.status()).status == "completed"
    assert increased == [n for n in range(5) for _ in range(2)]
    assert facts.rows("select result from durable.journal where step_id = 'run:result'") == [{"result": 5}]


@pytest.mark.behaviour("RV-32")
async def test_old_iterations_are_pruned(place: Place, facts: Facts, log: Log) -> None:
    async with place.working(counting := _counting(log)) as b:
        run = await b.app.start(counting, {"top": 5, "history": 2})
        await b.drain()
        assert await run.result(timeout=5) == 5
        assert min(iterations(facts, run)) >= 2
        assert (await run.status()).steps[-1].kind == "loop"


@pytest.mark.behaviour("RV-34")
async def test_the_end_prunes_too(place: Place, facts: Facts, log: Log) -> None:
    async with place.working(counting := _counting(log)) as b:
        run = await b.app.start(counting, {"top": 7, "history": 3})
        await b.drain()
        assert await run.result(timeout=5) == 7
        assert iterations(facts, run) == [4, 5, 6]


@pytest.mark.behaviour("RV-38")
async def test_history_of_one(place: Place, facts: Facts, log: Log) -> None:
    async with place.working(counting := _counting(log)) as b:
        run = await b.app.start(counting, {"top": 3, "history": 1})
        await b.drain()
        assert await run.result(timeout=5) == 3
        assert iterations(facts, run) == [2]


def _counting(log: Log, **options: Any) -> Any:
    @workflow
    async def counting(ctx: Context, given: dict[str, int]) -> int:
        async def body(c: Context, n: int) -> int | Break[int]:
            await c.step(log.do, n, **options)
            return Break(n + 1) if n + 1 >= given["top"] else n + 1

        return await ctx.loop("poll", body, 0, history=given["history"], interval=given.get("interval"))

    return counting


@pytest.mark.parametrize(("history", "times"), [(1, 100), (20, 1_000)])
async def test_the_journal_of_a_long_loop_does_not_grow(
    dsn: str, facts: Facts, log: Log, history: int, times: int
) -> None:
    rows: dict[int, int] = {}
    async with Place(dsn, replays=False).working(counting := _counting(log)) as b:
        for top in (times, 2 * times):
            run = await b.app.start(counting, {"top": top, "history": history})
            await b.drain()
            assert await run.result(timeout=5) == top
            rows[top] = len(facts.journal(run))
    assert rows[times] == rows[2 * times]
    assert rows[times] == 2 * history + 2  # a step and an iteration each, the loop, the result


async def test_the_journal_while_it_runs(dsn: str, facts: Facts, log: Log) -> None:
    """Between two prunings there are at most `history + interval` iterations."""

    @workflow
    async def w(ctx: Context) -> None:
        async def body(c: Context, n: int) -> int:
            await c.step(log.do, n)
            await c.wait_for_signal("next")
            return n + 1

        await ctx.loop("poll", body, 0, history=2, interval=3)

    most = 0
    async with Place(dsn, replays=True).working(w) as b:
        run = await b.app.start(w)
        for _ in range(12):
            await b.drain()
            most = max(most, len(iterations(facts, run)))
            await run.signal("next")
        await b.drain()
    assert log == list(range(13))
    assert most <= 2 + 3 + 1  # and the one that runs


async def test_iterations_with_something_to_undo_are_kept(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        async def body(c: Context, n: int) -> int | Break[None]:
            if n % 4 == 0:
                await c.step(log.do, n, compensate=log.undo)
            else:
                await c.step(log.do, n)
            return Break(None) if n == 9 else n + 1

        await ctx.loop("poll", body, 0, history=2)
        raise ValueError("all is to be undone")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).message == "all is to be undone"
        assert log == [*range(10), ("undo", 8), ("undo", 4), ("undo", 0)]


@pytest.mark.behaviour("RV-37")
async def test_an_error_in_an_iteration(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        async def body(c: Context, n: int) -> int:
            await c.step(log.do, n)
            if n == 2:
                raise LookupError("lost at two")
            return n + 1

        await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert (error.type, error.message) == ("LookupError", "lost at two")
        assert log == [0, 1, 2]
        loop = (await run.status()).steps[-1]
        assert (loop.step_id, loop.status) == ("poll", "failed")


async def test_an_error_in_an_iteration_can_be_caught(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        async def body(c: Context, n: int) -> int:
            await c.step(log.fail, n, **ONCE)
            return n + 1

        try:
            await ctx.loop("poll", body, 0)
        except StepFailed as error:
            await ctx.sleep(60)
            return error.step
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "poll[0]/fail"


async def test_a_retrying_step_in_an_iteration(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        async def body(c: Context, n: int) -> int | Break[int]:
            await c.step(log.flaky(n, 1), retry=Retry(initial=5))
            return Break(n) if n == 2 else n + 1

        return await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(4):
            await b.drain()
            await b.skip(seconds=6)
        assert await run.result(timeout=5) == 2
        assert log == [0, 0, 1, 1, 2, 2]


async def test_a_loop_that_awaits_nothing(place: Place, facts: Facts) -> None:
    """Iterations without operations are written in bulk."""

    @workflow
    async def w(ctx: Context) -> int:
        async def body(c: Context, n: int) -> int | Break[int]:
            return Break(n) if n == 2_500 else n + 1

        return await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == 2_500
        assert len(facts.journal(run)) == 22
        assert facts.run(run)["revision"] < 20


async def test_loops_within_loops(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def outer(c: Context, state: list[int]) -> list[int] | Break[list[int]]:
            async def inner(d: Context, n: int) -> int | Break[int]:
                await d.step(log.do, [len(state), n])
                return Break(n) if n == len(state) else n + 1

            found = [*state, await c.loop("inner", inner, 0, history=1)]
            return Break(found) if len(found) == 4 else found

        return await ctx.loop("outer", outer, [], history=1)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [0, 1, 2, 3]
        assert log == [[o, i] for o in range(4) for i in range(o + 1)]
        assert iterations(facts, run, "outer") == [3]
        assert [key for key in facts.journal(run) if key.startswith("outer[")] == [
            "outer[3]/inner[3]/do", "outer[3]/inner[3]", "outer[3]/inner", "outer[3]",
        ]  # fmt: skip


# ---------------------------------------------------------------- mistakes


async def _faulty(place: Place, body: Any, *given: Any, **options: Any) -> str:
    @workflow
    async def w(ctx: Context) -> Any:
        return await ctx.loop("poll", body, *given, **options)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        return await fault(run)


async def test_what_a_body_may_return(live: Place) -> None:
    async def nothing(c: Context, n: int) -> Any:
        return None

    async def something(c: Context, n: None) -> Any:
        return 5

    assert "returned nothing" in await _faulty(live, nothing, 0)
    assert "has no state" in await _faulty(live, something)


@pytest.mark.parametrize("options", [{"history": 0}, {"interval": 0}, {"history": True}])
async def test_limits_of_history(live: Place, options: Any) -> None:
    async def body(c: Context, n: int) -> Any:
        return Break(1)

    assert "at least 1" in await _faulty(live, body, 0, **options)


async def test_a_body_without_a_state_parameter(live: Place) -> None:
    async def body(c: Context) -> Any:
        return Break(1)

    assert "context and the state" in await _faulty(live, body)


async def test_a_state_that_is_not_of_its_type(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def body(c: Context, n: int) -> Any:
            return "x"

        return await ctx.loop("poll", body, 0)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert error.type == "durable.errors.PayloadError"
        assert "poll" in error.message


async def test_the_outer_context_in_a_loop(live: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def body(c: Context, n: int) -> Any:
            await ctx.step(log.do, n)
            return Break(n)

        return await ctx.loop("poll", body, 0)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        message = await fault(run)
        assert "context of the code around it" in message
        assert log == []


# ---------------------------------------------------------------- messages in loops


class Batch(BaseModel):
    items: list[str]


def _message_loop(log: Log, *, join: bool) -> Any:
    @workflow
    async def w(ctx: Context) -> Any:
        async def outer(c: Context, done: list[str]) -> list[str] | Break[list[str]]:
            (message,) = await c.receive("batch", type=Batch)
            items: list[str] = message.body.items
            if join:
                parts = await c.join("each", {item: _branch(log, item) for item in items})
                done = [*done, *parts.values()]
            else:

                async def inner(d: Context, n: int) -> int | Break[None]:
                    await d.step(log.do, items[n])
                    return Break(None) if n + 1 == len(items) else n + 1

                await c.loop("each", inner, 0)
                done = [*done, *items]
            return Break(done) if len(done) >= 3 else done

        return await ctx.loop("poll", outer, [])

    return w


def _branch(log: Log, item: str) -> Any:
    return lambda c: c.step(log.do, item)


@pytest.mark.behaviour("RV-28", "RV-29")
@pytest.mark.parametrize("join", [False, True])
async def test_a_message_loop(place: Place, log: Log, join: bool) -> None:
    async with place.working(w := _message_loop(log, join=join)) as b:
        run = await b.app.start(w)
        await run.signal("batch", {"items": ["a", "b"]})
        await b.drain()
        assert sorted(log) == ["a", "b"]
        assert (await run.status()).status == "suspended"
        await run.signal("batch", {"items": ["c"]})
        await b.drain()
        assert await run.result(timeout=5) == ["a", "b", "c"]
        assert sorted(log) == ["a", "b", "c"]
