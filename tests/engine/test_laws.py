"""What the engine rests on, one test each: without any of these it loses or doubles something.

`python -m tests.mutants` breaks each of them on purpose, and expects these tests to see it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from tests.engine.kit import Bench, Ctx, Facts, soon, until, working

from durable import define
from durable.core.plan import go_on
from durable.engine import engine as engine_module
from durable.engine import recover
from durable.engine.hold import take
from durable.engine.points import Point
from durable.store import apply as store_apply
from durable.store.errors import StaleRevision
from durable.store.runs import abandon, begin_and_lock


async def nothing(ctx: Ctx) -> str:
    return ctx.step_id


async def fail(ctx: Ctx) -> None:
    raise RuntimeError("for good")


two = define("two").step("a", nothing).step("b", nothing)
waits = define("waits").wait_for_signal("answer", "go")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held row is given up at once."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 50)


def single_steps(bench: Bench) -> None:
    """A job takes one step, and enqueues the next."""
    bench.engine.options = replace(bench.engine.options, burst_steps=1)


def at_every_commit(bench: Bench, look: Any) -> None:
    """Call `look` whenever something has been committed."""

    def looking() -> None:
        bench.points.on(Point.AFTER_COMMIT, looking)
        look()

    bench.points.on(Point.AFTER_COMMIT, looking)


# ---------------------------------------------------------------- one writer per run


async def test_nobody_else_takes_a_run_while_its_step_executes(dsn: str, facts: Facts) -> None:
    refused: list[str] = []

    async def step(ctx: Ctx) -> None:
        for locked in ("for update nowait", "for no key update nowait", "for key share nowait"):
            with pytest.raises(psycopg.errors.LockNotAvailable), psycopg.connect(dsn) as other:
                other.execute(f"select 1 from durable.runs where id = %s {locked}".encode(), [ctx.run_id])
            refused.append(locked)

    async with working(dsn, define("w").step("a", step).step("b", step)) as bench:
        run = await bench.app.start("w")
        await bench.drain()
        assert (await run.status()).error is None
    assert len(refused) == 6  # in the burst's second step, too
    facts.check_rest()


async def test_a_job_for_another_revision_does_nothing(dsn: str, facts: Facts) -> None:
    async with working(dsn, two) as bench:
        single_steps(bench)
        run = await bench.app.start(two)
        facts.execute("delete from durable.procrastinate_jobs")
        await soon(bench.advance(run, 1))  # too early
        assert facts.journal(run) == []
        await soon(bench.advance(run, 0))
        before = facts.run(run)
        assert (facts.journal(run), before["revision"]) == (["a"], 1)
        await soon(bench.advance(run, 0))  # again
        assert facts.run(run) == before
        assert facts.journal(run) == ["a"]


async def test_a_transition_from_another_revision_is_not_written(dsn: str, facts: Facts) -> None:
    async with working(dsn, waits) as bench:
        run = await bench.app.start(waits)
        engine = bench.engine
        hold = await take(engine, run.id)
        assert hold is not None
        transition = go_on(hold.view, hold.now)
        await hold.write(transition)
        before = facts.run(run)
        async with engine.pool.connection() as connection:
            assert await begin_and_lock(engine.store, connection, run.id) is not None
            with pytest.raises(StaleRevision):
                await store_apply.apply(engine.store, connection, transition)
            await abandon(connection)
        assert facts.run(run) == before


async def test_a_result_under_an_old_token_is_discarded_while_the_new_owner_executes(dsn: str, facts: Facts) -> None:
    """Both are at the same step of the same run; only the token tells them apart."""
    began = [threading.Event(), threading.Event()]
    ends = [threading.Event(), threading.Event()]
    calls: list[int] = []

    def work(ctx: Ctx) -> str:
        mine = len(calls)
        calls.append(mine)
        began[mine].set()
        assert ends[mine].wait(30)
        return ("late", "in time")[mine]

    flow = define("w").step("a", work, transactional=False)
    async with working(dsn, flow) as dead, working(dsn, flow) as other:
        run = await dead.app.start("w")
        try:
            late = dead.advance(run, 0)
            await until(began[0].is_set)
            await dead.vanish()
            await other.work_until(began[1].is_set)
            before = facts.run(run)
            ends[0].set()
            await soon(late)
            assert facts.run(run) == before
            assert facts.journal(run) == []
        finally:
            for end in ends:
                end.set()
        await other.drain()
        assert await run.result(timeout=10) == {"a": "in time"}
    facts.check_rest()


# ---------------------------------------------------------------- all of it, or nothing


async def test_the_cursor_moves_with_the_entry(dsn: str, facts: Facts) -> None:
    seen: list[tuple[int, list[str]]] = []
    async with working(dsn, two) as bench:
        run = await bench.app.start(two)
        at_every_commit(bench, lambda: seen.append((facts.run(run)["current_step"], facts.journal(run))))
        await bench.drain()
    assert seen == [(1, ["a"]), (2, ["a", "b"])]
    facts.check_rest()


REFUSE_ONE = """
create sequence public.once;
create function public.refuse_once() returns trigger language plpgsql as $$
begin
  if new.task_name = 'durable.advance' and new.args ->> 'revision' <> '0' and nextval('public.once') = 1 then
    raise exception 'no job this time';
  end if;
  return new;
