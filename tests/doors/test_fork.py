"""``fork()``: a run that goes on from a step of another one, through both facades.

What is copied, and what is refused: tests/store/test_fork.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from pydantic import BaseModel
from tests.doors.facts import Door, says

from durable import (
    AsyncDurable,
    ConfigurationError,
    Context,
    Durable,
    NonRetryable,
    PayloadError,
    RunFailed,
    RunNotFound,
    StepContext,
    define,
)
from durable.handles import AsyncRun, Run
from durable.testing import Harness


class Order(BaseModel):
    id: int
    broken: bool = False


ran: list[str] = []


def does(name: str) -> Any:
    def handler(ctx: StepContext[Order]) -> str:
        ran.append(f"{name} {ctx.input.id}")
        if name == "ship" and ctx.input.broken:
            raise NonRetryable("no van")
        return name

    return handler


def look(ctx: StepContext[Order]) -> int:
    ran.append(f"look {ctx.iteration}")
    return ctx.iteration or 0


def undo(ctx: StepContext[Order]) -> None:
    ran.append("undo")


order = (
    define("order", input=Order)
    .step("charge", does("charge"))
    .loop("track", look, max_iterations=2)
    .parallel("pack", {"box": does("box"), "label": does("label")})
    .step("ship", does("ship"))
)
undoing = define("undoing", input=Order).step("charge", does("charge"), compensate=undo).step("ship", does("ship"))
WORKFLOWS = [order, undoing]


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    ran.clear()
    with Durable(dsn, workflows=WORKFLOWS) as app:
        yield app


@pytest.fixture
def harness(app: Durable) -> Iterator[Harness]:
    with Harness(app) as harness:
        yield harness


@pytest.fixture(params=[Durable, AsyncDurable])
async def door(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Door]:
    opened = request.param(dsn, workflows=WORKFLOWS)
    yield Door(opened, dsn)
    if isinstance(opened, AsyncDurable):
        await opened.close()
    else:
        await asyncio.to_thread(opened.close)


def again(harness: Harness, run: Run[Any], step: str | None = None, **options: Any) -> tuple[list[str], Any]:
    """What runs again, and the fork's result."""
    ran.clear()
    fork = run.fork(step, **options)
    assert fork != run
    harness.drain()
    return ran[:], fork.result(timeout=10)


@pytest.mark.behaviour("RV-97", "RV-98")
def test_it_goes_on_from_the_step(app: Durable, harness: Harness) -> None:
    run = app.start(order, Order(id=1))
    harness.drain()
    result = run.result(timeout=10)
    everything = ["charge 1", "look 0", "look 1", "box 1", "label 1", "ship 1"]
    assert sorted(ran) == sorted(everything)
    for step, expected in {
        "ship": everything[5:],
        "pack/label": everything[3:],
        "track[1]": everything[1:],
        "charge": everything,
        None: everything,
    }.items():
        assert (sorted(again(harness, run, step)[0]), result) == (sorted(expected), again(harness, run, step)[1])


def test_a_failed_run_goes_on_with_another_input(app: Durable, harness: Harness) -> None:
    run = app.start(order, Order(id=1, broken=True))
    harness.drain()
    with pytest.raises(RunFailed, match="no van"):
        run.result(timeout=10)
    before = run.status()
    assert again(harness, run, "ship", input=Order(id=2))[0] == ["ship 2"]
    assert again(harness, run, "ship", input={"id": 3})[0] == ["ship 3"]
    assert run.status() == before


def test_what_a_fork_tells_of_itself(app: Durable, harness: Harness) -> None:
    run = app.start(order, Order(id=1), key="k-1", tags={"tenant": "acme"}, priority=3, timeout=60)
    harness.drain()
    fork = run.fork("ship")
    status = fork.status()
    assert (status.forked_from, status.key, status.tags, status.priority) == (run.id, None, {"tenant": "acme"}, 3)
    assert (status.cursor, status.total_steps, status.deadline, status.parent_id) == (3, 4, None, None)
    assert list(status.results) == ["charge", "track", "pack"]
    (created,) = fork.history()
    assert created.data == {"forked_from": str(run.id), "from_step": "ship"}


