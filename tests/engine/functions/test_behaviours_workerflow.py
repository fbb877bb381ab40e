"""Behaviours of workerflow, in this engine's terms: its run is a step or a block, its wait a signal, its alarm
``wake_at``; to evict an instance is to forget its body, to kill it is a worker that dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.engine.functions.kit import ONCE, Log, Place, failure, fault, forget_bodies, told
from tests.engine.kit import Facts, soon, until

from durable import Context, JoinFailed, NonRetryable, Retry, RunExists, SignalTimeout, workflow
from durable.engine.points import Point

IN_FIVE = Retry(max_attempts=2, initial=5, jitter=False)


class Slow:
    """A handler that ends when it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.began, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> str:
        self.calls += 1
        self.began.set()
        await self.go_on.wait()
        return "slow"


class Refused(NonRetryable):
    pass


def parents(facts: Facts, run: Any) -> dict[str, str | None]:
    """The parent of each journaled step."""
    rows = facts.rows("select step_id, parent from durable.journal where run_id = %s and kind <> 'result'", run.id)
    return {row["step_id"]: row["parent"] for row in rows}


def steps(status: Any) -> dict[str, Any]:
    """All steps of a snapshot by their ids, nested ones too."""
    found: dict[str, Any] = {}
    waiting = list(status.steps)
    while waiting:
        step = waiting.pop()
        found[step.step_id] = step
        waiting += step.children
    return found


async def life(run: Any) -> list[str]:
    """The kinds of the run's history that concern the run as a whole."""
    return [event.kind for event in await run.history() if event.step is None]


# ---------------------------------------------------------------- start and restarts


@pytest.mark.behaviour("WF-01")
async def test_a_new_run_is_pending(place: Place) -> None:
    @workflow
    async def empty(ctx: Context) -> None:
        pass

    async with place.working(empty) as b:
        run = await b.app.start(empty)
        assert (await run.status()).status == "pending"
        assert await life(run) == ["created"]


@pytest.mark.behaviour("WF-02", "WF-28", "WF-71")
async def test_a_wait_between_two_steps(place: Place, log: Log) -> None:
    seen: list[Any] = []

    @workflow
    async def flow(ctx: Context, given: dict[str, int]) -> int:
        seen.append(given)
        await ctx.step(log.do, "A")
        event = await ctx.wait_for_signal("E")
        return int(await ctx.step(log.do, "B", event["value"] + given["more"]))

    async with place.working(flow) as b:
        run = await b.app.start(flow, {"more": 1})
        await b.drain()
        assert (await run.status()).derived == "waiting_for_signal"
        forget_bodies(b)
        assert await run.signal("E", {"value": 42})
        await b.drain()
        assert await run.result() == 43
        assert log == ["A", "B"]
        assert len(seen) >= 2
        assert all(given == {"more": 1} for given in seen)
        assert (await run.status()).results["E"] == {"value": 42}
        assert [kind for kind in await life(run) if kind not in ("suspended", "message_received")] == [
            "created", "started", "completed",
        ]  # fmt: skip


@pytest.mark.behaviour("WF-04", "WF-55", "WF-59", "WF-62", "WF-73")
async def test_an_event_that_comes_while_the_run_is_paused(place: Place, facts: Facts) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.wait_for_signal("E")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.pause()
        await b.drain()
        assert (await run.status()).status == "paused"
        assert facts.run(run)["wake_at"] is None
        forget_bodies(b)
        assert await run.signal("E", 7)
        await b.drain()
        status = await run.status()
        assert (status.status, steps(status)["E"].status) == ("paused", "waiting")
        assert await run.resume()
        await b.drain()
        assert await run.result() == 7
        whole = [k for k in await life(run) if k in ("created", "started", "paused", "resumed", "completed")]
        assert whole == ["created", "started", "paused", "resumed", "completed"]


