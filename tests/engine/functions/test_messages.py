"""``ctx.wait_for_signal``, ``ctx.receive``, completable messages, ``ctx.send``."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failure, fault, told
from tests.engine.kit import Facts, an_app, soon, until

from durable import Break, Context, RunFailed, SignalTimeout, StepFailed, workflow
from durable.testing.harness import AsyncHarness


class Approval(BaseModel):
    ok: bool
    by: str = "?"


# ---------------------------------------------------------------- signals


async def test_a_signal_of_a_type(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        approval = await ctx.wait_for_signal("approval", type=Approval)
        assert type(approval) is Approval
        await ctx.step(log.do, 1)
        return str(approval.by)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        status = await run.status()
        assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "signal", "approval")
        assert await run.signal("other", 1)
        await b.drain()
        assert (await run.status()).status == "suspended"
        await run.signal("approval", {"ok": True, "by": "ann"})
        await b.drain()
        assert await run.result(timeout=5) == "ann"


async def test_resume_answers_a_wait_strictly(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.sleep(60)
        return await ctx.wait_for_signal("approval")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert not (await b.app.resume(run, "approval", 1)).accepted
        await b.skip(seconds=61)
        await b.drain()
        assert not (await b.app.resume(run, "other", 1)).accepted
        assert (await b.app.resume(run, "approval", 2)).accepted
        await b.drain()
        assert await run.result(timeout=5) == 2


async def test_a_signal_that_is_not_of_its_type(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.wait_for_signal("approval", type=Approval)
        except StepFailed as error:
            await ctx.wait_for_signal("approval", type=Approval)
            return error.kind
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("approval", {"ok": "perhaps"})
        await b.drain()
        await run.signal("approval", {"ok": True})
        await b.drain()
        assert await run.result(timeout=5) == "critical"


async def test_waits_of_one_signal_are_counted(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        return [await ctx.wait_for_signal("go"), await ctx.wait_for_signal("go")]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("go", 1)
        await run.signal("go", 2)
        await b.drain()
        assert await run.result(timeout=5) == [1, 2]
        assert [s.step_id for s in (await run.status()).steps] == ["go", "go#2"]


async def test_signal_timeout(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.wait_for_signal("go", timeout=timedelta(minutes=1))
        except SignalTimeout as error:
            late = await ctx.wait_for_signal("go", timeout=60, on_timeout={"late": True})
            return [error.signal, isinstance(error, TimeoutError), late]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(2):
            await b.drain()
            await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == ["go", True, {"late": True}]
        assert [line for line in await told(run) if "timed_out" in line] == ["wait_timed_out go", "wait_timed_out go#2"]


async def test_a_deadline_is_fixed_when_the_wait_begins(place: Place) -> None:
    """A pause and restarts do not prolong it."""

    @workflow
    async def w(ctx: Context) -> str:
        return str(await ctx.wait_for_signal("go", timeout=60, on_timeout="late"))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.app.pause(run)
        await b.skip(seconds=61)
        await run.signal("go", "too late")
        await b.drain()
        assert (await run.status()).status == "paused"
        await b.app.resume(run)
        await b.drain()
        assert await run.result(timeout=5) == "late"


# ---------------------------------------------------------------- receive


@pytest.mark.behaviour("RV-40")
async def test_any_of_several_names(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        (message,) = await ctx.receive("first", "second")
        assert message.sent_at.tzinfo is not None
        return [message.name, message.body, message.id]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.signal("third", 3)
        await b.drain()
        assert (await run.status()).waiting_name == "first, second"
        await run.signal("second", {"x": 2}, id="m-1")
        await b.drain()
        assert await run.result(timeout=5) == ["second", {"x": 2}, "m-1"]


@pytest.mark.behaviour("RV-41", "RV-47")
async def test_a_message_that_came_before_the_start(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        (message,) = await ctx.receive("m", timeout=60)
        return message.body

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", "early")
        await b.drain()
        assert await run.result(timeout=5) == "early"


@pytest.mark.behaviour("RV-46")
async def test_no_message_in_time(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        return list(await ctx.receive("m", timeout=60))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).wake_at is not None
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == []


@pytest.mark.behaviour("RV-49")
async def test_a_batch(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[list[Any]]:
        batches = []
        for _ in range(3):
            batches.append([m.body for m in await ctx.receive(limit=2, timeout=60)])
            await ctx.sleep(1)
        return batches

    async with place.working(w) as b:
        run = await b.app.start(w)
        for name, body in (("a", 1), ("b", 2), ("a", 3)):
            await run.signal(name, body)
        await b.drain()
        await b.skip(seconds=2)
        await b.drain()
        await b.skip(seconds=2)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        await b.skip(seconds=2)
        await b.drain()
        assert await run.result(timeout=5) == [[1, 2], [3], []]


@pytest.mark.behaviour("RV-50")
async def test_a_message_that_came_while_a_step_ran(place: Place) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await go.wait()

    @workflow
    async def w(ctx: Context) -> Any:
        await ctx.step(work)
        return (await ctx.receive("m"))[0].body

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.start_jobs()
        await soon(started.wait())
        await run.signal("m", "meanwhile")
        go.set()
        await b.drain()
        assert await run.result(timeout=5) == "meanwhile"


@pytest.mark.behaviour("RV-52")
async def test_the_second_finds_nothing(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        first = await ctx.receive("m", timeout=60)
        second = await ctx.receive("m", timeout=60)
        return {"first": first[0].body, "second": second[0].body if second else None}

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", "first")
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == {"first": "first", "second": None}


async def test_messages_wait_while_a_run_is_paused(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        return [(await ctx.receive())[0].body for _ in range(3)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.app.pause(run)
        for body in (1, 2, 3):
            await run.signal("m", body)
        await b.drain()
        assert (await run.status()).status == "paused"
        await b.app.resume(run)
        await b.drain()
        assert await run.result(timeout=5) == [1, 2, 3]


@workflow
async def three_messages(ctx: Context) -> list[Any]:
    found: list[Any] = []
    while len(found) < 5:
        found += [m.body for m in await ctx.receive("m", limit=2)]
        await ctx.step(abs, len(found))
    return found


async def test_each_message_is_taken_once_whatever_crashes(dsn: str) -> None:
    async with an_app(dsn, three_messages) as app, AsyncHarness(app) as t:
        run = await app.start(three_messages)
        for n in range(5):
            await run.signal("m", n)
            await t.drain(max_steps=1)
        while not (await run.status()).ended:
            await t.drain(max_steps=1)
        assert await run.result(timeout=5) == [0, 1, 2, 3, 4]


async def test_the_same_id_is_one_message(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        return [m.body for m in await ctx.receive(limit=10)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        for body in (1, 2):
            await run.signal("m", body, id="same")
        await b.drain()
        assert await run.result(timeout=5) == [1]


async def test_the_wait_that_began_first_gets_the_message(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        async def late(c: Context) -> Any:
            await c.sleep(5)
            return await c.wait_for_signal("m")

        # the second in the mapping waits first
        return await ctx.join("j", {"late": late, "early": lambda c: c.wait_for_signal("m")})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        await run.signal("m", 1)
        await b.drain()
        await run.signal("m", 2)
        await b.drain()
        assert await run.result(timeout=5) == {"late": 2, "early": 1}


async def test_two_waits_do_not_take_one_message(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> dict[str, Any]:
        return await ctx.join("j", {n: lambda c: c.wait_for_signal("m", timeout=60, on_timeout=None) for n in "ab"})

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await run.signal("m", 1)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == {"a": 1, "b": None}


@pytest.mark.parametrize(("limit", "says"), [(0, "at least 1"), (True, "at least 1")])
async def test_limits_of_a_batch(live: Place, limit: Any, says: str) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.receive(limit=limit)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert says in await fault(run)


# ---------------------------------------------------------------- completable messages


@pytest.mark.behaviour("RV-43")
async def test_completed_messages_stay_completed(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        found = []
        for n in range(2):
            (message,) = await ctx.receive("m", completable=True)
            await message.complete({"n": n})
            found.append(message.body)
            await ctx.sleep(60)
        return found

    async with place.working(w) as b:
        run = await b.app.start(w)
        asked = asyncio.create_task(b.app.request(run, "m", "one", timeout=30))
        await b.work_until(asked.done)
        assert asked.result() == {"n": 0}
        await b.drain()
        await run.signal("m", "two")
        await b.skip(seconds=61)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == ["one", "two"]


@pytest.mark.behaviour("RV-44")
async def test_the_one_before_was_not_completed(place: Place, facts: Facts) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.receive("m", completable=True)
        await ctx.receive("m", completable=True)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", 1)
        await run.signal("m", 2)
        await b.drain()
        assert "has not been completed" in (await failure(run)).message
        assert [(name, state) for _, name, state in facts.inbox(run)] == [("m", "seen"), ("m", "seen")]


async def test_that_error_can_be_caught_and_the_message_completed(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        (one,) = await ctx.receive("m", completable=True)
        try:
            await ctx.receive("m", completable=True)
        except Exception as error:
            await one.complete("first")
            (two,) = await ctx.receive("m", completable=True)
            await two.complete("second")
            return [type(error).__name__, one.body, two.body]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", 1)
        await run.signal("m", 2)
        await b.drain()
        assert await run.result(timeout=5) == ["DefinitionError", 1, 2]


async def test_a_request_is_answered_once_over_crashes(dsn: str, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        async def serve(c: Context, done: list[Any]) -> list[Any] | Break[list[Any]]:
            (message,) = await c.receive("quote", completable=True, type=int)
            price = await c.step(log.do, message.body, message.body * 10)
            await message.complete(price)
            done = [*done, message.body]
            return Break(done) if len(done) == 3 else done

        return await ctx.loop("serve", serve, [])

    async with an_app(dsn, w) as app, AsyncHarness(app) as t:
        run = await app.start(w)
        asked = [asyncio.create_task(app.request(run, "quote", n, timeout=30, id=f"q{n}")) for n in (1, 2, 3)]
        await until(lambda: len(facts.inbox(run)) == 3)
        while not (await run.status()).ended:
            await t.drain(max_steps=1)
        answers = await soon(asyncio.gather(*asked))
        assert answers == [10, 20, 30]
        assert sorted(log) == [1, 2, 3]


async def test_a_request_to_a_run_that_fails(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.receive("m", completable=True)
        await ctx.step(log.fail, **ONCE)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        asked = asyncio.create_task(b.app.request(run, "m", 1, timeout=30))
        await b.work_until(asked.done)
        with pytest.raises(RunFailed):
            asked.result()


async def test_what_is_not_completable(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        (message,) = await ctx.receive("m")
        try:
            await message.complete(1)
        except Exception as error:
            return str(error)
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", 1)
        await b.drain()
        assert "completable=True" in await run.result(timeout=5)


async def test_a_reserved_message_is_not_taken_by_another_wait(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        (one,) = await ctx.receive("m", completable=True)
        other = await ctx.receive("m", timeout=60)
        await one.complete("ok")
        return [one.body, [m.body for m in other]]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await run.signal("m", 1)
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == [1, []]


# ---------------------------------------------------------------- sending


@workflow
async def target(ctx: Context) -> list[Any]:
    found: list[Any] = []
    while "end" not in found:
        found += [m.body for m in await ctx.receive("news", limit=10)]
    return found


@workflow
async def sender(ctx: Context, to: uuid.UUID) -> list[bool]:
    told = [await ctx.send(to, "news", 1), await ctx.send(to, "news", 2)]
    return [*told, await ctx.send(to, "news", "end")]


async def test_send_is_exactly_once(dsn: str) -> None:
    async with an_app(dsn, target, sender) as app, AsyncHarness(app) as t:
        to = await app.start(target)
        run = await app.start(sender, to.id)
        for _ in range(40):
            if await t.drain(max_steps=1) == 0:
                break
        assert await run.result(timeout=5) == [True, True, True]
        assert await to.result(timeout=5) == [1, 2, "end"]
        assert [s.step_id for s in (await run.status()).steps] == ["send news", "send news#2", "send news#3"]


async def test_send_to_a_run_that_has_ended_or_is_unknown(place: Place) -> None:
    @workflow
    async def nothing(ctx: Context) -> None:
        return None

    @workflow
    async def w(ctx: Context, to: uuid.UUID) -> list[Any]:
        late = await ctx.send(to, "news")
        try:
            await ctx.send(ctx.uuid4(), "news")
        except StepFailed as error:
            return [late, error.kind, error.error["type"]]
        return []

    async with place.working(nothing, w) as b:
        to = await b.app.start(nothing)
        await b.drain()
        run = await b.app.start(w, to.id)
        for _ in range(4):
            await b.drain()
            await b.skip(seconds=60)
        assert await run.result(timeout=5) == [False, "exhausted", "durable.errors.RunNotFound"]


async def test_a_crash_after_each_step_of_a_conversation(dsn: str) -> None:
    run = await crashing(dsn, conversation, None, target)
    assert (await run.status()).status == "completed"


@workflow
async def conversation(ctx: Context) -> Any:
    other = await ctx.start(target)
    await ctx.send(other, "news", "end")
    return None
