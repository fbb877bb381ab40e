"""``ctx.continue_as_new``, ``ctx.start``, and runs forked from others."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.functions.kit import Log, Place, crashing, failure, fault
from tests.engine.kit import Facts, soon

from durable import Break, Context, RunExists, workflow


class State(BaseModel):
    n: int = 0
    seen: list[Any] = []


@workflow
async def chained(ctx: Context, state: State) -> State:
    assert type(state) is State
    await ctx.step(abs, state.n)
    if state.n < 3:
        ctx.continue_as_new(State(n=state.n + 1, seen=[*state.seen, state.n]))
    return state


async def test_a_chain(place: Place, facts: Facts) -> None:
    async with place.working(chained) as b:
        run = await b.app.start(chained, State(), key="k")
        waiting = asyncio.create_task(run.result(timeout=30))
        await b.drain()
        assert await soon(waiting) == State(n=3, seen=[0, 1, 2])
        status = await run.status()
        assert status.status == "completed"
        assert status.successor is not None
        chain = [status]
        while chain[-1].successor is not None:
            chain.append(await b.app.status(chain[-1].successor))
            assert chain[-1].predecessor == chain[-2].id
        assert [s.input["n"] for s in chain] == [0, 1, 2, 3]
        page = await b.app.list(key="k")
        assert [s.id for s in page.items] == [chain[-1].id]
        facts.check_rest()


async def test_a_chain_over_crashes(dsn: str) -> None:
    run = await crashing(dsn, chained, State())
    assert await run.result(timeout=5) == State(n=3, seen=[0, 1, 2])


async def test_a_used_key_is_that_of_the_head(place: Place) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> int:
        if n == 0:
            ctx.continue_as_new(1)
        await ctx.sleep(60)
        return n

    async with place.working(w) as b:
        run = await b.app.start(w, 0, key="k")
        await b.drain()
        head = (await run.status()).successor
        again = await b.app.start(w, 0, key="k")
        assert again.id == head
        with pytest.raises(RunExists):
            await b.app.start(w, 5, key="k")
        await b.skip(seconds=61)
        await b.drain()
        assert await again.result(timeout=5) == 1


async def test_messages_that_nobody_received_go_on(place: Place) -> None:
    @workflow
    async def w(ctx: Context, seen: list[Any]) -> list[Any]:
        (message,) = await ctx.receive("m")
        seen = [*seen, message.body]
        if len(seen) < 3:
            ctx.continue_as_new(seen)
        return seen

    async with place.working(w) as b:
        run = await b.app.start(w, [])
        for n in (1, 2):
            await run.signal("m", n)
        await b.drain()
        await run.signal("m", 3)  # to the first of the chain: it goes to its end
        await b.drain()
        assert await run.result(timeout=5) == [1, 2, 3]


async def test_cancel_follows_the_chain(place: Place) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> None:
        if n == 0:
            ctx.continue_as_new(1)
        await ctx.sleep(60)

    async with place.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        assert await run.cancel()
        await b.drain()
        head = (await run.status()).successor
        assert head is not None
        assert (await b.app.status(head)).status == "canceled"


async def test_a_chain_is_one_child(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        return (await ctx.child(chained, State())).n

    async with place.working(w, chained) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == 3


async def test_it_goes_on_by_the_newest_version(place: Place) -> None:
    @workflow(name="w", version="1")
    async def old(ctx: Context, n: int) -> str:
        ctx.continue_as_new(n + 1)

    @workflow(name="w", version="2")
    async def new(ctx: Context, n: int) -> str:
        return f"new {n}"

    async with place.working(old, new) as b:
        run = await b.app.start("w", 0, version="1")
        await b.drain()
        assert await run.result(timeout=5) == "new 1"


async def test_it_is_not_swallowed(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> int:
        try:
            if n == 0:
                ctx.continue_as_new(1)
        except Exception:
            log.append("swallowed")
        finally:
            log.append("finally")
        return n

    async with place.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        assert await run.result(timeout=5) == 1
        assert log == ["finally", "finally"]


async def test_from_within_a_block_and_a_loop(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> int:
        async def body(c: Context, i: int) -> int:
            await c.step(log.do, [n, i])
            if i == 1:
                c.continue_as_new(n + 1)
            return i + 1

        if n == 1:
            return n
        return int(await ctx.block("b", lambda c: c.loop("poll", body, 0)))

    async with place.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        assert await run.result(timeout=5) == 1
        assert log == [[0, 0], [0, 1]]


async def test_not_from_within_a_branch(live: Place) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> None:
        async def branch(c: Context) -> None:
            c.continue_as_new(1)

        await ctx.join("j", {"a": branch})

    async with live.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        assert "outside of branches" in await fault(run)


async def test_input_that_it_does_not_take(place: Place) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> None:
        ctx.continue_as_new("many")

    async with place.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        error = await failure(run)
        assert error.type == "durable.errors.PayloadError"
        assert "continue_as_new" in error.message


async def test_what_it_did_is_not_undone_by_its_successor(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context, n: int) -> None:
        await ctx.step(log.do, n, compensate=log.undo)
        if n == 0:
            ctx.continue_as_new(1)
        raise ValueError("the second")

    async with place.working(w) as b:
        run = await b.app.start(w, 0)
        await b.drain()
        successor = (await run.status()).successor
        assert successor is not None
        assert (await b.app.status(successor)).status == "failed"
        assert log == [0, 1, ("undo", 1)]


# ---------------------------------------------------------------- start


@workflow
async def other(ctx: Context, n: int) -> int:
    return int(await ctx.step(abs, n))


@workflow
async def starting(ctx: Context) -> list[uuid.UUID]:
    first = await ctx.start(other, -1)
    second = await ctx.start(other, -2)
    keyed = await ctx.start(other, -3, key="k", name="keyed")
    again = await ctx.start(other, -3, key="k", name="again")
    assert type(first) is uuid.UUID
    return [first, second, keyed, again]


async def test_start_is_exactly_once(dsn: str, facts: Facts) -> None:
    run = await crashing(dsn, starting, None, other)
    assert (await run.status()).status == "completed"
    first, second, keyed, again = facts.value("select result from durable.journal where step_id = 'run:result'")
    assert keyed == again
    runs = facts.rows("select id, parent_id, key from durable.runs where workflow = 'other' order by created_at")
    assert {str(row["id"]) for row in runs} == {first, second, keyed}
    assert {row["parent_id"] for row in runs} == {None}
    assert {row["key"] for row in runs} == {None, "k"}


async def test_it_does_not_wait(place: Place) -> None:
    @workflow
    async def never(ctx: Context) -> None:
        await ctx.wait_for_signal("never")

    @workflow
    async def w(ctx: Context) -> uuid.UUID:
        return await ctx.start(never)

    async with place.working(w, never) as b:
        run = await b.app.start(w)
        await b.drain()
        started = await run.result(timeout=5)
        assert (await b.app.status(started)).status == "suspended"
        assert (await b.app.status(started)).parent_id is None


# ---------------------------------------------------------------- fork


@workflow
async def long(ctx: Context, given: str) -> list[Any]:
    first = await ctx.step(str.upper, f"{given} first", name="first")

    async def body(c: Context, done: list[str]) -> list[str] | Break[list[str]]:
        done = [*done, await c.step(say, f"{given} {len(done)}")]
        return Break(done) if len(done) == 3 else done

    looped = await ctx.loop("poll", body, [])
    return [first, *looped, await ctx.step(say, f"{given} last", name="last")]


said: list[str] = []


def say(what: str) -> str:
    said.append(what)
    return what


@pytest.mark.behaviour("RV-97")
async def test_all_runs_again(place: Place) -> None:
    async with place.working(long) as b:
        run = await b.app.start(long, "a")
        await b.drain()
        said.clear()
        forked = await b.app.fork(run)
        await b.drain()
        assert await forked.result(timeout=5) == await run.result(timeout=5)
        assert said == ["a 0", "a 1", "a 2", "a last"]


@pytest.mark.behaviour("RV-98")
async def test_from_within_a_loop_the_whole_of_it_runs_again(place: Place, facts: Facts) -> None:
    async with place.working(long) as b:
        run = await b.app.start(long, "a")
        await b.drain()
        said.clear()
        forked = await b.app.fork(run, "poll[1]/say")
        await b.drain()
        assert await forked.result(timeout=5) == ["A FIRST", "a 0", "a 1", "a 2", "a last"]
        assert said == ["a 0", "a 1", "a 2", "a last"]
        assert (await forked.status()).forked_from == run.id


async def test_from_a_later_step_with_another_input(place: Place) -> None:
    async with place.working(long) as b:
        run = await b.app.start(long, "a")
        await b.drain()
        said.clear()
        forked = await b.app.fork(run, "last", input="b")
        await b.drain()
        assert said == ["b last"]
        assert (await forked.result(timeout=5))[0] == "A FIRST"


async def test_random_numbers_of_a_fork_are_those_of_its_origin(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[str]:
        first = str(ctx.uuid4())
        await ctx.step(abs, 1, name="a")
        return [first, str(ctx.uuid4()), str(ctx.random.random())]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        forked = await b.app.fork(run, "a")
        await b.drain()
        assert await forked.result(timeout=5) == await run.result(timeout=5)


async def test_a_fork_does_not_undo_what_was_copied(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, "a", compensate=log.undo)
        await ctx.step(log.do, "b", name="b", compensate=log.undo)
        await ctx.sleep(60)
        if len(log) > 2:
            raise ValueError("of the fork")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        forked = await b.app.fork(run, "b")
        await b.drain()
        await run.cancel()
        await b.skip(seconds=61)
        await b.drain()
        assert (await failure(forked)).message == "of the fork"
        assert log == ["a", "b", "b", ("undo", "b")]