end
$$;
create trigger refuse_once before insert on durable.procrastinate_jobs
for each row execute function public.refuse_once();
"""


async def test_the_next_job_commits_with_the_step_or_neither_does(dsn: str, facts: Facts) -> None:
    """The queue refuses the job once: had the step been committed before, no job would ever come for the next."""
    facts.execute(REFUSE_ONE)
    async with working(dsn, two) as bench:
        single_steps(bench)
        run = await bench.app.start(two)
        facts.execute("delete from durable.procrastinate_jobs")
        await soon(bench.advance(run, 0))
        assert facts.journal(run) == ["a"]
        assert [job["args"]["revision"] for job in facts.jobs(run)] == [facts.run(run)["revision"]]
        assert facts.value("select last_value from public.once") == 2  # refused, and done again
        await bench.drain()
        assert await run.result(timeout=10) == {"a": "a", "b": "b"}
    facts.check_rest()


async def test_the_journal_takes_one_entry_a_step(dsn: str, facts: Facts) -> None:
    async with working(dsn, two) as bench:
        run = await bench.app.start(two)
        await bench.drain()
    columns = "run_id, step_id, kind, status, result, attempt, finished_at"
    again = f"insert into durable.journal (seq, {columns}) select seq + 1, {columns} from durable.journal"
    with pytest.raises(psycopg.errors.UniqueViolation):
        facts.execute(f"{again} where step_id = 'a'")
    assert facts.journal(run) == ["a", "b"]


async def test_the_rollbacks_cursor_stands_on_what_was_undone_last(dsn: str, facts: Facts) -> None:
    flow = define("w")
    for name in ("a", "b", "c"):
        flow.step(name, nothing, compensate=nothing)
    flow.step("fails", fail, retry=1)
    seen: list[str | None] = []
    async with working(dsn, flow) as bench:
        single_steps(bench)
        run = await bench.app.start("w")

        def look() -> None:
            if (now := facts.run(run))["status"] == "compensating":
                seen.append(facts.value("select step_id from durable.journal where seq = %s", now["undo_cursor"]))

        at_every_commit(bench, look)
        await bench.drain()
    assert seen == [None, "c", "b", "a"]
    assert facts.run(run)["status"] == "failed"
    facts.check_rest()


# ---------------------------------------------------------------- no wake-up is lost


async def test_each_message_rings_although_another_ring_waits(dsn: str, facts: Facts) -> None:
    """That one may be answered before this message is committed."""
    async with working(dsn, waits) as bench:
        run = await bench.app.start(waits)
        await bench.drain()
        await run.signal("other")
        with psycopg.connect(dsn) as connection:
            connection.execute("select durable.send_message(%s, 'signal', 'go', '1')", [run.id])
            await bench.drain()  # the first ring: it finds the first message alone
            assert facts.jobs(run) == []
            connection.commit()
        assert facts.tasks(run) == ["durable.ring"]
        await bench.drain()
        assert await run.result(timeout=10) == {"answer": 1}
    facts.check_rest()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("job", ["durable.ring", "durable.advance", "durable.compensate"])
async def test_a_job_that_finds_the_row_busy_comes_again(dsn: str, facts: Facts, job: str) -> None:
    async with working(dsn, waits) as bench:
        run = await bench.app.start(waits)
        facts.execute("delete from durable.procrastinate_jobs")
        with psycopg.connect(dsn) as holder:
            holder.execute("select 1 from durable.runs where id = %s for update", [run.id])
            match job:
                case "durable.ring":
                    await soon(bench.deliver(run))
                case "durable.advance":
                    await soon(bench.advance(run, 0))
                case _:
                    await soon(bench.compensate(run, 0))
        assert facts.tasks(run) == [job]


@pytest.mark.parametrize("what", ["due", "unread", "orphan", "definition"])
async def test_a_sweep_passes_by_what_somebody_holds(
    dsn: str, facts: Facts, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither waits for a held row nor fails at it, and puts back the free one beside it."""
    monkeypatch.setattr(recover, "LOOK_AGAIN", 0.0)
    limited = define("limited").wait_for_signal("answer", "go", timeout=60)
    async with working(dsn, two, limited) as bench:
        held, free = [await bench.app.start(two if what == "orphan" else limited) for _ in range(2)]
        if what != "orphan":
            await bench.drain()
        if what == "unread":
            await held.signal("other")
            await free.signal("other")
        if what == "definition":
            facts.execute("update durable.runs set waiting_for = 'definition', waiting_name = 'limited@1'")
        else:
            await bench.skip(minutes=2)
        facts.execute("delete from durable.procrastinate_jobs")
        with psycopg.connect(dsn) as holder:
            holder.execute("select 1 from durable.runs where id = %s for update", [held.id])
            match what:
                case "due":
                    await soon(recover.put_back_due(bench.engine))
                case "unread":
                    await soon(recover.ring_unread(bench.engine))
                case "orphan":
                    await soon(recover.adopt_orphans(bench.engine, None))
                case _:
                    await soon(recover.put_back_known(bench.engine, [("limited", "1")]))
        assert facts.jobs(held) == []
        assert len(facts.jobs(free)) == 1
