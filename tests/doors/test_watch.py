"""``watch()``: a snapshot for each change, the last one that of the end; through both facades."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import psycopg
import pytest

from durable import AsyncDurable, Durable, NonRetryable, RunNotFound, RunSnapshot, StepContext, define, waiting
from durable.testing import AsyncHarness, Harness
from durable.values import Status

HOURS = 3600.0


def work(ctx: StepContext[Any]) -> int:
    return 1


def fail(ctx: StepContext[Any]) -> None:
    raise NonRetryable("no funds")


asking = define("asking").step("first", work).wait_for_signal("answer", "go").step("last", work)
failing = define("failing").step("fail", fail)


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=[asking, failing]) as app:
        yield app


@pytest.mark.behaviour("RV-100")
async def test_a_snapshot_for_each_change_and_the_last_holds_the_finished_step(
    app: AsyncDurable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "WATCH", 0.001)
    run = await app.start(asking)
    async with AsyncHarness(app) as harness, aclosing(run.watch()) as snapshots:
        seen = [await anext(snapshots)]
        await harness.drain()
        seen.append(await anext(snapshots))
        await run.signal("go", "now")
        await harness.drain()
        seen += [snapshot async for snapshot in snapshots]
    assert [snapshot.derived for snapshot in seen[:2]] == ["pending", "waiting_for_signal"]
    assert [snapshot.results for snapshot in seen[:2]] == [{}, {"first": 1}]
    assert seen[-1].status is Status.COMPLETED
    assert seen[-1].results == {"first": 1, "answer": "now", "last": 1}
    assert [step.status for step in seen[-1].steps] == ["completed"] * 3
    revisions = [snapshot.revision for snapshot in seen]
    assert revisions == sorted(set(revisions))


async def test_each_of_slow_changes_is_seen(app: AsyncDurable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WATCH", 0.001)
    run = await app.start(asking)
    async with AsyncHarness(app) as harness, aclosing(app.watch(run)) as snapshots:
        seen = [await anext(snapshots)]
        await harness.drain()
        seen.append(await anext(snapshots))
        for change in (run.pause, run.resume, run.cancel):
            await change()
            seen.append(await anext(snapshots))
        assert [one async for one in snapshots] == []
    assert [one.status.value for one in seen] == ["pending", "suspended", "paused", "suspended", "canceled"]


async def test_the_end_is_told(app: AsyncDurable, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no polling here: only a notification can wake it."""
    monkeypatch.setattr(waiting, "WATCH", HOURS)
    run = await app.start(failing)
    async with AsyncHarness(app) as harness, aclosing(run.watch()) as snapshots:
        await anext(snapshots)
        ending = asyncio.ensure_future(anext(snapshots))
        await _registered(app)
        await harness.drain()
        assert (await ending).status is Status.FAILED


async def test_a_run_that_has_ended_is_one_snapshot(app: AsyncDurable) -> None:
    run = await app.start(failing)
    async with AsyncHarness(app) as harness:
        await harness.drain()
    assert [one.status async for one in run.watch()] == [Status.FAILED]


async def test_a_chain_is_followed(app: AsyncDurable, dsn: str) -> None:
    run = await app.start(asking)
    following = await app.start(asking)
    await following.cancel()
    with psycopg.connect(dsn) as connection:
        went_on = "status = 'completed', finished_at = now(), successor = %s"
        connection.execute(f"update durable.runs set {went_on} where id = %s".encode(), [following.id, run.id])
    seen = [(one.id, one.status) async for one in run.watch()]
    assert seen == [(run.id, Status.COMPLETED), (following.id, Status.CANCELED)]


async def test_an_unknown_run(app: AsyncDurable, dsn: str) -> None:
    for unknown in (uuid.uuid4(), "no id"):
        with pytest.raises(RunNotFound):
            await anext(app.watch(unknown))
    run = await app.start(asking)
    async with aclosing(run.watch()) as snapshots:
        await anext(snapshots)
        with psycopg.connect(dsn) as connection:
            connection.execute("delete from durable.runs where id = %s", [run.id])
        with pytest.raises(RunNotFound):
            await anext(snapshots)


async def test_closing_it_early_leaves_nobody_waiting(app: AsyncDurable) -> None:
    run = await app.start(asking)
    async with aclosing(run.watch()) as snapshots:
        await anext(snapshots)
        waiting_ = asyncio.ensure_future(anext(snapshots))
        await _registered(app)
        waiting_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting_
    endings = (await app._connecting.link()).endings
    assert not endings._waiting


async def _registered(app: AsyncDurable) -> None:
    """Until somebody waits to be told of a run."""
    async with asyncio.timeout(20), app.pool.connection() as connection:
        while not await (await connection.execute(f"select 1 from {app.schema}.waiters".encode())).fetchone():
            pass


# ---------------------------------------------------------------- blocking


def test_blocking_code_iterates(dsn: str) -> None:
    with Durable(dsn, workflows=[asking, failing]) as app, Harness(app) as harness:
        run = app.start(failing)
        seen: list[RunSnapshot] = []
        for snapshot in run.watch():
            seen.append(snapshot)
            harness.drain()
        assert [one.status for one in seen] == [Status.PENDING, Status.FAILED]
        with pytest.raises(RunNotFound):
            next(app.watch(uuid.uuid4()))


def test_blocking_code_may_stop_early(dsn: str) -> None:
    with Durable(dsn, workflows=[asking, failing]) as app:
        run = app.start(asking)
        for snapshot in run.watch():
            assert snapshot.status is Status.PENDING
            break
        left = run.watch()
        next(left)
        app.close()
        left.close()
        assert not app._portal.running
