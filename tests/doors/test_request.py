"""``request()``: a message and its reply, through both facades; who wakes it, and what it says when there is none.

Where a reply is found along a chain: tests/store/test_replies.py. Here replies are written as the engine writes them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.doors.facts import Door, says
from tests.store.kit import lock

from durable import (
    AsyncDurable,
    ConfigurationError,
    Context,
    Durable,
    PayloadError,
    RunCanceled,
    RunFailed,
    RunNotFound,
    define,
    waiting,
)
from durable.core.transition import Successor, Transition
from durable.engine.hold import take
from durable.errors import DurableError, RequestTimeout
from durable.store.apply import apply
from durable.store.flush import send
from durable.store.inbox import load_inbox
from durable.testing import AsyncHarness
from durable.values import Status

HOURS = 3600.0

patient = define("patient").wait_for_signal("answer", "go")


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[AsyncDurable]:
    async with AsyncDurable(dsn, workflows=[patient]) as app:
        yield app


@pytest.fixture(params=[Durable, AsyncDurable])
async def door(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Door]:
    opened = request.param(dsn, workflows=[patient])
    yield Door(opened, dsn)
    if isinstance(opened, AsyncDurable):
        await opened.close()
    else:
        await asyncio.to_thread(opened.close)


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no polling: only a notification can wake a waiter."""
    monkeypatch.setattr(waiting, "LOOK", HOURS)


class Answering:
    """Writes to runs what a worker would."""

    def __init__(self, app: AsyncDurable) -> None:
        self._app = app

    async def asked(self, run_id: uuid.UUID, name: str = "quote") -> list[str | None]:
        """The bodies of the requests that lie in the run's inbox, once there are some."""
        async with asyncio.timeout(20), self._app.pool.connection() as connection:
            while True:
                inbox = await load_inbox(self._app.store, connection, run_id)
                if bodies := [message.body for message in inbox if message.name == name]:
                    return bodies

    async def write(self, run_id: uuid.UUID, reply: str | None = None, **after: Any) -> Transition:
        """A transition, which replies to all that lies in the inbox."""
        async with self._app.pool.connection() as connection, connection.transaction():
            found = await lock(self._app.store, connection, run_id)
            assert found is not None
            run, now = found
            changes = {"revision": run.revision + 1, "status": Status.RUNNING, **after}
            if Status(changes["status"]).ended:
                changes["finished_at"] = now
            inbox = await load_inbox(self._app.store, connection, run_id)
            replies = {message.seq: reply for message in inbox} if reply is not None else None
            successor = Successor(changes["successor"], run.version, "null") if "successor" in changes else None
            made = Transition(run, replace(run, **changes), replies=replies, successor=successor)
            await apply(self._app.store, connection, made)
        return made

    async def tell(self, run_id: uuid.UUID) -> None:
        async with self._app.pool.connection() as connection:
            values = {"run": run_id, "channel": self._app.store.ended_channel}
            await send(connection, self._app.store.sql.tell, values)


@pytest.fixture
async def answering(dsn: str) -> AsyncIterator[Answering]:
    async with AsyncDurable(dsn) as app:
        await app.connect()
        yield Answering(app)


# ---------------------------------------------------------------- answered


async def test_a_reply_is_plain_json(door: Door, answering: Answering) -> None:
    run = await door.start(patient)
    asking = asyncio.create_task(door.request(run.id, "quote", {"item": 7}, timeout=timedelta(hours=1)))
    assert await answering.asked(run.id) == ['{"item":7}']
    await answering.write(run.id, '{"price": 1.50, "currency": null}')
    await answering.tell(run.id)
    assert await asking == {"price": 1.5, "currency": None}


@pytest.mark.parametrize("reply", ["null", "0", '""', "[]"])
async def test_any_reply_is_one(app: AsyncDurable, answering: Answering, reply: str) -> None:
    run = await app.start(patient)
    asking = asyncio.create_task(run.request("quote", timeout=HOURS))
    await answering.asked(run.id)
    await answering.write(run.id, reply)
    assert await asking in (None, 0, "", [])


async def test_the_handles_ask_too(door: Door, answering: Answering) -> None:
    run = await door.start(patient)
    with pytest.raises(RequestTimeout):
        await (
            run.request("quote", 1, 0, id="q-1")
            if isinstance(door.app, AsyncDurable)
            else asyncio.to_thread(run.request, "quote", 1, 0, id="q-1")
        )
    await answering.write(run.id, '"cheap"')
    assert await door.request(run.id, "quote", 1, 0, id="q-1") == "cheap"


async def test_the_same_id_is_one_request(app: AsyncDurable, answering: Answering) -> None:
    run = await app.start(patient)
    given = uuid.uuid4()
    both = [asyncio.create_task(run.request("quote", n, timeout=HOURS, id=given)) for n in range(2)]
    assert len(await answering.asked(run.id)) == 1
    await answering.write(run.id, "7")
    assert await asyncio.gather(*both) == [7, 7]
    await answering.write(run.id, status=Status.COMPLETED)
    assert await run.request("quote", 3, id=str(given)) == 7


async def test_a_body_completes_what_it_receives(app: AsyncDurable) -> None:
    @app.workflow(version="1")
    async def quoting(ctx: Context) -> str:
        (asked,) = await ctx.receive("quote", completable=True)
        await asked.complete({"price": asked.body["item"] * 2})
        return "done"

    run = await app.start(quoting)
    async with app.worker():
        assert await run.request("quote", {"item": 7}, timeout=60) == {"price": 14}
        assert await run.result(timeout=60) == "done"


