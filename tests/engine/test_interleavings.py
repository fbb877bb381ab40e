"""What happens when two things happen at once, each put into its order by force.

A test acts at a point of the engine (`Points`), or lets a burst stand between COMMIT and its next lock (`Gate`), and
waits for facts: a row, a session that waits for a lock, an event that a handler sets. None waits for time to pass.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psycopg
import pytest
from tests.engine.kit import Bench, Ctx, Facts, Gate, Held, an_app, soon, until, working

from durable import Context, Retry, Suspend, define, workflow
from durable.engine import engine as engine_module
from durable.engine import hold as hold_module
from durable.engine import recover
from durable.engine.points import Point
from durable.postgres import EmbeddedPostgres
from durable.store import inbox
from durable.store.query import Statement


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock is given up: what stands at the gate stands there until it is opened."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 30_000)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held row is given up at once."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 50)


@contextmanager
def held(dsn: str, run_id: Any) -> Iterator[None]:
    """Somebody else holds the row."""
    with psycopg.connect(dsn) as other:
        other.execute("select 1 from durable.runs where id = %s for update", [run_id])
        yield


def count(calls: list[str], name: str, value: Any = None) -> Any:
    """A handler that notes that it was called."""

    async def handler(ctx: Ctx) -> Any:
        calls.append(name)
        return value if value is not None else name

    return handler


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("point", [Point.AFTER_LOCK, Point.BEFORE_COMMIT])
async def test_a_signal_between_the_look_into_the_inbox_and_the_park_is_not_lost(
    dsn: str, facts: Facts, point: Point
) -> None:
    async with working(dsn, define("w").wait_for_signal("wait", "go")) as bench:
        run = await bench.app.start("w")

        def send() -> None:
            sent = facts.value("select durable.send_message(%s, 'signal', 'go', '7')", run.id)
            assert sent == "sent"

        bench.points.on(point, send, what="signal")
        await soon(bench.advance(run, 0))
        assert facts.run(run)["status"] == "suspended"
        assert facts.inbox(run) == [("signal", "go", "new")]  # nobody has looked at it: its doorbell must find it so
        await bench.drain()
        assert await run.result(timeout=10) == {"wait": 7}
        facts.check_rest()


async def test_a_signal_while_a_step_holds_the_row_is_taken_by_the_wait_behind_it(dsn: str, facts: Facts) -> None:
    async def send(ctx: Ctx) -> None:
        assert facts.value("select durable.send_message(%s, 'signal', 'go', '7')", ctx.run_id) == "sent"

    async with working(dsn, define("w").step("send", send).wait_for_signal("wait", "go")) as bench:
        run = await bench.app.start("w")
        await soon(bench.advance(run, 0))
        assert facts.run(run)["status"] == "completed"
        await bench.drain()
        facts.check_rest()


async def test_an_answer_that_comes_before_the_question_of_a_detached_step(dsn: str, facts: Facts) -> None:
    """Suspend is written by a claim's owner; what came while the handler was executing must wake the run."""
    asked, answered = asyncio.Event(), asyncio.Event()

    async def ask(ctx: Ctx) -> Any:
        if ctx.resume_data is None:
            asked.set()
            await answered.wait()
            return Suspend("?")
        return ctx.resume_data

    async with working(dsn, define("w").step("ask", ask), detach_after=0) as bench:
        run = await bench.app.start("w")
        _ = bench.advance(run, 0)
        await soon(asked.wait())
        await until(lambda: facts.run(run)["claim_token"])
        await run.signal("ask", "42")
        answered.set()
        await bench.drain()
        assert await run.result(timeout=10) == {"ask": "42"}
        facts.check_rest()


