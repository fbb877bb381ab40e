"""What a step writes through its connection commits with the journal, or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tests.engine.kit import Bench, Ctx, Facts, soon, until, working

from durable import define
from durable.engine.points import Point

INSERT = "insert into books values ('written')"

KINDS = ["async", "sync", "orm", "async late", "sync late", "claimed", "branch"]


@contextmanager
def shelf(facts: Facts) -> Iterator[None]:
    facts.execute("create table books (page text)")
    yield


def pages(facts: Facts) -> int:
    return int(facts.value("select count(*) from books"))


class Handlers:
    """A handler of each kind that writes a page, and then does what the test says."""

    def __init__(self, then: Callable[[Ctx], Any], *, stays: bool = False) -> None:
        self.then, self.stays = then, stays
        self.calls = 0
        self.wrote, self.detached = asyncio.Event(), threading.Event()

    def of(self, kind: str) -> Any:
        if kind == "orm":
            return self.orm
        if kind.startswith("sync"):
            return self.sync_late if kind.endswith("late") else self.sync
        return self.async_late if kind.endswith("late") else self.a_sync

    async def a_sync(self, ctx: Ctx) -> Any:
        self.calls += 1
        connection = await ctx.async_connection()
        await connection.execute(text(INSERT))
        self.wrote.set()
        if self.stays:
            await asyncio.Event().wait()
        return self.then(ctx)

    def sync(self, ctx: Ctx) -> Any:
        self.calls += 1
        ctx.connection().execute(text(INSERT))
        return self.then(ctx)

    def orm(self, ctx: Ctx) -> Any:
        self.calls += 1
        with Session(bind=ctx.connection()) as session:
            session.execute(text(INSERT))
            session.commit()
        return self.then(ctx)

    async def async_late(self, ctx: Ctx) -> Any:
        await until(self.detached.is_set)
        return await self.a_sync(ctx)

    def sync_late(self, ctx: Ctx) -> Any:
        assert self.detached.wait(30)
        return self.sync(ctx)


def bench_for(dsn: str, kind: str, handlers: Handlers, **options: Any) -> Any:
    flow = define("w")
    if kind == "branch":
        flow.parallel("p", {"a": handlers.of(kind), "b": lambda ctx: None}, **options)
    else:
        flow.step("a", handlers.of(kind), transactional=False if kind == "claimed" else None, **options)
    return working(dsn, flow, detach_after=0 if kind.endswith("late") else 1_000)


async def begun(bench: Bench, facts: Facts, kind: str, handlers: Handlers) -> Any:
    """Start it; a late one takes its connection once its claim is committed."""
    run = await bench.app.start("w")
    if kind.endswith("late"):
        await bench.work_until(lambda: facts.run(run)["claim_token"])
        await until(lambda: facts.in_transaction() == 0, "it holds no connection")
        handlers.detached.set()
    return run


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_step_wrote_commits_with_its_entry(dsn: str, facts: Facts, kind: str) -> None:
    seen: list[int] = []

    def look(ctx: Ctx) -> None:
        seen.append(pages(facts))

    handlers = Handlers(look)
    with shelf(facts):
        async with bench_for(dsn, kind, handlers) as bench:
            run = await begun(bench, facts, kind, handlers)
            await bench.drain()
            assert (await run.status()).status == "completed"
            assert seen == [0], "it was visible before its journal entry"
            assert pages(facts) == 1
            facts.check_rest()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_failed_attempt_wrote_is_undone(dsn: str, facts: Facts, kind: str) -> None:
    def fail_once(ctx: Ctx) -> None:
        if ctx.attempt == 1:
            raise ValueError("no")

    handlers = Handlers(fail_once)
    with shelf(facts):
        async with bench_for(dsn, kind, handlers) as bench:
            run = await begun(bench, facts, kind, handlers)
            await bench.work_until(lambda: facts.attempts(run))
            assert pages(facts) == 0
            await bench.skip(minutes=2)
            await bench.drain()
            assert (await run.status()).status == "completed"
            assert handlers.calls == 2
            assert pages(facts) == 1
            facts.check_rest()


@pytest.mark.parametrize("kind", ["async", "async late", "claimed", "branch"])
async def test_what_a_step_wrote_that_is_out_of_time_is_undone(dsn: str, facts: Facts, kind: str) -> None:
    handlers = Handlers(lambda ctx: None, stays=True)
    with shelf(facts):
        async with bench_for(dsn, kind, handlers, timeout=0.3, retry=1) as bench:
            run = await begun(bench, facts, kind, handlers)
            await bench.drain()
            status = await run.status()
            assert status.status == "failed"
            assert status.error is not None
            assert pages(facts) == 0
            facts.check_rest()


@pytest.mark.parametrize("kind", ["async", "async late", "claimed", "branch"])
async def test_what_a_canceled_step_wrote_is_undone(dsn: str, facts: Facts, kind: str) -> None:
    handlers = Handlers(lambda ctx: None, stays=True)
    with shelf(facts):
        async with bench_for(dsn, kind, handlers) as bench:
            run = await begun(bench, facts, kind, handlers)
            await bench.pump()
            await soon(handlers.wrote.wait())
            assert await run.cancel()
            await bench.drain()
            assert (await run.status()).status == "canceled"
            assert pages(facts) == 0
            facts.check_rest()


@pytest.mark.parametrize("point", [Point.AFTER_HANDLER, Point.BEFORE_COMMIT, Point.AFTER_COMMIT])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_step_wrote_is_written_once_whatever_crashes(
    dsn: str, facts: Facts, kind: str, point: Point
) -> None:
    handlers = Handlers(lambda ctx: dead.points.on(point, dead.points.die))
    with shelf(facts):
        async with bench_for(dsn, kind, handlers) as dead:
            run = await begun(dead, facts, kind, handlers)
            await dead.work_until(lambda: dead.points.dead)
            await dead.crash()
            assert pages(facts) == (1 if point is Point.AFTER_COMMIT else 0)
        async with bench_for(dsn, kind, handlers) as other:
            await other.drain()
            await other.skip(minutes=2)
            await other.drain()
            assert (await other.app.status(run.id)).status == "completed"
            assert pages(facts) == 1
            assert handlers.calls == (1 if point is Point.AFTER_COMMIT else 2)
            facts.check_rest()


async def test_two_kinds_of_writers_and_the_cursor_agree(dsn: str, facts: Facts) -> None:
    """A step that took the connection and one that did not, in one burst: each entry has its page."""
    with shelf(facts):

        async def write(ctx: Ctx) -> None:
            await (await ctx.async_connection()).execute(text(INSERT))

        flow = define("w").step("a", write).step("b", lambda ctx: None).loop("c", write, max_iterations=3)
        async with working(dsn, flow) as bench:
            run = await bench.app.start("w")
            await bench.drain()
            assert facts.journal(run) == ["a", "b", "c[0]", "c[1]", "c[2]", "c"]
            assert pages(facts) == 4
            facts.check_rest()
