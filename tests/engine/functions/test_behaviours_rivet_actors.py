"""Behaviours of rivet's actors (RA) and of its engine gasoline (RG), in this engine's terms: an actor with a workflow
is a run, its queue the run's inbox, its state what steps write, an activity a step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from tests.engine.functions.kit import ONCE, Log, Place, failure, fault
from tests.engine.kit import Bench, Facts, soon, until

from durable import Break, Context, Message, RetryRefused, RunCanceled, StepContext, workflow

TABLE = "create table state (what text)"


@pytest.fixture
def state(facts: Facts) -> Callable[[], list[str]]:
    """The app's own table, and a reader of it."""
    facts.execute(TABLE)
    return lambda: [row["what"] for row in facts.rows("select what from state order by what")]


def write(ctx: StepContext[Any], what: str) -> str:
    """Exactly once: with the step's entry."""
    ctx.connection().execute(text("insert into state values (:what)"), {"what": what})
    return what


async def ask(b: Bench, run: Any, payload: Any, name: str = "work") -> Any:
    """A request, and all that can be done meanwhile."""
    asking = asyncio.create_task(b.app.request(run.id, name, payload, timeout=30))

    async def answered() -> bool:
        await b.pump()
        return asking.done()

    await until(answered)
    return await asking


# ---------------------------------------------------------------- actors


