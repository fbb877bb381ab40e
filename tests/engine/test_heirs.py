"""A job that is over passes its connection on to the one that waits for longest, whose run it has locked meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from tests.engine.kit import Bench, Facts, Held, note_flushes, soon, until, working

from durable import AsyncRun, Context, define, workflow
from durable.core.transition import Transition
from durable.engine import hold as hold_module
from durable.engine.points import Point
from durable.store.apply import apply_and_commit


@pytest.fixture
def step() -> Held:
    return Held()


async def one_slot(bench: Bench, step: Held, count: int = 2, name: str = "w") -> list[AsyncRun[Any]]:
    """So many runs are to be taken up with one slot: the first one has it, the others wait."""
    runs = [await bench.app.start(name, number) for number in range(count)]
    await bench.start_jobs()
    await until(lambda: len(step.began) == 1)
    await until(lambda: len(bench.engine.slots._waiting) == count - 1)
    return runs


async def ended(bench: Bench, runs: list[AsyncRun[Any]]) -> None:
    for number, run in enumerate(runs):
        assert await soon(run.result()) == {"a": number}
    await bench.drain()
    assert bench.engine.slots.free == 1
    assert not bench.engine.slots.pressure.is_set()


def locks(bench: Bench, flushes: list[list[str]]) -> list[list[str]]:
    """The flushes that lock a run by themselves, or behind something else."""
    sql = bench.app.store.sql
    wanted = {sql.lock.decode(), sql.lock_free.decode()}
    return [flush for flush in flushes if wanted & set(flush)]


async def test_the_next_run_is_locked_in_the_flush_that_ends_this_one(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(dsn, define("w", input=Any).step("a", step), pool_size=3, detach_after=1000) as bench:
        runs = await one_slot(bench, step, 3)
        flushes, sql = note_flushes(monkeypatch), bench.app.store.sql
        step.go_on.set()
        await ended(bench, runs)
        first, second = locks(bench, flushes)
        for flush in (first, second):
            wrote, *rest = [statement for statement in flush if statement.startswith("-- nothing lies")]
            assert rest == []
            chained = flush.index(sql.commit_and_begin.decode())
            assert flush.index(wrote) < chained < flush.index(sql.lock_free.decode())
            told = flush.index(sql.tell.decode())
            assert chained < told < flush.index(sql.lock_free.decode())
            assert flush[told + 1] == sql.commit_and_begin.decode()  # who waits is told now, not with the next run
        assert step.began == [0, 1, 2]
    facts.check_rest()


async def test_a_run_that_somebody_else_has_is_waited_for_by_its_own_job(dsn: str, facts: Facts, step: Held) -> None:
    async with working(dsn, define("w", input=Any).step("a", step), pool_size=3, detach_after=1000) as bench:
        first, second = await one_slot(bench, step)
        async with await psycopg.AsyncConnection.connect(dsn) as other:
            await other.execute("select 1 from durable.runs where id = %s for update", [second.id])
            step.go_on.set()
            assert await soon(first.result()) == {"a": 0}
            await until(facts.blocked)
            await other.rollback()
        await ended(bench, [first, second])
    facts.check_rest()


async def test_who_waits_and_is_cancelled_meanwhile(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run is locked for nobody: it is let go."""
    write, waiting = apply_and_commit, list[asyncio.Task[Any]]()

    async def cancelling(*arguments: Any, **options: Any) -> Any:
        written = await write(*arguments, **options)
        if options["following"] is not None:
            for task in waiting:
                task.cancel()
                await asyncio.wait({task})
        return written

    monkeypatch.setattr(hold_module, "apply_and_commit", cancelling)
    async with working(dsn, define("w", input=Any).step("a", step), pool_size=3, detach_after=1000) as bench:
        first = await bench.app.start("w", 0)
        await bench.start_jobs()
        await until(lambda: len(step.began) == 1)
        second = await bench.app.start("w", 1)
        waiting += await bench.start_jobs()
        await until(lambda: len(bench.engine.slots._waiting) == 1)
        step.go_on.set()
        assert await soon(first.result()) == {"a": 0}
        await until(lambda: bench.engine.slots.free == 1)
        assert facts.free(second)
        assert step.began == [0]


async def test_a_write_that_fails_leaves_the_next_one_where_it_was(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = apply_and_commit, list[Transition]()

    async def failing(db: Any, connection: Any, transition: Transition, *arguments: Any, **options: Any) -> Any:
        if options["following"] is not None and not failed:
            failed.append(transition)
            await connection.close()
            raise psycopg.OperationalError("the connection is lost")
        return await write(db, connection, transition, *arguments, **options)

    monkeypatch.setattr(hold_module, "apply_and_commit", failing)
    async with working(dsn, define("w", input=Any).step("a", step), pool_size=3, detach_after=1000) as bench:
        runs = await one_slot(bench, step)
        step.go_on.set()
        await ended(bench, runs)
        assert failed
    facts.check_rest()


async def test_a_doorbell_waits_as_any_job(dsn: str, facts: Facts, step: Held) -> None:
    waits = define("waits", input=Any).wait_for_signal("go", "go")
    async with working(dsn, define("w", input=Any).step("a", step), waits, pool_size=3, detach_after=1000) as bench:
        parked = await bench.app.start("waits", 0)
        await bench.drain()
        first = await bench.app.start("w", 0)
        await bench.start_jobs()
        await until(lambda: len(step.began) == 1)
        assert await parked.signal("go", 7)
        await bench.start_jobs()
        await until(lambda: len(bench.engine.slots._waiting) == 1)
        step.go_on.set()
        assert await soon(first.result()) == {"a": 0}
        assert await soon(parked.result()) == {"go": 7}
        await bench.drain()
    facts.check_rest()


@workflow
async def naps(ctx: Context, n: int) -> int:
    await ctx.step(abs, -n)
    await ctx.wait_for_signal("go")
    return await ctx.step(abs, -n)


async def test_a_function_goes_on_with_the_body_that_was_kept(dsn: str, facts: Facts, step: Held) -> None:
    async with working(dsn, define("w", input=Any).step("a", step), naps, pool_size=3, detach_after=1000) as bench:
        parked = await bench.app.start(naps, 3)
        await bench.drain()
        assert parked.id in bench.engine.bodies
        first = await bench.app.start("w", 0)
        await bench.start_jobs()
        await until(lambda: len(step.began) == 1)
        assert await parked.signal("go")
        await bench.start_jobs()
        await until(lambda: len(bench.engine.slots._waiting) == 1)
        step.go_on.set()
        assert await soon(first.result()) == {"a": 0}
        assert await soon(parked.result()) == 3
        await bench.drain()
    facts.check_rest()


async def test_both_happen_at_once(dsn: str, facts: Facts, step: Held) -> None:
    """When the end of the one run is committed, the other one is locked."""
    async with working(dsn, define("w", input=Any).step("a", step), pool_size=3, detach_after=1000) as bench:
        first, second = await one_slot(bench, step)
        seen: list[bool] = []
        bench.points.on(Point.AFTER_COMMIT, lambda: seen.append(facts.free(second)))
        step.go_on.set()
        await ended(bench, [first, second])
        assert seen == [False]
    facts.check_rest()