@pytest.mark.behaviour("WF-05")
async def test_a_sleep_and_a_step(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.sleep(1, name="nap")
        await ctx.step(log.do, "after")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        status = await run.status()
        assert status.derived == "sleeping"
        began = next(event for event in await run.history() if event.kind == "sleep_waiting")
        assert status.wake_at == began.at + timedelta(seconds=1)
        forget_bodies(b)
        await b.skip(seconds=1)
        await b.drain()
        assert (await run.status()).status == "completed"
        (elapsed,) = [event for event in await run.history() if event.kind == "sleep_elapsed"]
        assert elapsed.at >= began.at + timedelta(seconds=1)
        assert log == ["after"]


@pytest.mark.behaviour("WF-07")
async def test_a_step_that_was_killed(dsn: str, facts: Facts) -> None:
    slow = Slow()

    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.step(slow, retry=2, transactional=False)

    place = Place(dsn, replays=False)
    async with place.app(flow) as app:
        async with place.bench(app) as first:
            run = await app.start(flow)
            await first.start_jobs()
            await soon(slow.began.wait())
            await first.crash()
        slow.go_on.set()
        async with place.bench(app) as second:
            await second.drain()
        assert await run.result() == "slow"
        assert slow.calls == 2
        (interrupted,) = [event for event in await run.history() if event.kind == "attempt_interrupted"]
        assert interrupted.step == "Slow"
        assert interrupted.next_attempt_at is None  # the first takeover is immediate
        assert "died" in str(interrupted.error)
        (succeeded,) = [event for event in await run.history() if event.kind == "attempt_succeeded"]
        assert succeeded.attempt == 1  # the fix: a crash uses up no attempt


# ---------------------------------------------------------------- names and failures


@pytest.mark.behaviour("WF-08")
async def test_two_steps_of_one_name(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="same")
        await ctx.step(log.do, 2, name="same")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert "'same'" in await fault(run)
        assert log == [1]


@pytest.mark.behaviour("WF-10", "WF-53", "WF-74", "WF-97")
async def test_an_error_that_is_final(place: Place, facts: Facts) -> None:
    def refuse() -> None:
        raise Refused("never")

    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(refuse, retry=5)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        error = await failure(run)
        assert (error.type.rpartition(".")[2], error.message, error.kind) == ("Refused", "never", "critical")
        (step,) = (await run.status()).steps
        assert (step.status, step.attempt, step.next_attempt_at) == ("failed", 1, None)
        assert facts.run(run)["wake_at"] is None
        assert (await life(run))[-1] == "failed"
        facts.check_rest()


@pytest.mark.behaviour("WF-11", "WF-95")
async def test_the_last_attempt_fails(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(log.fail, "luck", retry=IN_FIVE)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        await b.skip(seconds=5)
        await b.drain()
        assert (await failure(run)).kind == "exhausted"
        first, second = [event for event in await run.history() if event.kind == "attempt_failed"]
        assert first.next_attempt_at is not None
        assert (second.attempt, second.next_attempt_at) == (2, None)
        assert str(second.error) == "ValueError: no luck"


# ---------------------------------------------------------------- the definition itself fails


class Remote:
    """A part of the body that is not there the first `fails` times."""

    def __init__(self, fails: float) -> None:
        self.calls, self.fails = 0, fails

    async def __call__(self, ctx: Context) -> str:
        await ctx.step(self.call, **ONCE)
        return "there"

    async def call(self) -> None:
        self.calls += 1
        if self.calls <= self.fails:
            raise ConnectionError("it is not there")


def around(remote: Remote, **options: Any) -> Any:
    @workflow
    async def flow(ctx: Context) -> str:
        return await ctx.block("definition", remote, retry=Retry(factor=2, jitter=False, **options))

    return flow


@pytest.mark.behaviour("WF-13")
async def test_a_block_that_fails_once(place: Place, facts: Facts) -> None:
    remote = Remote(fails=1)
    flow = around(remote, max_attempts=4, initial=5)
    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert (await run.status()).derived == "retrying"
        await b.skip(seconds=5)
        await b.drain()
        assert await run.result() == "there"
        assert remote.calls == 2
        assert facts.run(run)["wake_at"] is None
        facts.check_rest()


@pytest.mark.behaviour("WF-14")
async def test_a_block_that_always_fails(place: Place) -> None:
    remote = Remote(fails=99)
    flow = around(remote, max_attempts=4, initial=5)
    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        for calls, seconds in enumerate((5, 10, 20), 1):
            assert remote.calls == calls
            await b.skip(seconds=seconds - 1)
            await b.drain()
            assert remote.calls == calls, "it was called before its time"
            await b.skip(seconds=1)
            await b.drain()
        assert remote.calls == 4
        assert (await failure(run)).message == "it is not there"  # the fix: it is given up, not left to a watchdog


@pytest.mark.behaviour("WF-16")
async def test_a_body_that_raises(place: Place, facts: Facts) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        raise ValueError("plainly")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert str(await failure(run)) == "ValueError: plainly"
        assert facts.run(run)["wake_at"] is None
        facts.check_rest()


@pytest.mark.behaviour("WF-17", "WF-64")
async def test_paused_while_a_block_waits_for_its_next_attempt(place: Place) -> None:
    remote = Remote(fails=1)
    flow = around(remote, max_attempts=2, initial=5)
    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.pause()
        await b.skip(seconds=60)
        await b.drain()
        assert (await run.status()).status == "paused"
        assert remote.calls == 1
        assert await run.resume()
        await b.drain()
        assert await run.result() == "there"


@pytest.mark.behaviour("WF-19", "WF-20")
async def test_a_worker_dies_while_a_block_waits_for_its_next_attempt(dsn: str) -> None:
    remote = Remote(fails=1)
    flow = around(remote, max_attempts=2, initial=5)
    place = Place(dsn, replays=False)
    async with place.app(flow) as app:
        async with place.bench(app) as first:
            run = await app.start(flow)
            await first.drain()
            assert remote.calls == 1
            await first.crash()
        async with place.bench(app) as second:
            await second.skip(seconds=5)
            await second.drain()
        assert await run.result() == "there"
        assert remote.calls == 2


@pytest.mark.behaviour("WF-22", "WF-23", "RV-107")
@pytest.mark.parametrize("point", [Point.AFTER_LOCK, Point.BEFORE_HANDLER, Point.BEFORE_COMMIT])
async def test_the_database_fails_in_the_middle(dsn: str, facts: Facts, point: Point, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.step(log.do, "there")

    async with Place(dsn, replays=False).working(flow) as b:
        b.points.on(point, lambda: facts.terminate("durable worker %"))
        run = await b.app.start(flow)
        await b.work_until(lambda: facts.run(run)["status"] in ("completed", "failed"))
        assert await run.result() == "there"
        assert facts.attempts(run) == []  # a lost connection is no failed attempt


# ---------------------------------------------------------------- progress, create


@pytest.mark.behaviour("WF-25", "WF-115")
async def test_a_wait_whose_time_is_over(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.wait_for_signal("E", timeout=0)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.SignalTimeout"
        assert "wait_timed_out E" in await told(run)


@pytest.mark.behaviour("WF-26")
async def test_two_siblings(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.join("both", {"a": lambda c: c.step(log.do, "a"), "b": lambda c: c.step(log.do, "b")})

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == {"a": "a", "b": "b"}
        assert sorted(log) == ["a", "b"]


@pytest.mark.behaviour("WF-29", "WF-31")
async def test_a_second_start(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context, given: str) -> str:
        log.append(given)
        await ctx.wait_for_signal("E")
        return given

    async with place.working(flow) as b:
        run = await b.app.start(flow, "first", key="k")
        await b.drain()
        with pytest.raises(RunExists):  # the fix: it is told, not ignored
            await b.app.start(flow, "second", key="k")
        await run.signal("E")
        await b.drain()
        assert await run.result() == "first"
        before = await run.status()
        assert (await b.app.start(flow, "first", key="k")).id == run.id
        await b.drain()
        assert await run.status() == before
        assert set(log) == {"first"}


# ---------------------------------------------------------------- nested


@pytest.mark.behaviour("WF-32")
async def test_three_levels(place: Place, facts: Facts, log: Log) -> None:
    async def inner(c: Context) -> Any:
        return await c.step(log.do, "L2", name="L2")

    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.block("L0", lambda c: c.block("L1", inner))

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == "L2"
        assert parents(facts, run) == {"L0/L1/L2": "L0/L1", "L0/L1": "L0", "L0": None}
        assert facts.attempts(run) == []
        told_of = {event.step: event.parent for event in await run.history() if event.step is not None}
        assert told_of == parents(facts, run)


@pytest.mark.behaviour("WF-34")
async def test_steps_in_parallel_branches(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        branches = {name: lambda c: c.step(log.do, "in", name="in") for name in ("a", "b")}
        return await ctx.join("both", branches)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert parents(facts, run) == {
            "both/a/in": "both/a", "both/b/in": "both/b", "both/a": "both", "both/b": "both", "both": None,
        }  # fmt: skip


@pytest.mark.behaviour("WF-35", "WF-43", "WF-80")
async def test_a_wait_can_not_be_swallowed(place: Place, facts: Facts, log: Log) -> None:
    """The fix: what waits is waited for, whatever the body catches."""

    async def work(c: Context) -> Any:
        return await c.step(log.do, "in", name="in", **ONCE)

    @workflow
    async def flow(ctx: Context) -> list[bool]:
        branches: dict[str, Callable[[Context], Any]] = {
            "work": lambda c: c.try_block("run", work),
            "wait": lambda c: c.try_block("until", lambda d: d.wait_for_signal("E")),
        }
        settled = await ctx.join("settled", branches)
        return [result.ok for result in settled.values()]

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        status = await run.status()
        assert status.derived == "waiting_for_signal"
        assert steps(status)["settled/wait/until/E"].status == "waiting"
        assert parents(facts, run)["settled/work/run/in"] == "settled/work/run"
        await run.signal("E")
        await b.drain()
        assert await run.result() == [True, True]


@pytest.mark.behaviour("WF-37")
async def test_a_wait_in_a_block(place: Place, facts: Facts) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.block("outer", lambda c: c.wait_for_signal("E"))

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        (began,) = [event for event in await run.history() if event.kind == "wait_waiting"]
        assert (began.step, began.parent) == ("outer/E", "outer")
        await run.signal("E", {"n": 1})
        await b.drain()
        assert await run.result() == {"n": 1}
        assert facts.value("select result from durable.journal where step_id = 'outer/E'") is not None
        assert steps(await run.status())["outer"].status == "completed"


@pytest.mark.behaviour("WF-38", "WF-40")
@pytest.mark.parametrize("final", [True, False])
async def test_a_failure_within_fails_what_is_around_it(place: Place, log: Log, final: bool) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        inside = log.refuse if final else log.fail
        await ctx.block("outer", lambda c: c.step(inside, name="inner", retry=5 if final else 1))

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        type_ = "durable.errors.NonRetryable" if final else "ValueError"
        assert (await failure(run)).type == type_
        found = steps(await run.status())
        assert [(found[key].status, found[key].error.type) for key in ("outer/inner", "outer")] == [
            ("failed", type_), ("failed", type_),
        ]  # fmt: skip
        assert len(log) == 1


@pytest.mark.behaviour("WF-41")
async def test_a_failure_around_what_has_succeeded(place: Place, log: Log) -> None:
    async def outer(c: Context) -> None:
        await c.step(log.do, "inner", name="inner")
        raise ValueError("after all")

    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.block("outer", outer)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert (await failure(run)).message == "after all"
        found = steps(await run.status())
        assert found["outer/inner"].status == "completed"
        assert (found["outer"].status, found["outer"].error.message) == ("failed", "after all")


@pytest.mark.behaviour("WF-44")
async def test_a_failed_branch_can_be_swallowed(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> list[str]:
        try:
            await ctx.join("all", {"bad": lambda c: c.step(log.fail, **ONCE), "good": lambda c: c.step(log.do, "good")})
        except JoinFailed as error:
            return list(error.failures)
        return []

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.result() == ["bad"]
        found = steps(await run.status())
        assert (found["all/bad"].status, found["all/good"].status) == ("failed", "completed")


@pytest.mark.behaviour("WF-46", "WF-88")
async def test_a_slow_branch_beside_a_wait(dsn: str) -> None:
    slow = Slow()

    @workflow
    async def flow(ctx: Context) -> Any:
        return await ctx.join("all", {"slow": lambda c: c.step(slow), "wait": lambda c: c.wait_for_signal("E")})

    async with Place(dsn, replays=False).working(flow) as b:
        run = await b.app.start(flow)
        (job,) = await b.start_jobs()
        await soon(slow.began.wait())

        async def begun() -> bool:
            found = steps(await run.status())
            return {"all/slow/Slow", "all/wait/E"} <= found.keys()

        await until(begun)
        status = await run.status()
        found = steps(status)
        assert status.status == "running"
        assert (found["all/slow/Slow"].status, found["all/wait/E"].status) == ("running", "waiting")
        slow.go_on.set()
        await soon(job)
        assert (await run.status()).derived == "waiting_for_signal"
        await run.signal("E", 1)
        await b.drain()
        assert await run.result() == {"slow": "slow", "wait": 1}


# ---------------------------------------------------------------- alarms, pause and resume


@pytest.mark.behaviour("WF-52")
async def test_nothing_is_left_of_a_completed_run(place: Place, facts: Facts) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.sleep(5)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        await b.skip(seconds=5)
        await b.drain()
        assert (await run.status()).status == "completed"
        assert facts.run(run)["wake_at"] is None
        facts.check_rest()


@pytest.mark.behaviour("WF-58", "WF-61")
async def test_pause_and_resume_where_there_is_nothing_to_do(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.wait_for_signal("E")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert not await run.resume()  # ours says no where the other raises
        assert await run.pause()
        before = await run.status()
        await run.pause()
        assert await run.status() == before
        assert (await life(run)).count("paused") == 1


# ---------------------------------------------------------------- incoming events


@pytest.mark.behaviour("WF-65", "WF-113")
async def test_an_event_is_stored_once_and_taken_by_its_wait(place: Place, facts: Facts) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        await ctx.sleep(5)
        return await ctx.wait_for_signal("E", name="the wait")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        assert await run.signal("E", {"n": 1}, id="once")
        assert await run.signal("E", {"n": 1}, id="once")
        rows = facts.rows("select * from durable.inbox where run_id = %s", run.id)
        assert [row["state"] for row in rows] == ["new"]
        await b.skip(seconds=5)
        await b.drain()
        assert await run.result() == {"n": 1}
        (row,) = facts.rows("select * from durable.inbox where run_id = %s", run.id)
        assert (row["state"], row["taken_by"]) == ("taken", "the wait")
        assert (await life(run)).count("suspended") == 1  # for the sleep: the event was there when the wait began


@pytest.mark.behaviour("WF-67", "WF-92")
@pytest.mark.parametrize("payload", [(), (None,)], ids=["absent", "null"])
async def test_no_payload(place: Place, payload: tuple[()] | tuple[None]) -> None:
    @workflow
    async def flow(ctx: Context) -> Any:
        return [await ctx.wait_for_signal("E")]

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await run.signal("E", *payload)
        await b.drain()
        assert await run.result() == [None]
        assert (await run.status()).results["E"] is None


@pytest.mark.behaviour("WF-68")
async def test_an_event_without_payload_is_kept_over_a_pause(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        await ctx.wait_for_signal("E")
        return "came"

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await run.pause()
        await run.signal("E")
        await b.drain()
        assert (await run.status()).status == "paused"
        await run.resume()
        await b.drain()
        assert await run.result() == "came"


# ---------------------------------------------------------------- the log


@pytest.mark.behaviour("WF-70", "WF-76", "WF-79")
async def test_canceled_before_it_began(place: Place) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.wait_for_signal("E")

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        assert await life(run) == ["created"]
        assert (await run.status()).steps == ()
        assert await run.cancel()
        await b.drain()
        status = await run.status()
        assert (status.status, status.reason) == ("canceled", None)
        assert await life(run) == ["created", "canceled"]


# ---------------------------------------------------------------- what is stored of steps, sleeps and waits


@pytest.mark.behaviour("WF-77")
async def test_three_attempts_by_default(place: Place, log: Log) -> None:
    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.step(log.fail)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        for _ in range(3):
            await b.drain()
            await b.skip(minutes=1)
        await b.drain()
        assert (await failure(run)).attempts == 3
        assert len(log) == 3
        (step,) = (await run.status()).steps
        assert (step.step_id, step.attempt) == ("fail", 3)


@pytest.mark.behaviour("WF-91")
@pytest.mark.parametrize("value", [0, "", False, [], {"n": 0}])
async def test_a_result_is_stored_as_it_is(place: Place, value: Any) -> None:
    def give() -> Any:
        return value

    @workflow
    async def flow(ctx: Context) -> Any:
        found = await ctx.step(give)
        await ctx.sleep(1)
        return [found]

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        forget_bodies(b)
        await b.skip(seconds=1)
        await b.drain()
        assert await run.result() == [value]
        assert (await run.status()).results["give"] == value


@pytest.mark.behaviour("WF-100", "WF-101", "WF-104")
async def test_a_sleep_keeps_its_first_time(dsn: str, facts: Facts) -> None:
    seconds = [60]

    @workflow
    async def flow(ctx: Context) -> None:
        await ctx.sleep(seconds[0], name="nap")
        await ctx.wait_for_signal("E")

    async with Place(dsn, replays=True).working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        status = await run.status()
        assert steps(status)["nap"].status == "waiting"
        seconds[0] = 600  # the code has changed; the sleep has begun
        await run.signal("E")
        await b.drain()
        again = await run.status()
        assert (again.wake_at, again.derived) == (status.wake_at, "sleeping")
        await b.skip(seconds=60)
        await b.drain()
        assert (await run.status()).status == "completed"


@pytest.mark.behaviour("WF-103", "WF-112")
@pytest.mark.parametrize("earlier", ["sleep", "wait"])
async def test_the_earliest_time_wakes_the_run(place: Place, earlier: str) -> None:
    first, last = (10, 100) if earlier == "sleep" else (100, 10)

    @workflow
    async def flow(ctx: Context) -> Any:
        branches: dict[str, Callable[[Context], Any]] = {
            "sleep": lambda c: c.sleep(first),
            "wait": lambda c: c.wait_for_signal("E", timeout=last, on_timeout="late"),
        }
        return await ctx.join("both", branches)

    async with place.working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        status = await run.status()
        assert status.started_at is not None
        began = min(event.at for event in await run.history() if event.kind.endswith("_waiting"))
        assert status.wake_at == began + timedelta(seconds=10)
        await b.skip(seconds=10)
        await b.drain()
        assert (await run.status()).wake_at == began + timedelta(seconds=100)
        await b.skip(seconds=90)
        await b.drain()
        assert await run.result() == {"sleep": None, "wait": "late"}


@pytest.mark.behaviour("WF-109", "WF-110")
async def test_a_deadline_is_written_once(dsn: str) -> None:
    @workflow
    async def flow(ctx: Context) -> str:
        with contextlib.suppress(SignalTimeout):
            await ctx.wait_for_signal("E", timeout=60)
            return "came"
        return "late"

    async with Place(dsn, replays=True).working(flow) as b:
        run = await b.app.start(flow)
        await b.drain()
        status = await run.status()
        await b.skip(seconds=30)
        await run.signal("another")  # rings, and the body is replayed
        await b.drain()
        assert (await run.status()).wake_at == status.wake_at
        await b.skip(seconds=30)
        await b.drain()
        assert await run.result() == "late"
