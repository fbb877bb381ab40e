"""A run that went on as another one (continue_as_new): what is asked of it is asked of the end of its chain."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from tests.doors.facts import Door
from tests.store.kit import lock

from durable import AsyncDurable, Durable, NonRetryable, RetryRefused, StepContext, define
from durable.core.transition import Successor, Transition
from durable.store.apply import apply
from durable.testing import AsyncHarness
from durable.values import Status

broken: list[bool] = []


def work(ctx: StepContext[Any]) -> int:
    if broken:
        raise NonRetryable("broken")
    return int(ctx.input)


patient = define("patient").wait_for_signal("answer", "go")
working = define("working").step("work", work)
WORKFLOWS = [patient, working]


@pytest.fixture(params=[Durable, AsyncDurable])
async def door(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Door]:
    opened = request.param(dsn, workflows=WORKFLOWS)
    yield Door(opened, dsn)
    if isinstance(opened, AsyncDurable):
        await opened.close()
    else:
        await asyncio.to_thread(opened.close)


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=WORKFLOWS) as app:
        await app.connect()
        yield app


async def go_on(app: AsyncDurable, run_id: uuid.UUID, given: str = "2") -> uuid.UUID:
    """The run goes on as another one, as the engine writes it."""
    new = uuid.uuid4()
    async with app.pool.connection() as connection, connection.transaction():
        found = await lock(app.store, connection, run_id)
        assert found is not None
        run, now = found
        after = replace(run, revision=run.revision + 1, status=Status.COMPLETED, finished_at=now, successor=new)
        await apply(app.store, connection, Transition(run, after, successor=Successor(new, run.version, given)))
    return new


async def test_result_and_status(door: Door, app: AsyncDurable) -> None:
    first = (await door.start(working, 1)).id
    last = await go_on(app, await go_on(app, first, "2"), "3")
    async with AsyncHarness(app) as harness:
        await harness.drain()
    assert await door.result(first, 10) == {"work": 3}
    assert await door.result(last, 10) == {"work": 3}
    status = await door.status(first)
    assert (status.status, status.predecessor) == (Status.COMPLETED, None)
    second = await door.status(status.successor)
    assert (second.predecessor, second.successor) == (first, last)


async def test_who_waits_is_led_on(door: Door, app: AsyncDurable) -> None:
    first = (await door.start(working, 1)).id
    waiting = asyncio.create_task(door.result(first, 60))
    async with asyncio.timeout(20), app.pool.connection() as connection:
        while not await (await connection.execute(b"select 1 from durable.waiters")).fetchone():
            pass
    await go_on(app, first)
    async with AsyncHarness(app) as harness:
        await harness.drain()
    assert await waiting == {"work": 2}


async def test_requests(door: Door, app: AsyncDurable) -> None:
    first = (await door.start(patient)).id
    last = await go_on(app, first)
    async with AsyncHarness(app) as harness:
        await harness.drain()
        assert await door.pause(first)
        assert (await door.status(last)).status is Status.PAUSED
        assert not await door.pause(first)
        resumed = await door.resume(first)
        assert (resumed.accepted, resumed.status) == (True, Status.SUSPENDED)
        assert not (await door.resume(first)).accepted
        assert await door.cancel(first, reason="enough")
        assert (await door.status(last)).reason == "enough"
        assert not await door.cancel(first)


async def test_messages(door: Door, app: AsyncDurable) -> None:
    first = (await door.start(patient)).id
    await go_on(app, first)
    async with AsyncHarness(app) as harness:
        await harness.drain()
        resumed = await door.resume(first, "go", 7)
        assert (resumed.accepted, resumed.status) == (True, Status.SUSPENDED)
        await harness.drain()
    assert await door.result(first, 10) == {"answer": 7}
    assert not await door.signal(first, "go")


async def test_retry(door: Door, app: AsyncDurable) -> None:
    first = (await door.start(working, 1)).id
    last = await go_on(app, first)
    broken.append(True)
    async with AsyncHarness(app) as harness:
        await harness.drain()
        broken.clear()
        assert (await door.retry(first)).id == last
        await harness.drain()
    assert await door.result(first, 10) == {"work": 2}
    with pytest.raises(RetryRefused, match=str(last)):
        await door.retry(first)
