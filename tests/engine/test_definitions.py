"""Runs whose definition is not there, is a new one, or is no longer what the run has passed."""

from __future__ import annotations

import pytest
from tests.engine.kit import Facts, an_app, working

from durable import define
from durable.errors import RetryRefused


async def test_a_run_that_no_worker_knows_waits_for_one_that_does(dsn: str, facts: Facts) -> None:
    flow = define("w").step("a", lambda ctx: 1).step("b", lambda ctx: 2)
    async with an_app(dsn, flow) as app:
        run = await app.start("w")
        async with working(dsn, define("other").step("a", lambda ctx: 1)) as stranger:
            await stranger.drain()
            status = await run.status()
            assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "definition", "w@1")
            assert status.error is None
            await stranger.drain()
            assert facts.jobs() == []
        async with working(dsn, flow) as bench:
            await bench.drain()
            assert await run.result(timeout=10) == {"a": 1, "b": 2}
            facts.check_rest()


async def test_a_run_is_canceled_by_those_who_do_not_know_it(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, define("w").step("a", lambda ctx: 1)) as app, an_app(dsn) as stranger:
        run = await app.start("w")
        assert await stranger.cancel(run.id)
        assert (await stranger.status(run.id)).status == "canceled"


async def test_a_run_keeps_the_version_that_it_started_with(dsn: str, facts: Facts) -> None:
    old = define("w", version="1").step("a", lambda ctx: "old").wait_for_signal("s", "go").step("b", lambda ctx: "old")
    new = define("w", version="2").step("x", lambda ctx: "new")
    async with working(dsn, old) as bench:
        first = await bench.app.start("w")
        await bench.drain()
    async with working(dsn, old, new) as bench:
        second = await bench.app.start("w")
        assert await bench.app.signal(first.id, "go", 1)
        await bench.drain()
        assert await bench.app.result(first.id, timeout=10) == {"a": "old", "s": 1, "b": "old"}
        assert await second.result(timeout=10) == {"x": "new"}
        facts.check_rest()


async def test_a_version_that_only_the_old_worker_knows(dsn: str, facts: Facts) -> None:
    old = define("w", version="1").wait_for_signal("s", "go").step("b", lambda ctx: "old")
    new = define("w", version="2").step("x", lambda ctx: "new")
    async with working(dsn, old) as bench:
        run = await bench.app.start("w")
        await bench.drain()
    async with working(dsn, new) as bench:
        await bench.app.signal(run.id, "go", 1)
        await bench.drain()
        assert (await bench.app.status(run.id)).derived == "waiting_for_definition"
    async with working(dsn, old, new) as bench:
        await bench.drain()
        assert await bench.app.result(run.id, timeout=10) == {"s": 1, "b": "old"}
        facts.check_rest()


async def test_a_history_that_diverged_is_parked_and_looked_at_again(dsn: str, facts: Facts) -> None:
    old = define("w").step("a", lambda ctx: 1).wait_for_signal("s", "go").step("b", lambda ctx: 2)
    renamed = define("w").step("aa", lambda ctx: 1).wait_for_signal("s", "go").step("b", lambda ctx: 2)
    async with working(dsn, old) as bench:
        run = await bench.app.start("w")
        await bench.drain()
    async with working(dsn, renamed) as bench:
        app = bench.app
        await app.signal(run.id, "go", 7)
        await bench.drain()
        status = await app.status(run.id)
        assert status.derived == "waiting_for_person"
        assert status.error is not None
        assert status.error.type == "durable.errors.HistoryDiverged"
        assert "a (step)" in status.error.message
        assert "aa (step)" in status.error.message
        await app.retry(run.id)  # nothing has changed
        await bench.drain()
        assert (await app.status(run.id)).derived == "waiting_for_person"
        facts.check_rest()
    async with working(dsn, old) as bench:
        await bench.drain()
        assert (await bench.app.status(run.id)).derived == "waiting_for_person"  # a person must say so
        await bench.app.retry(run.id)
        await bench.drain()
        assert await bench.app.result(run.id, timeout=10) == {"a": 1, "s": 7, "b": 2}
        facts.check_rest()
        with pytest.raises(RetryRefused):
            await bench.app.retry(run.id)


@pytest.mark.parametrize("compensate", [False, True])
async def test_a_run_that_diverged_can_be_canceled(dsn: str, facts: Facts, compensate: bool) -> None:
    undone: list[str] = []

    def undo(ctx: object) -> None:
        undone.append("a")

    old = define("w").step("a", lambda ctx: 1, compensate=undo).wait_for_signal("s", "go")
    inserted = define("w").step("new", lambda ctx: 1).step("a", lambda ctx: 1, compensate=undo)
    async with working(dsn, old) as bench:
        run = await bench.app.start("w")
        await bench.drain()
    async with working(dsn, inserted) as bench:
        await bench.app.signal(run.id, "go")
        await bench.drain()
        assert (await bench.app.status(run.id)).derived == "waiting_for_person"
        assert await bench.app.cancel(run.id, compensate=compensate)
        await bench.drain()
        assert (await bench.app.status(run.id)).status == "canceled"
        assert undone == (["a"] if compensate else [])
        facts.check_rest()


async def test_what_lies_ahead_may_change(dsn: str, facts: Facts) -> None:
    old = define("w").step("a", lambda ctx: 1).wait_for_signal("s", "go").step("b", lambda ctx: 2)
    ahead = define("w").step("a", lambda ctx: 1).wait_for_signal("s", "go").step("c", lambda ctx: 3)
    async with working(dsn, old) as bench:
        run = await bench.app.start("w")
        await bench.drain()
    async with working(dsn, ahead) as bench:
        await bench.app.signal(run.id, "go", 7)
        await bench.drain()
        assert await bench.app.result(run.id, timeout=10) == {"a": 1, "s": 7, "c": 3}
        facts.check_rest()


async def test_a_child_that_nobody_knows_is_waited_for(dsn: str, facts: Facts) -> None:
    parent = define("parent").child_workflow("kid", "child")
    child = define("child").step("a", lambda ctx: 1)
    async with working(dsn, parent) as bench:
        run = await bench.app.start("parent")
        await bench.drain()
        assert (await run.status()).derived == "waiting_for_definition"
    async with working(dsn, parent, child) as bench:
        await bench.drain()
        assert await bench.app.result(run.id, timeout=10) == {"kid": {"a": 1}}
        facts.check_rest()
