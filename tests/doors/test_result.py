"""``result()`` is woken by the end of the run, whichever way it ends and whoever ends it; and when nothing wakes it, it
looks.

What it returns and raises, and what it says when it takes long: tests/doors/test_facade_result.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from durable import AsyncDurable, NonRetryable, Retry, RunCanceled, RunFailed, StepContext, define, waiting
from durable.testing import AsyncHarness
from durable.values import Status

Ctx = StepContext[Any]
HOURS = 3600.0


def fail(ctx: Ctx) -> None:
    raise NonRetryable("no funds")


def work(ctx: Ctx) -> int:
    return 1


broken = [True]


def flaky(ctx: Ctx) -> int:
    if broken:
        broken.pop()
        raise NonRetryable("broken")
    return 1


working = define("working").step("work", work)
failing = define("failing").step("fail", fail)
undoing = define("undoing").step("work", work, compensate=work).step("fail", fail)
patient = define("patient").wait_for_signal("answer", "go")
limited = define("limited").wait_for_signal("answer", "go", timeout=60)
mending = define("mending").step("flaky", flaky, retry=Retry(max_attempts=1))
parent = define("parent").child_workflow("child", "working")
WORKFLOWS = [working, failing, undoing, patient, limited, mending, parent]


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=WORKFLOWS) as app:
        yield app


@pytest.fixture
async def harness(app: AsyncDurable) -> AsyncIterator[AsyncHarness]:
    async with AsyncHarness(app) as harness:
        yield harness


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no polling: only a notification can wake a waiter."""
    monkeypatch.setattr(waiting, "LOOK", HOURS)


def count(dsn: str, query: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


async def until(what: str, true: Callable[[], object], seconds: float = 20) -> None:
    """A fact in the database, waited for."""
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end, what
        await asyncio.sleep(0)


async def waits(dsn: str, how_many: int = 1) -> None:
    """Until so many runs are waited for: registered, listened for, and then looked at."""
    await until("nobody waits", lambda: count(dsn, "select count(*) from durable.waiters") >= how_many)


def told(run: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(run.result(timeout=HOURS))


ENDS = (
    "select count(*) from pg_stat_activity where application_name = 'durable result' and datname = current_database()"
)
CUT = ENDS.replace("count(*)", "count(pg_terminate_backend(pid))")


# ---------------------------------------------------------------- told


@pytest.mark.usefixtures("nobody_looks")
async def test_every_way_to_end_wakes_it(app: AsyncDurable, harness: AsyncHarness, dsn: str) -> None:
    done = await app.start(working)
    failed, undone = await app.start(failing), await app.start(undoing)
    canceled, late = await app.start(patient), await app.start(limited)
    family = await app.start(parent)
    results = [told(run) for run in (done, failed, undone, canceled, late, family)]
    await waits(dsn, 6)
    await harness.drain()
    assert await results[0] == {"work": 1}
    for result, words in ((results[1], "no funds"), (results[2], "no funds")):
        with pytest.raises(RunFailed, match=words):
            await result
    assert await results[5] == {"child": {"work": 1}}
    assert not results[3].done()
    await canceled.cancel(reason="enough")
    with pytest.raises(RunCanceled, match="enough"):
        await results[3]
    await harness.skip(minutes=2)
    await harness.drain()
    with pytest.raises(RunFailed, match="SignalTimeout"):
        await results[4]


@pytest.mark.usefixtures("nobody_looks")
async def test_a_run_that_has_ended_needs_no_telling(app: AsyncDurable, harness: AsyncHarness, dsn: str) -> None:
    run = await app.start(working)
    await harness.drain()
    assert await run.result(timeout=HOURS) == {"work": 1}
    assert count(dsn, ENDS) == 0  # it did not even listen


@pytest.mark.usefixtures("nobody_looks")
async def test_what_ends_between_listening_and_registering_is_seen(
    app: AsyncDurable, harness: AsyncHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost wake-up: nobody is registered when the run ends, so nobody is told. It looks after it has registered."""
    run = await app.start(working)
    register = waiting.Endings._register_and_read

    async def ends_first(*args: Any) -> Any:
        await harness.drain()
        return await register(*args)

    monkeypatch.setattr(waiting.Endings, "_register_and_read", ends_first)
    assert await run.result(timeout=HOURS) == {"work": 1}


@pytest.mark.usefixtures("nobody_looks")
async def test_the_end_of_another_run_wakes_nobody_else(app: AsyncDurable, harness: AsyncHarness, dsn: str) -> None:
    run, other = await app.start(patient), await app.start(working)
    mine, theirs = told(run), told(other)
    await waits(dsn, 2)
    await harness.drain()
    assert await theirs == {"work": 1}
    assert not mine.done()
    assert count(dsn, "select count(*) from durable.waiters") == 1
    await run.signal("go", "now")
    await harness.drain()
    assert await mine == {"answer": "now"}


@pytest.mark.usefixtures("nobody_looks")
async def test_a_retried_run_is_waited_for_anew(app: AsyncDurable, harness: AsyncHarness, dsn: str) -> None:
    run = await app.start(mending)
    first = told(run)
    await waits(dsn)
    await harness.drain()
    with pytest.raises(RunFailed, match="broken"):
        await first
    await run.retry()
    second = told(run)
    await waits(dsn)
    await harness.drain()
    assert await second == {"flaky": 1}


# ---------------------------------------------------------------- not told


async def test_a_listener_that_dies_is_replaced(
    app: AsyncDurable, harness: AsyncHarness, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end wakes all who wait, so that they look, and listen anew: then they are told again."""
    run = await app.start(working)
    result = told(run)
    await waits(dsn)
    monkeypatch.setattr(waiting, "LOOK", 0.0)  # no pause before it connects anew
    assert count(dsn, CUT) == 1
    await until("nobody listens again", lambda: count(dsn, ENDS) == 1)
    monkeypatch.setattr(waiting, "LOOK", HOURS)
    await harness.drain()
    assert await result == {"work": 1}


async def test_without_any_listener_it_looks(
    app: AsyncDurable, harness: AsyncHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a transaction pooler, or when no connection is left to listen on."""

    async def refused(self: waiting.Endings) -> Any:
        raise psycopg.OperationalError("too many connections")

    monkeypatch.setattr(waiting, "LOOK", 0.001)
    monkeypatch.setattr(waiting.Endings, "_connect", refused)
    run = await app.start(working)
    result = told(run)
    await harness.drain()
    assert await result == {"work": 1}


async def test_a_notification_that_is_lost_is_made_up_for(
    app: AsyncDurable, harness: AsyncHarness, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies between the ending commit and the telling: nobody ever tells."""
    monkeypatch.setattr(waiting, "LOOK", 0.001)
    run = await app.start(working)
    result = told(run)
    await waits(dsn)
    await harness.drain(max_steps=1)  # the commit that ends it, and no more
    assert await result == {"work": 1}
    assert (await run.status()).status is Status.COMPLETED


async def test_a_deaf_waiter_hears_what_it_looks_at(
    app: AsyncDurable, harness: AsyncHarness, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected, but no notification comes: UNLISTENed, as PgBouncer does silently."""

    async def deaf(self: waiting.Endings) -> Any:
        return await psycopg.AsyncConnection.connect(dsn, autocommit=True, application_name="durable result")

    monkeypatch.setattr(waiting, "LOOK", 0.001)
    monkeypatch.setattr(waiting.Endings, "_connect", deaf)
    run = await app.start(working)
    result = told(run)
    await waits(dsn)
    await harness.drain()
    assert await result == {"work": 1}