@pytest.mark.behaviour("RA-01", "RG-01")
async def test_a_run_works_by_itself(dsn: str, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        return str(await ctx.step(log.do, "worked"))

    async with Place(dsn, replays=False).app(flow) as app, app.worker():
        run = await app.start(flow)
        assert await run.result(timeout=30) == "worked"
        assert log == ["worked"]
        assert len(list(await run.history())) > 0


@pytest.mark.behaviour("RA-01", "RA-08")
async def test_a_client_is_of_no_use_outside_of_steps(place: Place) -> None:
    async def look() -> int:
        async with await psycopg.AsyncConnection.connect(place.dsn) as connection:
            row = await (await connection.execute("select 42")).fetchone()
        assert row is not None
        return int(row[0])

    @workflow
    async def inside(ctx: Context) -> int:
        return await ctx.step(look)

    @workflow
    async def outside(ctx: Context) -> int:
        return await look()

    async with place.working(inside, outside) as b:
        good, bad = await b.app.start(inside), await b.app.start(outside)
        await b.drain()
        assert await good.result() == 42
        assert "Move the call into a step" in await fault(bad)


@pytest.mark.behaviour("RA-02", "RG-05")
async def test_a_message_is_received(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        (message,) = await ctx.receive("greet")
        await ctx.step(log.do, message.body)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        await run.signal("greet", {"hello": "world"})
        await b.drain()
        assert log == [{"hello": "world"}]
        assert (await run.status()).status == "completed"


@pytest.mark.behaviour("RA-03")
async def test_a_request_is_answered(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        (message,) = await ctx.receive("work", completable=True)
        await message.complete({"echo": message.body})

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        assert await ask(b, run, {"value": 123}) == {"echo": {"value": 123}}
        await b.drain()
        assert (await run.status()).status == "completed"


Items = Callable[[Context, list[str]], Coroutine[Any, Any, int]]


def in_loop(handle: Any) -> Items:
    async def items(ctx: Context, given: list[str]) -> int:
        async def one(c: Context, i: int) -> int | Break[int]:
            if i == len(given):
                return Break(i)
            await c.step(handle, given[i])
            return i + 1

        return await ctx.loop("items", one, 0)

    return items


def in_join(handle: Any) -> Items:
    async def items(ctx: Context, given: list[str]) -> int:
        def branch(item: str) -> Callable[[Context], Awaitable[Any]]:
            return lambda c: c.step(handle, item)

        return len(await ctx.join("items", {item: branch(item) for item in given}))

    return items


def in_race(handle: Any) -> Items:
    async def items(ctx: Context, given: list[str]) -> int:
        won = await ctx.race("items", {"work": lambda c: c.step(handle, given[0]), "late": lambda c: c.sleep(3600)})
        assert won.winner == "work"
        return 1

    return items


def consumer(items: Items) -> Any:
    """Answers two requests, one in each iteration, with the number of items that it has processed."""

    async def one(ctx: Context, round_: int) -> int | Break[int]:
        (message,) = await ctx.receive("work", completable=True, type=list[str])
        await message.complete(await items(ctx, message.body))
        return Break(round_) if round_ == 2 else round_ + 1

    @workflow
    async def flow(ctx: Context) -> int:
        return await ctx.loop("requests", one, 1)

    return flow


@pytest.mark.behaviour("RA-04", "RA-05", "RA-06")
@pytest.mark.parametrize(
    ("within", "batches"),
    [(in_loop, (["a", "b"], ["c"])), (in_join, (["a", "b"], ["c"])), (in_race, (["a"], ["b"]))],
    ids=["loop", "join", "race"],
)
async def test_requests_with_work_in_them(place: Place, log: Log, within: Any, batches: Any) -> None:
    flow = consumer(within(log.do))
    async with place.working(flow) as b:
        run = await b.app.start(flow)
        for batch in batches:
            assert await ask(b, run, batch) == len(batch)
        await b.drain()
        assert await run.result() == 2
        assert sorted(log) == [item for batch in batches for item in batch]


@pytest.mark.behaviour("RA-07")
async def test_a_run_starts_another_and_sends_it_a_message(place: Place, log: Log) -> None:
    @workflow
    async def child(ctx: Context) -> None:
        (message,) = await ctx.receive("hello", type=str)
        await ctx.step(log.do, message.body)

    @workflow
    async def parent(ctx: Context) -> dict[str, Any]:
        started = await ctx.start(child, key="child-1")
        result = await ctx.try_step(log.do, "recorded")
        sent = await ctx.send(started, "hello", "hello")
        return {"key": "child-1", "sent": sent, "ok": result.ok, "failure": result.failure, "child": str(started)}

    async with place.working(parent, child) as b:
        run = await b.app.start(parent)
        await b.drain()
        told = await run.result()
        assert {**told, "child": ""} == {"key": "child-1", "sent": True, "ok": True, "failure": None, "child": ""}
        started = await b.app.status(told["child"])
        assert (started.key, started.status, started.workflow) == ("child-1", "completed", "child")
        assert log == ["recorded", "hello"]


@pytest.mark.behaviour("RA-09", "RA-10")
async def test_failures_are_caught_and_recovered_from(place: Place, log: Log, state: Any) -> None:
    """What a failed attempt wrote elsewhere stays; what it wrote in its own transaction never was."""

    def charge(ctx: StepContext[Any]) -> None:
        log.append("charged")
        write(ctx, "charged")
        raise ValueError("card declined")

    async def shipping(c: Context) -> None:
        await c.join("parallel", {"bad": lambda d: d.step(charge, **ONCE), "good": lambda d: d.step(write, "packed")})

    @workflow
    async def flow(ctx: Context) -> list[Any]:
        paid = await ctx.try_step(charge, retry=1)
        assert paid.failure is not None
        await ctx.step(write, "recovered")
        shipped = await ctx.try_block("shipping", shipping)
        assert shipped.failure is not None
        await ctx.step(write, "recovered again")
        message = paid.failure.error["message"]
        return [paid.failure.kind, paid.failure.attempts, message, shipped.failure.source, shipped.failure.step]

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == ["exhausted", 1, "card declined", "join", "shipping/parallel"]
        assert log == ["charged", "charged"]
        assert state() == ["packed", "recovered", "recovered again"]


@pytest.mark.behaviour("RA-11")
async def test_a_run_that_ticks(place: Place, log: Log) -> None:
    async def tick(ctx: Context, n: int) -> int:
        await ctx.step(log.do, n)
        await ctx.sleep(1)
        return n + 1

    @workflow
    async def ticking(ctx: Context) -> None:
        await ctx.loop("ticks", tick, 0)

    async with place.working(ticking) as b:
        run = await b.app.start(ticking)
        await b.drain()
        for ticks in range(1, 5):
            assert log == list(range(ticks))
            await b.skip(seconds=1)
            await b.drain()
        assert (await run.status()).derived == "sleeping"


@pytest.mark.behaviour("RA-16", "RA-18")
@pytest.mark.parametrize("fails", [False, True])
async def test_the_worker_outlives_its_runs(dsn: str, fails: bool, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(log.refuse if fails else log.do, "here")

    async with Place(dsn, replays=False).working(flow) as b:
        for ended in range(1, 4):
            run = await b.app.start(flow)
            await b.drain()
            assert (await run.status()).status == ("failed" if fails else "completed")
            assert len(log) == ended


@pytest.mark.behaviour("RV-88")
async def test_a_canceled_run_stays_canceled(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.sleep(60)
        await ctx.step(log.do, "after")

    async with place.working(flow) as b:
        run = await b.app.start(flow, key="k")
        await b.drain()
        assert facts.run(run)["wake_at"] is not None
        assert await run.cancel(reason="enough")
        with pytest.raises(RunCanceled, match="enough"):
            await run.result(timeout=10)
        assert facts.run(run)["wake_at"] is None
        assert (await b.app.start(flow, key="k")).id == run.id
        assert not await run.signal("E")
        with pytest.raises(RetryRefused):
            await b.app.retry(run)
        await b.skip(seconds=60)
        await b.drain()
        assert (await run.status()).status == "canceled"
        assert log == []


# ---------------------------------------------------------------- gasoline


@pytest.mark.behaviour("RG-02")
async def test_the_result_of_a_step(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> int:
        return int(await ctx.step(log.do, "count", 20)) + 1

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == 21


@pytest.mark.behaviour("RG-03")
async def test_the_result_of_a_child(place: Place) -> None:
    @workflow
    async def sub(ctx: Context, n: int) -> tuple[int, str]:
        return n * 2, "doubled"

    @workflow
    async def flow(ctx: Context) -> tuple[int, str]:
        found: tuple[int, str] = await ctx.child(sub, 21)
        assert isinstance(found, tuple)
        return found

    async with place.working(flow, sub) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == (42, "doubled")


@pytest.mark.behaviour("RG-04")
async def test_a_sleep_lasts_as_long_as_it_says(dsn: str) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.sleep(0.1)

    async with Place(dsn, replays=False).app(flow) as app, app.worker():
        run = await app.start(flow)
        await run.result(timeout=30)
        at = {event.kind: event.at for event in await run.history()}
        assert at["sleep_elapsed"] - at["sleep_waiting"] >= timedelta(milliseconds=100)


@pytest.mark.behaviour("RG-06")
async def test_three_iterations(place: Place, log: Log) -> None:
    async def one(ctx: Context, n: int) -> int | Break[str]:
        await ctx.step(log.do, n)
        return Break("done") if n == 2 else n + 1

    @workflow
    async def flow(ctx: Context) -> str:
        return await ctx.loop("three", one, 0)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == "done"
        assert log == [0, 1, 2]


@pytest.mark.behaviour("RG-07")
async def test_nobody_sends_in_time(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        found: list[Message[Any]] = await ctx.receive("E", timeout=60)
        return found[0].body if found else "timed out"

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        await b.skip(seconds=60)
        await b.drain()
        assert await run.result() == "timed out"


@pytest.mark.behaviour("RG-08")
async def test_a_new_worker_goes_on(dsn: str) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.wait_for_signal("E")

    async with Place(dsn, replays=False).app(flow) as app:
        run = await app.start(flow)
        async with app.worker():

            async def waiting() -> bool:
                return (await run.status()).derived == "waiting_for_signal"

            await until(waiting)
        assert (await run.status()).derived == "waiting_for_signal"
        await run.signal("E", "came")
        async with app.worker():
            assert await soon(run.result(timeout=30)) == "came"


@pytest.mark.behaviour("RG-09")
async def test_a_step_keeps_state_under_the_run(place: Place, state: Any) -> None:
    def keep(ctx: StepContext[Any]) -> None:
        write(ctx, str(ctx.run_id))

    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(keep)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert state() == [str(run.id)]


@pytest.mark.behaviour("RG-11")
async def test_a_step_knows_its_run(place: Place) -> None:
    def who(ctx: StepContext[str]) -> list[str]:
        return [str(ctx.run_id), ctx.step_id, str(ctx.attempt), ctx.input, ctx.idempotency_key]

    @workflow
    async def flow(ctx: Context, given: str) -> list[str]:
        return await ctx.step(who)

    async with place.working(flow) as b:
        run = await b.app.start(flow, "the input")
        await b.drain()
        assert await run.result() == [str(run.id), "who", "1", "the input", f"{run.id}:who"]


@pytest.mark.behaviour("RG-13")
async def test_runs_are_found_by_their_tags(place: Place) -> None:
    """Nobody is woken by a tag: who looks for it finds the run as soon as its start is committed."""

    @workflow
    async def flow(ctx: Context) -> None:
        pass

    async with place.working(flow) as b:
        await b.app.start(flow, tags={"tenant": "another"})
        run = await b.app.start(flow, tags={"tenant": "acme"})
        assert [found.id for found in await b.app.list(tags={"tenant": "acme"})] == [run.id]


@pytest.mark.behaviour("RA-18")
async def test_a_body_that_fails_says_why(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        raise RuntimeError("no")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert (await failure(run)).message == "no"