def test_of_a_run_that_still_goes(app: Durable, harness: Harness) -> None:
    run = app.start(order, Order(id=1))
    harness.drain(max_steps=3)
    ran.clear()
    fork = run.fork("track")
    harness.drain()
    assert run.result(timeout=10) == fork.result(timeout=10)
    assert ran.count("charge 1") == 0
    assert ran.count("ship 1") == 2


def test_of_a_function_all_of_a_branch_runs_again(app: Durable, harness: Harness) -> None:
    def done(name: str) -> str:
        ran.append(name)
        return name

    def refuses() -> None:
        ran.append("refuses")
        raise NonRetryable("no")

    @app.workflow(version="1")
    async def trip(ctx: Context, n: int) -> list[str]:
        await ctx.step(done, f"book {n}", name="book")
        tried = await ctx.try_step(refuses)
        taken = await ctx.join("take", {"bus": lambda c: c.step(done, "bus"), "boat": lambda c: c.step(done, "boat")})
        return [await ctx.step(done, f"home {tried.ok}"), *sorted(taken)]

    run = app.start(trip, 1)
    harness.drain()
    assert run.result(timeout=10) == ["home False", "boat", "bus"]
    for step, expected in {
        "done": ["home False"],
        "take/bus": ["boat", "bus", "home False"],
        "refuses": ["boat", "bus", "home False", "refuses"],
    }.items():
        again_, result = again(harness, run, step)
        assert (sorted(again_), result) == (expected, ["home False", "boat", "bus"])


async def test_the_errors(door: Door) -> None:
    run = await door.start(order, Order(id=1))
    with door.unchanged():
        for unknown in (uuid.uuid4(), "no id"):
            for given in (None, {"id": 1}):
                with pytest.raises(RunNotFound):
                    await door.fork(unknown, input=given)
        with pytest.raises(ConfigurationError) as error:
            await door.fork(run.id, "ship")
        says(error.value, str(run.id), "'ship'", "has not come to any")
        with pytest.raises(PayloadError) as refused:
            await door.fork(run.id, input={"id": "many"})
        says(refused.value, "the input of workflow 'order'")


def test_an_unknown_step_is_answered_with_those_there_are(app: Durable, harness: Harness) -> None:
    run = app.start(order, Order(id=1))
    harness.drain()
    with pytest.raises(ConfigurationError) as error:
        run.fork("shipping")
    says(error.value, "'shipping'", "'charge', 'track', 'pack', 'ship'")


def test_what_was_undone_is_named(app: Durable, harness: Harness) -> None:
    run = app.start(undoing, Order(id=1, broken=True))
    harness.drain()
    assert ran == ["charge 1", "ship 1", "undo"]
    with pytest.raises(ConfigurationError) as error:
        run.fork("ship", Order(id=2))
    says(error.value, "undone", "'charge'", "fork from there, or earlier")
    assert again(harness, run, "charge", input=Order(id=2))[0] == ["charge 2", "ship 2"]


def test_the_input_of_a_workflow_that_is_not_known_here(app: Durable, dsn: str) -> None:
    run = app.start(order, Order(id=1))
    with Durable(dsn) as other:
        fork = other.fork(run.id, input={"id": 2, "more": [1]})
        assert fork.status().input == {"id": 2, "more": [1]}
        with pytest.raises(PayloadError, match="the input of workflow 'order'"):
            other.fork(run.id, input=object())


async def test_it_is_started_exactly_if_the_caller_commits(door: Door, dsn: str) -> None:
    run = await door.start(order, Order(id=1))

    async def fork(commit: bool) -> Any:
        if isinstance(door.app, AsyncDurable):
            async with await AsyncConnection.connect(dsn) as connection:
                made: Any = await run.fork(input={"id": 2}, connection=connection)
                await (connection.commit() if commit else connection.rollback())
            return made
        return await asyncio.to_thread(_fork_blocking, dsn, run, commit)

    made = await fork(commit=True)
    assert isinstance(made, AsyncRun | Run)
    assert made.uncommitted
    assert (await door.status(made.id)).input == {"id": 2, "broken": False}
    lost = await fork(commit=False)
    with pytest.raises(RunNotFound):
        await door.status(lost.id)


def _fork_blocking(dsn: str, run: Run[Any], commit: bool) -> Run[Any]:
    with psycopg.connect(dsn) as connection:
        made = run.fork(input={"id": 2}, connection=connection)
        (connection.commit if commit else connection.rollback)()
    return made