# ---------------------------------------------------------------- told


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.usefixtures("nobody_looks")
async def test_the_engine_tells_of_a_reply_at_once(app: AsyncDurable, goes_on: bool) -> None:
    """Also in the middle of a burst, whose next transaction is open then."""
    run = await app.start(patient)
    async with AsyncHarness(app) as harness:
        engine = (await harness._open()).engine
        asking = asyncio.create_task(run.request("quote", timeout=HOURS))
        await _registered(app, run.id)
        hold = await take(engine, run.id)
        assert hold is not None
        before = hold.view.run
        after = before.changed(revision=before.revision + 1, status=Status.RUNNING)
        replying = Transition(before, after, replies={message.seq: "7" for message in hold.view.inbox})
        following = await (hold.write_and_lock(replying) if goes_on else hold.write(replying))
        assert await asking == 7
        assert (following is not None) == goes_on
        if following is not None:
            await following.drop()


@pytest.mark.usefixtures("nobody_looks")
async def test_who_waits_for_more_is_told_again(app: AsyncDurable, answering: Answering) -> None:
    """A reply to one wakes all who wait for the run; whom it does not concern registers anew."""
    run = await app.start(patient)
    ending = asyncio.create_task(run.result(timeout=HOURS))
    asking = asyncio.create_task(run.request("quote", timeout=HOURS))
    await answering.asked(run.id)
    await _registered(app, run.id)
    await answering.write(run.id, "7")
    await answering.tell(run.id)
    assert await asking == 7
    await _registered(app, run.id)
    await answering.write(run.id, status=Status.CANCELED, reason="enough")
    await answering.tell(run.id)
    with pytest.raises(RunCanceled, match="enough"):
        await ending


async def test_nobody_tells_and_it_looks(
    app: AsyncDurable, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "LOOK", 0.001)
    run = await app.start(patient)
    asking = asyncio.create_task(run.request("quote", timeout=HOURS))
    await answering.asked(run.id)
    await answering.write(run.id, "7")
    assert await asking == 7


@pytest.mark.usefixtures("nobody_looks")
async def test_a_reply_of_the_run_that_it_went_on_as(app: AsyncDurable, answering: Answering) -> None:
    run, new = await app.start(patient), uuid.uuid4()
    asking = asyncio.create_task(run.request("quote", timeout=HOURS))
    await answering.asked(run.id)
    await _registered(app, run.id)
    await answering.write(run.id, status=Status.COMPLETED, successor=new)
    await answering.tell(run.id)
    await _registered(app, new)
    await answering.write(new, "7")
    await answering.tell(new)
    assert await asking == 7


async def _registered(app: AsyncDurable, run_id: uuid.UUID) -> None:
    """Until somebody waits to be told of the run."""
    query = f"select 1 from {app.schema}.waiters where run_id = %s".encode()
    async with asyncio.timeout(20), app.pool.connection() as connection:
        while not await (await connection.execute(query, [run_id])).fetchone():
            pass


# ---------------------------------------------------------------- not answered


async def test_no_reply_in_time(door: Door) -> None:
    run = await door.start(patient)
    with pytest.raises(RequestTimeout) as error:
        await door.request(run.id, "quote", timeout=0.01)
    assert isinstance(error.value, TimeoutError)
    assert isinstance(error.value, DurableError)
    says(error.value, "quote", "0.01 s", str(run.id), "patient")
    assert (error.value.name, error.value.run_id, error.value.timeout) == ("quote", run.id, 0.01)


async def test_the_run_ends_without_a_reply(app: AsyncDurable, answering: Answering) -> None:
    completed, canceled = await app.start(patient), await app.start(patient)
    asking = [asyncio.create_task(run.request("quote", timeout=HOURS)) for run in (completed, canceled)]
    for run in (completed, canceled):
        await answering.asked(run.id)
    await answering.write(completed.id, status=Status.COMPLETED)
    await canceled.cancel(reason="enough")
    with pytest.raises(RunFailed, match="completed without a reply to the request 'quote'") as error:
        await asking[0]
    assert error.value.run_id == completed.id
    with pytest.raises(RunCanceled, match="enough"):
        await asking[1]


async def test_a_run_that_has_ended(door: Door, answering: Answering) -> None:
    completed, canceled = await door.start(patient), await door.start(patient)
    await answering.write(completed.id, status=Status.COMPLETED)
    await door.cancel(canceled.id, reason="enough")
    with door.unchanged():
        with pytest.raises(RunFailed, match="completed without a reply"):
            await door.request(completed.id, "quote")
        with pytest.raises(RunCanceled, match="enough"):
            await door.request(canceled.id, "quote")


async def test_what_makes_no_sense(door: Door) -> None:
    run = await door.start(patient)
    with door.unchanged():
        for unknown in (uuid.uuid4(), "no id"):
            with pytest.raises(RunNotFound):
                await door.request(unknown, "quote")
        with pytest.raises(PayloadError, match="quote"):
            await door.request(run.id, "quote", object())
        with pytest.raises(PayloadError, match="name"):
            await door.request(run.id, "")
        for timeout in (-1, None, "soon"):
            with pytest.raises(ConfigurationError, match="timeout"):
                await door.request(run.id, "quote", timeout=timeout)