async def test_a_doorbell_at_a_busy_row_rings_again_and_many_of_them_once(
    dsn: str, facts: Facts, impatient: None
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def hold(ctx: Ctx) -> None:
        began.set()
        await go_on.wait()

    flow = define("w").step("hold", hold, transactional=True).wait_for_signal("one", "go").wait_for_signal("two", "go")
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        _ = bench.advance(run, 0)
        await soon(began.wait())
        facts.execute("delete from durable.procrastinate_jobs")
        for number in range(12):
            await run.signal("go", number)
        assert facts.tasks(run) == ["durable.ring"] * 12
        for ringing in await bench.start_jobs():
            await soon(ringing)
        (again,) = facts.jobs(run)
        assert again["queueing_lock"] == f"ring:{run.id}"
        assert again["scheduled_at"] is not None
        go_on.set()
        facts.execute("update durable.procrastinate_jobs set scheduled_at = null")
        await bench.drain()
        assert await run.result(timeout=10) == {"hold": None, "one": 0, "two": 1}


async def test_a_message_that_comes_as_a_busy_doorbell_gives_up_is_heard_by_the_next_ring(
    dsn: str, facts: Facts, impatient: None
) -> None:
    """The holder has read the inbox before the message came, and parks after the doorbell gave up."""
    async with working(dsn, define("w").wait_for_signal("wait", "go")) as bench:
        run = await bench.app.start("w")
        await soon(bench.advance(run, 0))
        with held(dsn, run.id):
            await run.signal("go", 1)
            (ring,) = [job for job in facts.jobs(run) if job["task_name"] == "durable.ring"]
            facts.execute("delete from durable.procrastinate_jobs where id <> %s", ring["id"])
            (ringing,) = await bench.start_jobs()
            await soon(ringing)
        assert facts.run(run)["status"] == "suspended"
        assert facts.tasks(run) == ["durable.ring"]
        facts.execute("update durable.procrastinate_jobs set scheduled_at = null")
        await bench.drain()
        assert await run.result(timeout=10) == {"wait": 1}


async def test_a_continuation_at_a_busy_row_comes_again(dsn: str, facts: Facts, impatient: None) -> None:
    """Whoever holds the row may end without moving the run on."""
    async with working(dsn, define("w").step("a", lambda ctx: 1)) as bench:
        run = await bench.app.start("w")
        with held(dsn, run.id):
            (job,) = await bench.start_jobs()
            await soon(job)
        (again,) = facts.jobs(run)
        assert again["args"]["revision"] == 0
        assert again["scheduled_at"] is not None
        facts.execute("update durable.procrastinate_jobs set scheduled_at = null")
        await bench.drain()
        assert await run.result(timeout=10) == {"a": 1}


# ---------------------------------------------------------------- between two steps of a burst


async def test_a_probe_into_a_live_burst_makes_no_orphan_of_it(
    dsn: str, facts: Facts, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps the row is free and no job is there: one look alone would take the run for an orphan."""
    calls: list[str] = []
    second, go_on = asyncio.Event(), asyncio.Event()

    async def stay(ctx: Ctx) -> None:
        second.set()
        await go_on.wait()

    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", stay)) as bench:
        gate = Gate(bench.app, facts)
        run = await bench.app.start("w")
        facts.execute("delete from durable.procrastinate_jobs")
        bursting = bench.advance(run, 0)
        await gate.wait()

        found, _ = await recover._without_job(bench.engine, None)
        assert {run_id for run_id, _ in found} == {run.id}, "a look is not fooled: nothing to be tested here"

        async def meanwhile(seconds: float) -> None:
            gate.open()
            await soon(second.wait())

        monkeypatch.setattr(recover, "asyncio", SimpleNamespace(sleep=meanwhile))
        assert await recover.adopt_orphans(bench.engine, None) == (0, None)
        assert facts.jobs() == []
        go_on.set()
        await soon(bursting)
        assert calls == ["a"]
        assert facts.run(run)["status"] == "completed"


@pytest.mark.parametrize("asked", ["pause", "cancel"])
async def test_who_takes_the_row_between_two_steps_stops_the_burst(
    dsn: str, facts: Facts, patient: None, asked: str
) -> None:
    calls: list[str] = []
    flow = define("w").step("a", count(calls, "a")).step("b", count(calls, "b")).step("c", count(calls, "c"))
    async with working(dsn, flow) as bench:
        gate = Gate(bench.app, facts)
        run = await bench.app.start("w")
        bursting = bench.advance(run, 0)
        await gate.wait()
        assert await (run.pause() if asked == "pause" else run.cancel())
        taken = facts.run(run)
        gate.open()
        await soon(bursting)
        assert calls == ["a"]
        assert facts.run(run) == taken, "the burst has written over it"
        await bench.drain()
        assert facts.journal(run) == ["a"]
        if asked == "pause":
            assert await run.resume()
            await bench.drain()
            assert await run.result(timeout=10) == {"a": "a", "b": "b", "c": "c"}
            assert calls == ["a", "b", "c"]
        facts.check_rest()


async def test_who_takes_the_row_after_a_step_with_a_connection_stops_the_burst(
    dsn: str, facts: Facts, patient: None
) -> None:
    """That connection goes back to be reset, and the row is locked anew on another one."""
    calls: list[str] = []

    async def lent(ctx: Ctx) -> None:
        _ = await ctx.async_connection()

    async with working(dsn, define("w").step("a", lent).step("b", count(calls, "b"))) as bench:
        run = await bench.app.start("w")

        def pause() -> None:
            query = "update durable.runs set status = 'paused', revision = revision + 1 where id = %s"
            assert facts.execute(query, run.id) == 1

        bench.points.on(Point.AFTER_COMMIT, pause)
        await soon(bench.advance(run, 0))
        assert calls == []
        assert facts.run(run)["status"] == "paused"


async def test_a_lock_that_fails_after_commit_does_not_repeat_the_step(dsn: str, facts: Facts) -> None:
    """Somebody holds the row for longer than the burst waits: it hands the rest to the queue."""
    calls: list[str] = []
    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))) as bench:
        gate = Gate(bench.app, facts)
        run = await bench.app.start("w")
        facts.execute("delete from durable.procrastinate_jobs")
        bursting = bench.advance(run, 0)
        await gate.wait()
        with held(dsn, run.id):
            gate.open()
            await soon(bursting)
        assert calls == ["a"]
        assert facts.journal(run) == ["a"]
        (job,) = facts.jobs(run)
        assert (job["task_name"], job["args"]["revision"]) == ("durable.advance", facts.run(run)["revision"])
        await bench.drain()
        assert calls == ["a", "b"]
        facts.check_rest()


WAITS_FOR_A_ROW = """
select count(*) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock' and wait_event <> 'advisory'
"""


async def test_who_has_to_wait_for_the_next_lock_sees_what_came_meanwhile(dsn: str, facts: Facts) -> None:
    """Between COMMIT and the next lock somebody else has the row, and a pause comes: no further step begins."""
    calls: list[str] = []
    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))) as bench:
        gate = Gate(bench.app, facts)
        run = await bench.app.start("w")
        bursting = bench.advance(run, 0)
        await gate.wait()
        with held(dsn, run.id):
            gate.open()
            await until(lambda: facts.value(WAITS_FOR_A_ROW), "the burst waits for the row")
            assert await run.pause()
        await soon(bursting)
        assert (calls, facts.run(run)["status"]) == (["a"], "paused")
        assert await run.resume()
        await bench.drain()
        assert calls == ["a", "b"]
        facts.check_rest()


async def test_an_error_after_commit_is_no_error_of_the_step(dsn: str, facts: Facts) -> None:
    calls: list[str] = []
    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))) as bench:
        good = bench.app.store.sql.relock
        bench.app.store.sql.__dict__["relock"] = Statement.of("select 1/0, %(run)s::text")
        bench.points.on(Point.AFTER_COMMIT, lambda: bench.app.store.sql.__dict__.update(relock=good))
        run = await bench.app.start("w")
        await soon(bench.advance(run, 0))
        assert calls == ["a"]
        assert facts.attempts(run) == []
        await bench.drain()
        assert calls == ["a", "b"]
        facts.check_rest()


async def test_a_connection_that_dies_with_the_answer_to_commit(dsn: str, facts: Facts, patient: None) -> None:
    """Nobody knows whether COMMIT went through. It did: the step is not repeated, and recovery finds the rest."""
    calls: list[str] = []
    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))) as bench:
        gate = Gate(bench.app, facts)
        run = await bench.app.start("w")
        bursting = (await bench.start_jobs())[0]
        await gate.wait()
        assert facts.terminate("durable worker %") >= 1
        gate.open()
        await soon(bursting)
        assert calls == ["a"]
        assert facts.journal(run) == ["a"]
        await bench.app.recover()
        await bench.drain()
        assert calls == ["a", "b"]
        assert facts.attempts(run) == []
        facts.check_rest()


# ---------------------------------------------------------------- commits that fail

REFUSING = """
create sequence refusals;
create function refuse_first() returns trigger language plpgsql as $$
begin
  if nextval('refusals') = 1 then raise exception 'not today'; end if;
  return null;
end $$;
create constraint trigger refuse_first after insert on durable.journal deferrable initially deferred
for each row execute function refuse_first();
"""
DEFERRED = """
create table parents (id int primary key);
create table kids (parent int references parents deferrable initially deferred, run text);
"""


@pytest.mark.parametrize("sync", [False, True])
async def test_a_deferred_constraint_fails_the_attempt_and_not_for_ever(dsn: str, facts: Facts, sync: bool) -> None:
    facts.execute(DEFERRED)
    calls: list[int] = []
    insert = f"insert into kids values ({17}, 'x')"

    async def orphan(ctx: Ctx) -> None:
        calls.append(ctx.attempt)
        await (await ctx.async_connection()).exec_driver_sql(insert)

    def sync_orphan(ctx: Ctx) -> None:
        calls.append(ctx.attempt)
        ctx.connection().exec_driver_sql(insert)

    flow = define("w").step("a", sync_orphan if sync else orphan, retry=Retry(max_attempts=2))
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert facts.run(run)["waiting_for"] == "retry"
        await bench.skip(minutes=2)
        await bench.drain()
        assert calls == [1, 2]
        assert facts.attempts(run) == [("a", "failed", 1)]
        error = (await run.status()).error
        assert error is not None
        assert "kids_parent_fkey" in error.message
        assert error.kind == "exhausted"
        assert facts.value("select count(*) from kids") == 0
        facts.check_rest()


async def test_a_commit_that_is_refused_keeps_what_the_handler_did(dsn: str, facts: Facts) -> None:
    """What it did outside of the database has happened: its outcome is written again, it is not called again."""
    facts.execute(REFUSING)
    calls: list[str] = []
    async with working(dsn, define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert calls == ["a", "b"]
        assert facts.journal(run) == ["a", "b"]
        assert facts.attempts(run) == []
        facts.check_rest()


async def test_a_refused_commit_of_a_step_with_a_connection_is_a_failed_attempt(dsn: str, facts: Facts) -> None:
    facts.execute(REFUSING)
    facts.execute("create table books (attempt int)")

    async def write(ctx: Ctx) -> None:
        await (await ctx.async_connection()).exec_driver_sql(f"insert into books values ({ctx.attempt})")

    async with working(dsn, define("w").step("a", write)) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert facts.attempts(run) == [("a", "failed", 1)]
        assert facts.rows("select * from books") == []
        await bench.skip(minutes=2)
        await bench.drain()
        assert facts.rows("select * from books") == [{"attempt": 2}]
        facts.check_rest()


# ---------------------------------------------------------------- two engines


@pytest.mark.behaviour("SD-10")
async def test_a_continuation_that_is_delivered_twice_at_once_runs_the_step_once(dsn: str, facts: Facts) -> None:
    calls: list[str] = []
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(ctx: Ctx) -> None:
        calls.append("a")
        began.set()
        await go_on.wait()

    flow = define("w").step("a", slow).step("b", count(calls, "b"))
    async with working(dsn, flow) as one, working(dsn, flow) as two:
        for bench in (one, two):
            bench.engine.options = _single_steps(bench.engine.options)
        run = await one.app.start("w")
        facts.execute("delete from durable.procrastinate_jobs")
        first = one.advance(run, 0)
        await soon(began.wait())
        second = two.advance(run, 0)
        await until(lambda: facts.blocked() == 1, "the second waits for the row")
        go_on.set()
        await soon(first)
        await soon(second)
        assert calls == ["a"]
        assert facts.journal(run) == ["a"]
        assert facts.run(run)["current_step"] == 1
        assert [job["args"]["revision"] for job in facts.jobs(run)] == [1]
        await one.drain()
        assert calls == ["a", "b"]
        facts.check_rest()


@pytest.mark.behaviour("SD-09")
async def test_a_continuation_that_is_delivered_again_later_does_nothing(dsn: str, facts: Facts) -> None:
    calls: list[str] = []
    flow = define("w").step("a", count(calls, "a")).step("b", count(calls, "b"))
    async with working(dsn, flow) as bench:
        bench.engine.options = _single_steps(bench.engine.options)
        run = await bench.app.start("w")
        facts.execute("delete from durable.procrastinate_jobs")
        await soon(bench.advance(run, 0))
        before = facts.run(run)
        await soon(bench.advance(run, 0))
        assert calls == ["a"]
        assert facts.run(run) == before
        assert before["current_step"] == 1
        assert len(facts.jobs(run)) == 1


async def test_a_result_that_comes_after_the_takeover_is_discarded(dsn: str, facts: Facts) -> None:
    began, late = threading.Event(), threading.Event()
    calls: list[int] = []

    def work(ctx: Ctx) -> str:
        calls.append(ctx.attempt)
        if len(calls) > 1:
            return "in time"
        began.set()
        assert late.wait(30)
        return "late"

    flow = define("w").step("a", work, transactional=False)
    async with working(dsn, flow) as dead, working(dsn, flow) as other:
        run = await dead.app.start("w")
        outcome = dead.advance(run, 0)
        try:
            await until(began.is_set)
            await dead.vanish()
            await other.drain()
            assert await run.result(timeout=10) == {"a": "in time"}
            before = facts.run(run)
        finally:
            late.set()
        await soon(outcome)
        assert facts.run(run) == before
        assert facts.rows("select step_id, result from durable.journal") == [{"step_id": "a", "result": "in time"}]
        assert facts.attempts(run) == [("a", "interrupted", 1)]
        facts.check_rest()


async def test_a_claim_that_is_revoked_ends_the_handler(dsn: str, facts: Facts) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work(ctx: Ctx) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with working(dsn, define("w").step("a", work, transactional=False)) as bench:
        run = await bench.app.start("w")
        outcome = bench.advance(run, 0)
        await soon(began.wait())
        facts.execute("update durable.runs set claim_token = gen_random_uuid() where id = %s", run.id)
        facts.execute("select pg_notify('durable_control', %s)", str(run.id))
        await soon(ended.wait())
        await soon(outcome)
        assert facts.journal(run) == []
        assert facts.attempts(run) == []


# ---------------------------------------------------------------- branches


async def test_two_branches_that_take_the_connection(dsn: str, facts: Facts) -> None:
    facts.execute("create table books (branch text)")
    lent, asking = asyncio.Event(), asyncio.Event()

    async def first(ctx: Ctx) -> None:
        connection = await ctx.async_connection()
        lent.set()
        await asking.wait()
        await connection.exec_driver_sql("insert into books values ('first')")

    async def second(ctx: Ctx) -> None:
        await lent.wait()
        asking.set()
        connection = await ctx.async_connection()
        await connection.exec_driver_sql("insert into books values ('second')")

    async with working(dsn, define("w").parallel("p", {"first": first, "second": second})) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert (await run.status()).status == "completed"
        assert facts.rows("select * from books") == [{"branch": "first"}, {"branch": "second"}]
        assert facts.journal(run) == ["p/first", "p/second", "p"]
        facts.check_rest()


async def test_a_sibling_is_entered_again_while_a_long_branch_runs(dsn: str, facts: Facts) -> None:
    resumed, entered = asyncio.Event(), asyncio.Event()

    async def long(ctx: Ctx) -> str:
        await resumed.wait()
        return "long"

    async def ask(ctx: Ctx) -> Any:
        if ctx.resume_data is None:
            entered.set()
            return Suspend({"q": 1})
        assert ctx.snapshot == {"q": 1}
        assert ctx.attempt == 1
        resumed.set()
        return ctx.resume_data

    async with working(dsn, define("w").parallel("p", {"long": long, "ask": ask})) as bench:
        run = await bench.app.start("w")
        await bench.start_jobs()
        await until(lambda: facts.journal(run) == ["p/ask"], "it waits for its answer")
        assert facts.run(run)["claim_token"] is not None
        assert (await run.resume("p/ask", "yes")).accepted
        assert not (await run.resume("p/ask", "no")).accepted
        await bench.drain()
        assert await run.result(timeout=10) == {"p": {"long": "long", "ask": "yes"}}
        facts.check_rest()


# ---------------------------------------------------------------- cut connections


@pytest.mark.parametrize("who", ["durable worker %", "durable%"])
async def test_detached_steps_outlive_the_connections(dsn: str, facts: Facts, who: str) -> None:
    """As after a restart of the database: the worker is not dead, its steps go on, each outcome is written once."""
    began, go_on = asyncio.Event(), asyncio.Event()
    calls: list[str] = []

    async def work(ctx: Ctx) -> str:
        calls.append(ctx.step_id)
        if len(calls) == 2:
            began.set()
        await go_on.wait()
        return "done"

    flow = define("w").parallel("p", {"x": work, "y": work}).step("b", count(calls, "b"))
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        jobs = await bench.start_jobs()
        await soon(began.wait())
        claim = facts.run(run)["claim_token"]
        worker = bench.engine.worker
        assert facts.terminate(who) >= 1
        await until(bench.session.liveness.alive.is_set)
        assert facts.run(run)["claim_token"] == claim
        go_on.set()
        await soon(jobs[0])
        await until(bench.session.liveness.alive.is_set)
        await bench.drain()
        assert bench.engine.worker == worker
        assert calls == ["p/x", "p/y", "b"]
        assert facts.attempts(run) == []
        assert await run.result(timeout=10) == {"p": {"x": "done", "y": "done"}, "b": "b"}
        facts.check_rest()


async def test_an_attached_step_outlives_its_connection(dsn: str, facts: Facts) -> None:
    """The lock was lost with the connection; what the handler did has happened, and is written in a new transaction."""
    began, go_on = asyncio.Event(), asyncio.Event()
    calls: list[int] = []

    async def work(ctx: Ctx) -> str:
        calls.append(ctx.attempt)
        began.set()
        await go_on.wait()
        return "done"

    async with working(dsn, define("w").step("a", work)) as bench:
        run = await bench.app.start("w")
        jobs = await bench.start_jobs()
        await soon(began.wait())
        facts.terminate("durable worker %")
        go_on.set()
        await soon(jobs[0])
        await bench.drain()
        assert calls == [1]
        assert facts.attempts(run) == []
        assert await run.result(timeout=10) == {"a": "done"}
        facts.check_rest()


async def test_a_lent_connection_that_dies_is_no_failed_attempt(dsn: str, facts: Facts) -> None:
    facts.execute("create table books (attempt int)")
    calls: list[int] = []

    async def work(ctx: Ctx) -> None:
        calls.append(ctx.attempt)
        connection = await ctx.async_connection()
        await connection.exec_driver_sql(f"insert into books values ({ctx.attempt})")
        if len(calls) == 1:
            facts.terminate("durable worker %")

    async with working(dsn, define("w").step("a", work, retry=1)) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert facts.attempts(run) == [("a", "interrupted", 1)]
        assert calls == [1, 1]
        assert facts.rows("select * from books") == [{"attempt": 1}]
        facts.check_rest()


def _single_steps(options: Any) -> Any:
    return replace(options, burst_steps=1)


@pytest.fixture
def stumbling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time that the inbox is read once more, the server refuses."""
    read = inbox.load_inbox

    async def stumble(store: Any, connection: Any, run_id: Any) -> Any:
        monkeypatch.setattr(hold_module, "load_inbox", read)
        await connection.execute("select 1/0")

    monkeypatch.setattr(hold_module, "load_inbox", stumble)


def refuse_the_end(bench: Bench) -> None:
    """The server refuses the look into the inbox that goes with the write of an end."""
    refused = "select 1/0, %(run)s::text, %(seqs)s::bigint[]"
    bench.app.store.sql.__dict__["unchanged"] = Statement.of(refused)


@pytest.mark.parametrize("claimed", [False, True])
async def test_an_error_before_the_last_write_gives_row_and_connection_back(
    dsn: str, facts: Facts, request: pytest.FixtureRequest, claimed: bool
) -> None:
    """The inbox is looked at once more before a run ends, by a claim's owner in a statement of its own, else with the
    write: an error there is no end of the run, and locks nobody out."""
    calls: list[str] = []
    flow = define("w").step("a", count(calls, "a"), transactional=False if claimed else None)
    async with working(dsn, flow) as bench:
        if claimed:
            request.getfixturevalue("stumbling")
        else:
            refuse_the_end(bench)
        run = await bench.app.start("w")
        await bench.drain()
        assert calls == ["a"]
        assert facts.attempts(run) == []
        assert await run.result(timeout=10) == {"a": "a"}
        facts.check_rest()


async def test_an_error_before_the_last_write_of_a_step_with_a_connection(dsn: str, facts: Facts) -> None:
    """With its transaction what the step wrote is lost: a failed attempt."""
    facts.execute("create table books (attempt int)")

    async def write(ctx: Ctx) -> int:
        await (await ctx.async_connection()).exec_driver_sql(f"insert into books values ({ctx.attempt})")
        return ctx.attempt

    async with working(dsn, define("w").step("a", write)) as bench:
        refuse_the_end(bench)
        run = await bench.app.start("w")
        await bench.drain()
        assert facts.attempts(run) == [("a", "failed", 1)]
        assert facts.rows("select * from books") == []
        del bench.app.store.sql.__dict__["unchanged"]
        await bench.skip(minutes=2)
        await bench.drain()
        assert await run.result(timeout=10) == {"a": 2}
        assert facts.rows("select * from books") == [{"attempt": 2}]
        facts.check_rest()


# ---------------------------------------------------------------- what comes while the last step runs


def asking(calls: list[str], facts: Facts, asked: str) -> Any:
    """A handler during which something is asked of its run, and committed."""

    async def last(ctx: Ctx) -> str:
        calls.append("last")
        body = '{"reason": "enough"}' if asked == "cancel" else "1"
        assert facts.value("select durable.send_message(%s, %s, 'go', %s)", ctx.run_id, asked, body) == "sent"
        return "last"

    return last


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("asked", ["cancel", "pause", "signal"])
async def test_what_is_asked_during_the_last_step_is_not_overlooked(
    dsn: str, facts: Facts, caplog: pytest.LogCaptureFixture, asked: str, lent: bool
) -> None:
    """The write of the end knows what lay in the inbox when it was decided, and is made anew if there is more."""
    calls: list[str] = []
    last = asking(calls, facts, asked)

    async def with_connection(ctx: Ctx) -> Any:
        _ = await ctx.async_connection()
        return await last(ctx)

    async with working(dsn, define("w").step("a", with_connection if lent else last)) as bench:
        run = await bench.app.start("w")
        facts.execute("delete from durable.procrastinate_jobs")
        await soon(bench.advance(run, 0))
        assert (facts.run(run)["status"] == "completed") == (asked == "signal")
        await bench.drain()
        expected = {"cancel": "canceled", "pause": "paused", "signal": "completed"}[asked]
        assert facts.run(run)["status"] == expected
        assert facts.run(run)["reason"] == ("enough" if asked == "cancel" else None)
        assert (calls, facts.journal(run), facts.attempts(run)) == (["last"], ["a"], [])
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
        if asked == "pause":
            assert await run.resume()
            await bench.drain()
        if asked != "cancel":
            assert await run.result(timeout=10) == {"a": "last"}
        assert calls == ["last"]
        facts.check_rest()


@pytest.mark.parametrize("asked", ["cancel", "pause"])
async def test_what_is_asked_during_the_last_step_of_a_function_is_not_overlooked(
    dsn: str, facts: Facts, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    calls: list[str] = []
    last = asking(calls, facts, asked)

    @workflow
    async def short(ctx: Context) -> list[str]:
        return [await ctx.step(count(calls, "first"), name="first"), await ctx.step(last, name="last")]

    async with working(dsn, short) as bench:
        run = await bench.app.start(short)
        facts.execute("delete from durable.procrastinate_jobs")
        await soon(bench.advance(run, 0))
        await bench.drain()
        assert facts.run(run)["status"] == ("canceled" if asked == "cancel" else "paused")
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
        if asked == "pause":
            assert await run.resume()
            await bench.drain()
            assert await run.result(timeout=10) == ["first", "last"]
        assert calls == ["first", "last"]
        facts.check_rest()


def holding(calls: list[str], name: str, end: Held, *, lent: bool = False) -> Any:
    """A handler that ends when `end` is told to go on, and not before: also if a cancel interrupts it."""

    async def handler(ctx: Ctx) -> str:
        if lent:
            _ = await ctx.async_connection()
        calls.append(name)
        while not end.go_on.is_set():
            with suppress(asyncio.CancelledError):
                await end(ctx)
        return name

    return handler


async def ask_and_wait_for_the_row(bench: Bench, facts: Facts, run: Any, asked: str, end: Held) -> None:
    """Take the run up; ask while its step runs; let the step end when a doorbell waits for the row."""
    (job,) = await bench.start_jobs()
    await until(lambda: end.began)
    body = '{"compensate": true}' if asked == "cancel" else "1"
    assert facts.value("select durable.send_message(%s, %s, 'go', %s)", run.id, asked, body) == "sent"
    doorbell = bench.deliver(run)
    await until(lambda: facts.blocked() == 1)
    end.go_on.set()
    await soon(asyncio.gather(job, doorbell))
    await bench.drain()


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("asked", ["cancel", "pause", "signal"])
async def test_who_waits_for_the_row_has_it_after_the_outcome_of_the_last_step(
    dsn: str, facts: Facts, asked: str, lent: bool
) -> None:
    """The end is refused under the lock. A doorbell that waits for that would else move the run on, and what the
    handler did would be done twice, or never undone. All other steps: ``test_requests_anywhere.py``."""
    calls: list[str] = []
    end = Held()
    flow = define("w").step("a", holding(calls, "a", end, lent=lent), compensate=count(calls, "undo"))
    async with working(dsn, flow) as bench:
        run = await bench.app.start("w")
        await ask_and_wait_for_the_row(bench, facts, run, asked, end)
        expected = {"cancel": "canceled", "pause": "paused", "signal": "completed"}[asked]
        assert facts.run(run)["status"] == expected
        if asked == "pause":
            assert await run.resume()
            await bench.drain()
            assert await run.result(timeout=10) == {"a": "a"}
        assert calls == (["a", "undo"] if asked == "cancel" else ["a"])
        assert facts.attempts(run) == []
        facts.check_rest()


async def test_an_error_of_the_engines_own_gives_row_and_connection_back(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(dsn, define("w").step("a", lambda ctx: 1)) as bench:
        run = await bench.app.start("w")

        def stumble() -> None:
            raise AssertionError("a bug")

        bench.points.on(Point.AFTER_LOCK, stumble)
        with pytest.raises(AssertionError, match="a bug") as kept:
            await soon(bench.advance(run, 0))
        bench.tasks.clear()
        await until(lambda: facts.free(run))
        await bench.drain()
        assert await run.result(timeout=10) == {"a": 1}
        assert kept.value.args


async def test_an_error_of_the_engines_own_in_a_branch_with_a_connection_locks_out_no_sibling(
    dsn: str, facts: Facts
) -> None:
    calls: list[str] = []
    lent = asyncio.Event()

    async def writes(ctx: Ctx) -> None:
        calls.append("writes")
        _ = await ctx.async_connection()
        lent.set()

    async def waits(ctx: Ctx) -> None:
        calls.append("waits")
        await lent.wait()

    async with working(dsn, define("w").parallel("p", {"writes": writes, "waits": waits})) as bench:
        run = await bench.app.start("w")

        def stumble() -> None:
            raise AssertionError("a bug")

        bench.points.on(Point.AFTER_HANDLER, stumble)
        with pytest.raises(AssertionError, match="a bug"):
            await soon(bench.advance(run, 0))
        bench.tasks.clear()
        assert facts.run(run)["claim_token"] is not None
        await until(lambda: facts.free(run))
        assert await recover.take_over_claim(bench.engine, run.id, [bench.engine.worker])  # as for any stray claim
        await bench.drain()
        assert (await run.status()).status == "completed"
        facts.check_rest()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_database_with_detached_steps_alive(
    server_root: Path, mode: Literal["fast", "immediate"]
) -> None:
    """All locks of all workers are gone at once: nobody is dead for that, and nothing is run twice."""
    server = EmbeddedPostgres(server_root / "own").start()  # which keeps what it has committed
    began: list[str] = []
    async_go, thread_go = asyncio.Event(), threading.Event()

    async def wait(ctx: Ctx) -> str:
        began.append("wait")
        await async_go.wait()
        return "waited"

    def block(ctx: Ctx) -> str:
        began.append("block")
        assert thread_go.wait(60)
        return "blocked"

    flows = [define("wait").step("a", wait), define("block").step("a", block)]
    dsn = server.dsn()
    async with an_app(dsn, *flows, detach_after=0, auto_migrate=True) as app, app.worker(), app.worker():
        runs = [await app.start("wait"), await app.start("block")]
        try:
            before = Facts(dsn)
            await until(lambda: before.value("select count(*) from durable.runs where claim_token is not null") == 2)
            before.close()
            await asyncio.to_thread(server.restart, mode)
            after = Facts(dsn)
            locks = "select count(*) from pg_locks where locktype = 'advisory' and objsubid = 2 and granted"
            await until(lambda: after.value(locks) == 2, "both workers have their locks again")
        finally:
            async_go.set()
            thread_go.set()
        assert [await run.result(timeout=30) for run in runs] == [{"a": "waited"}, {"a": "blocked"}]
        assert sorted(began) == ["block", "wait"]
        assert after.value("select count(*) from durable.attempts") == 0
        await until(lambda: after.jobs() == [])
        after.close()
    await asyncio.to_thread(server.stop)
