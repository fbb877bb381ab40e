"""Cancel, pause and resume, against runs that are executing: attached, with a connection, detached, in branches."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from tests.engine.kit import Bench, Ctx, Facts, soon, until, working

from durable import RunCanceled, define, step
from durable.define.builder import Builder


class Steady:
    """A handler that works until it is interrupted or let go."""

    def __init__(self, *, lent: bool = False) -> None:
        self.lent = lent
        self.began, self.go_on, self.interrupted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.calls: list[str] = []

    async def __call__(self, ctx: Ctx) -> str:
        self.calls.append(ctx.step_id)
        if self.lent:
            connection = await ctx.async_connection()
            await connection.exec_driver_sql("insert into books values ('written')")
        self.began.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.interrupted.set()
            raise
        return "done"


class SteadyThread:
    """The same in a thread, which can only be told."""

    def __init__(self) -> None:
        self.began, self.told, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self.calls: list[str] = []

    def __call__(self, ctx: Ctx) -> str:
        self.calls.append(ctx.step_id)
        self.began.set()
        while not self.go_on.wait(0.005):
            if ctx.cancelled:
                self.told.set()
        return "done"


def books(facts: Facts) -> list[Any]:
    return [row["page"] for row in facts.rows("select page from books")]


async def taken_up(bench: Bench, run: Any, handler: Steady) -> asyncio.Task[None]:
    (job,) = await bench.start_jobs()
    await soon(handler.began.wait())
    return job


# ---------------------------------------------------------------- cancel


@pytest.mark.parametrize("how", ["attached", "lent", "claimed", "detached", "route", "loop"])
async def test_cancel_interrupts_the_handler_now(dsn: str, facts: Facts, how: str) -> None:
    facts.execute("create table books (page text)")
    handler = Steady(lent=how == "lent")
    flow: Builder[Any] = define("w")
    match how:
        case "claimed":
            flow.step("a", handler, transactional=False)
        case "route":
            flow.route("r", lambda ctx: "one", {"one": handler})
        case "loop":
            flow.loop("l", handler, max_iterations=3)
        case _:
            flow.step("a", handler)
    flow.step("b", lambda ctx: pytest.fail("it went on"))
    async with working(dsn, flow, detach_after=0 if how == "detached" else 1_000) as bench:
        run = await bench.app.start("w")
        job = await taken_up(bench, run, handler)
        if how in ("claimed", "detached"):
            await until(lambda: facts.run(run)["claim_token"])
        assert await run.cancel(reason="changed my mind")
        await soon(handler.interrupted.wait())
        await soon(job)
        with pytest.raises(RunCanceled, match="changed my mind"):
            await run.result(timeout=10)
        assert books(facts) == []
        assert not await run.cancel()
        await bench.drain()
        assert "a" not in facts.journal(run)
        assert len(handler.calls) == 1
        facts.check_rest()


async def test_cancel_interrupts_all_branches(dsn: str, facts: Facts) -> None:
    handlers = [Steady(), Steady(), Steady()]
    flow = define("w").parallel("p", {str(n): handler for n, handler in enumerate(handlers)})
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        (job,) = await bench.start_jobs()
        handlers[2].go_on.set()
        await until(lambda: facts.journal(run) == ["p/2"])
        assert await run.cancel()
        await soon(asyncio.gather(handlers[0].interrupted.wait(), handlers[1].interrupted.wait()))
        await soon(job)
        assert (await run.status()).status == "canceled"
        assert facts.journal(run) == ["p/2"]
        await bench.drain()
        facts.check_rest()


async def test_cancel_with_compensation_undoes_what_a_branch_had_finished(dsn: str, facts: Facts) -> None:
    undone: list[str] = []
    quick, slow = Steady(), Steady()
    quick.go_on.set()

    async def undo(ctx: Ctx) -> None:
        undone.append(ctx.step_id)

    flow = define("w").parallel("p", {"quick": quick, "slow": slow}, compensate=undo)
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        (job,) = await bench.start_jobs()
        await until(lambda: facts.journal(run) == ["p/quick"])
        assert await run.cancel(compensate=True)
        await soon(slow.interrupted.wait())
        await soon(job)
        await bench.drain()
        assert undone == ["undo:p/quick"]
        assert (await run.status()).status == "canceled"
        facts.check_rest()


async def test_cancel_with_compensation_awaits_a_thread_and_undoes_what_it_did(dsn: str, facts: Facts) -> None:
    undone: list[Any] = []

    def undo(ctx: Ctx) -> None:
        undone.append((ctx.step_id, ctx.output))

    handler = SteadyThread()
    flow = define("w").step("first", lambda ctx: 1, compensate=undo).step("long", handler, compensate=undo)
    async with working(dsn, flow, detach_after=0) as bench:
        run = await bench.app.start("w")
        jobs = await bench.start_jobs()
        try:
            await until(handler.began.is_set)
            await until(lambda: facts.run(run)["claim_token"])
            assert await run.cancel(compensate=True)
            await until(handler.told.is_set)
            assert undone == []
            assert facts.run(run)["status"] == "running"
        finally:
            handler.go_on.set()
        await soon(jobs[0])
        await bench.drain()
        assert facts.journal(run) == ["first", "long", "undo:long", "undo:first"]
        assert undone == [("undo:long", "done"), ("undo:first", 1)]
        assert (await run.status()).status == "canceled"
        facts.check_rest()


async def test_cancel_discards_what_a_thread_brings_later(dsn: str, facts: Facts) -> None:
    handler = SteadyThread()
    async with working(dsn, define("w").step("long", handler), detach_after=0) as bench:
        run = await bench.app.start("w")
        jobs = await bench.start_jobs()
        try:
            await until(handler.began.is_set)
            await until(lambda: facts.run(run)["claim_token"])
            assert await run.cancel()
            assert facts.run(run)["status"] == "canceled"
            await until(handler.told.is_set)
        finally:
            handler.go_on.set()
        await soon(jobs[0])
        assert facts.journal(run) == []
        await bench.drain()
        facts.check_rest()


def boom(ctx: Ctx) -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("claimed", [False, True])
async def test_cancel_of_a_rollback_stops_after_the_compensator_at_work(dsn: str, facts: Facts, claimed: bool) -> None:
    undo = Steady()
    flow = (
        define("w")
        .step("a", lambda ctx: 1, compensate=lambda ctx: pytest.fail("it went on"))
        .step("b", lambda ctx: 2, compensate=step(transactional=False)(undo) if claimed else undo)
        .step("c", boom, retry=1)
    )
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        await bench.work_until(undo.began.is_set)
        assert await run.cancel(reason="leave it")
        if claimed:
            await until(lambda: facts.run(run)["reason"] == "leave it")
        else:
            await until(lambda: facts.inbox(run))
        facts.execute("select pg_notify('durable_control', %s)", str(run.id))
        await bench.pump()
        undo.go_on.set()
        await bench.drain()
        assert not undo.interrupted.is_set()
        status = await run.status()
        assert (status.status, status.not_undone) == ("canceled", ("a",))
        assert len(undo.calls) == 1
        assert facts.attempts(run) == []
        facts.check_rest()


async def test_a_message_to_a_run_that_rolls_back_leaves_the_compensator_alone(dsn: str, facts: Facts) -> None:
    undo = Steady()
    flow = define("w").step("a", lambda ctx: 1, compensate=step(transactional=False)(undo)).step("b", boom, retry=1)
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        await bench.work_until(undo.began.is_set)
        assert await run.signal("hello")
        await until(lambda: facts.inbox(run) == [("signal", "hello", "seen")], "its owner has looked")
        undo.go_on.set()
        await bench.drain()
        assert not undo.interrupted.is_set()
        assert facts.attempts(run) == []
        assert facts.journal(run) == ["a", "b", "undo:a"]
        facts.check_rest()


# ---------------------------------------------------------------- pause


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("last", [False, True])
async def test_pause_takes_effect_after_the_step(dsn: str, facts: Facts, claimed: bool, last: bool) -> None:
    handler = Steady()
    calls: list[str] = []
    flow = define("w").step("a", handler, transactional=False if claimed else None)
    if not last:
        flow.step("b", lambda ctx: calls.append("b"))
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        job = await taken_up(bench, run, handler)
        assert await run.pause()
        if claimed:
            await until(lambda: facts.run(run)["pausing"])
        handler.go_on.set()
        await soon(job)
        await bench.drain()
        status = await run.status()
        assert status.status == "paused"
        assert status.cursor == 1
        assert facts.journal(run) == ["a"]
        assert calls == []
        facts.check_rest()
        assert await run.resume()
        await bench.drain()
        assert (await run.status()).status == "completed"
        assert len(handler.calls) == 1
        assert calls == ([] if last else ["b"])
        facts.check_rest()


async def test_a_pause_that_is_taken_back_before_the_step_ends(dsn: str, facts: Facts) -> None:
    handler = Steady()
    async with working(dsn, define("w").step("a", handler, transactional=False)) as bench:
        run = await bench.app.start("w")
        job = await taken_up(bench, run, handler)
        assert await run.pause()
        assert await run.resume()
        handler.go_on.set()
        await soon(job)
        await bench.drain()
        assert (await run.status()).status == "completed"
        facts.check_rest()


async def test_pause_waits_for_all_branches(dsn: str, facts: Facts) -> None:
    one, two = Steady(), Steady()
    async with working(dsn, define("w").parallel("p", {"one": one, "two": two})) as bench:
        run = await bench.app.start("w")
        (job,) = await bench.start_jobs()
        await soon(asyncio.gather(one.began.wait(), two.began.wait()))
        assert await run.pause()
        one.go_on.set()
        await until(lambda: facts.journal(run) == ["p/one"])
        assert facts.run(run)["status"] == "running"
        two.go_on.set()
        await soon(job)
        assert facts.run(run)["status"] == "paused"
        assert await run.resume()
        await bench.drain()
        assert await run.result(timeout=10) == {"p": {"one": "done", "two": "done"}}
        assert one.calls == ["p/one"]
        assert two.calls == ["p/two"]
        facts.check_rest()


async def test_messages_wait_while_a_run_is_paused(dsn: str, facts: Facts) -> None:
    async with working(dsn, define("w").wait_for_signal("wait", "go")) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert await run.pause()
        assert await run.signal("go", 1)
        await bench.drain()
        assert (await run.status()).status == "paused"
        assert await run.resume()
        await bench.drain()
        assert await run.result(timeout=10) == {"wait": 1}
        facts.check_rest()


async def test_a_message_to_a_claimed_run_that_is_paused_wakes_it_after_resume(dsn: str, facts: Facts) -> None:
    handler = Steady()
    flow = define("w").step("a", handler, transactional=False).wait_for_signal("wait", "go")
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        job = await taken_up(bench, run, handler)
        assert await run.pause()
        assert await run.signal("go", 1)
        handler.go_on.set()
        await soon(job)
        await bench.drain()
        assert (await run.status()).status == "paused"
        assert await run.resume()
        await bench.drain()
        assert await run.result(timeout=10) == {"a": "done", "wait": 1}
        facts.check_rest()


# ---------------------------------------------------------------- descendants


def family() -> tuple[Builder[Any], ...]:
    return (
        define("parent").child_workflow("kid", "child"),
        define("child").child_workflow("grandkid", "grandchild"),
        define("grandchild").wait_for_signal("wait", "go"),
    )


async def statuses(bench: Bench) -> dict[str, str]:
    return {run.workflow: run.status.value for run in await bench.app.list()}


async def test_cancel_reaches_descendants(dsn: str, facts: Facts) -> None:
    async with working(dsn, *family()) as bench:
        run = await bench.app.start("parent")
        await bench.drain()
        assert await run.cancel(reason="enough")
        await bench.drain()
        assert await statuses(bench) == dict.fromkeys(["parent", "child", "grandchild"], "canceled")
        facts.check_rest()


async def test_cancel_interrupts_the_handler_of_a_grandchild(dsn: str, facts: Facts) -> None:
    handler = Steady()
    parent, child, _ = family()
    async with working(dsn, parent, child, define("grandchild").step("a", handler)) as bench:
        run = await bench.app.start("parent")
        await bench.work_until(handler.began.is_set)
        assert await run.cancel()
        await bench.work_until(handler.interrupted.is_set)
        await bench.drain()
        assert await statuses(bench) == dict.fromkeys(["parent", "child", "grandchild"], "canceled")
        facts.check_rest()


async def test_pause_and_resume_reach_descendants(dsn: str, facts: Facts) -> None:
    async with working(dsn, *family()) as bench:
        run = await bench.app.start("parent")
        await bench.drain()
        assert await run.pause()
        await bench.drain()
        assert await statuses(bench) == dict.fromkeys(["parent", "child", "grandchild"], "paused")
        assert await run.resume()
        await bench.drain()
        assert await statuses(bench) == dict.fromkeys(["parent", "child", "grandchild"], "suspended")
        (grandchild,) = await bench.app.list(workflow="grandchild")
        assert await bench.app.signal(grandchild.id, "go", 3)
        await bench.drain()
        assert await run.result(timeout=10) == {"kid": {"grandkid": {"wait": 3}}}
        facts.check_rest()


async def test_cancel_of_a_child_fails_its_parent(dsn: str, facts: Facts) -> None:
    async with working(dsn, *family()) as bench:
        run = await bench.app.start("parent")
        await bench.drain()
        (child,) = await bench.app.list(workflow="child")
        assert await bench.app.cancel(child.id, reason="this one")
        await bench.drain()
        assert await statuses(bench) == {"parent": "failed", "child": "canceled", "grandchild": "canceled"}
        error = (await run.status()).error
        assert error is not None
        assert "was canceled: this one" in error.message
        facts.check_rest()
