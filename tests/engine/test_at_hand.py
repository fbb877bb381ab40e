"""Who waits for a run's result where a job takes that run further: told by that, without asking the database.

Nobody looks by the clock here (`LOOK` is an hour): a waiter that is not told waits for ever.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.engine.kit import Ctx, Facts, Held, an_app, note_flushes, soon, until
from tests.engine.test_seats import WAITING, rests

from durable import AsyncDurable, Context, NonRetryable, RunCanceled, RunFailed, RunNotFound, define, waiting, workflow
from durable.core.journal import Journal
from durable.core.state import Run
from durable.define.registry import AnyWorkflow
from durable.engine import engine as engine_module
from durable.store import read, sweep
from durable.store.read import Outcome
from durable.waiting import Endings


@pytest.fixture(autouse=True)
def an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK", 3600.0)


@pytest.fixture
def step() -> Held:
    return Held("done")


@asynccontextmanager
async def at_work(dsn: str, *workflows: AnyWorkflow, **arguments: Any) -> AsyncIterator[AsyncDurable]:
    """An app with a worker that takes up itself what is started. Nothing of a waiter stays behind."""
    async with an_app(dsn, *workflows, **arguments) as app, app.worker() as worker:
        await until(lambda: rests(worker))
        yield app
        await until(lambda: rests(worker) and not worker._queue_worker.running)  # type: ignore[union-attr]
        endings = endings_of(app)
        assert endings._at_hand == set()
        assert endings._waiting == {}


def endings_of(app: AsyncDurable) -> Endings:
    return app._connecting.here().endings


async def waits(app: AsyncDurable, run: Any, count: int = 1) -> None:
    await until(lambda: len(endings_of(app)._waiting.get(run.id, ())) == count)


def asked(app: AsyncDurable, flushes: list[list[str]]) -> list[str]:
    """What was asked of the database by or for waiters."""
    outcome = read.statements(app.schema).outcome.decode()
    register = [sweep.statements(app.schema).register_waiter, sweep.statements(app.schema).register_for_end]
    wanted = {outcome, *(statement.decode() for statement in register)}
    return [statement for flush in flushes for statement in flush if statement in wanted]


async def as_read(app: AsyncDurable, run: Any) -> Outcome:
    async with app._connecting.here().connection() as connection:
        return await read.outcome(app.store, connection, run.id)


# ---------------------------------------------------------------- handed over


@workflow
async def nothing(ctx: Context) -> None:
    await ctx.step(abs, -1)


@workflow
async def something(ctx: Context, n: int) -> dict[str, Any]:
    return {"größe": await ctx.step(abs, -n), "none": await ctx.step(odd, name="странно")}


@workflow
async def joined(ctx: Context, n: int) -> dict[str, Any]:
    return await ctx.join("j", {"b": lambda ctx: ctx.step(abs, -n), "a": lambda ctx: ctx.step(odd)})


async def odd(*_: Any) -> Any:
    return {"ключ": 'a "quoted" \\ ☃ 🎉\n\u0001\u2028\x7f', "∅": [None, True, 1e300, -0.0, 2**53]}


async def value(ctx: Ctx) -> int:
    return 1


async def null(ctx: Ctx) -> None: ...


HANDED = [
    (define("one", input=Any).step("a", value), 0),
    (define("null", input=Any).step("a", null).step("b", value), 0),
    (define("unicode ☃", input=Any).step("größe", odd).step('"quoted" \\ 🎉', odd), 0),
    (define("loops", input=int).loop("l", value, until=lambda _, iteration: iteration >= 3, keep="last"), 0),
    (define("own", input=Any, result=lambda ctx: {"größe": ctx.results["a"]}).step("a", value), 0),
    (define("own null", input=Any, result=lambda ctx: None).step("a", value), 0),
    (nothing, None),
    (something, 7),
]


@pytest.mark.parametrize(("definition", "given"), HANDED, ids=lambda item: getattr(item, "name", ""))
async def test_what_is_handed_over_is_what_is_read(
    dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch, definition: Any, given: Any
) -> None:
    async with at_work(dsn, definition) as app:
        flushes = note_flushes(monkeypatch)
        run = await app.start(definition, given)
        handed = await soon(endings_of(app).outcome(run.id, None))
        assert asked(app, flushes) == []
        assert facts.rows("select * from durable.waiters") == []
        assert handed == await as_read(app, run)
        assert handed.status == "completed"


BRANCHED = define("branched", input=Any).step("z", value).parallel("p", {"b": odd, "a": null}).step("a", value)


@pytest.mark.parametrize("definition", [BRANCHED, joined], ids=lambda item: item.name)
async def test_what_is_handed_over_after_branches(
    dsn: str, monkeypatch: pytest.MonkeyPatch, definition: AnyWorkflow
) -> None:
    """They go on in another job: who waits has asked the database by then, and may see the end there first."""
    handed: list[Outcome] = []
    ended = Endings.ended

    def noted(self: Endings, run: Run, journal: Callable[[], Journal]) -> None:
        handed.append(read.completed(run, journal().values()))
        ended(self, run, journal)

    monkeypatch.setattr(Endings, "ended", noted)
    async with at_work(dsn, definition) as app:
        run = await app.start(definition, 7)
        outcome = await soon(endings_of(app).outcome(run.id, None))
        assert [outcome] == handed == [await as_read(app, run)]


async def test_what_is_handed_over_is_not_encoded(dsn: str) -> None:
    class Turned:
        def encode(self, plain: bytes) -> bytes:
            return plain[::-1]

        def decode(self, stored: bytes) -> bytes:
            return stored[::-1]

    async with at_work(dsn, something, codec=Turned()) as app:
        run = await app.start(something, 7)
        handed = await soon(endings_of(app).outcome(run.id, None))
        assert handed == await as_read(app, run)


async def test_nobody_is_registered_meanwhile(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        flushes = note_flushes(monkeypatch)
        run = await app.start("w", 1)
        result = asyncio.create_task(run.result())
        await until(lambda: step.began)
        await waits(app, run)
        assert facts.rows("select * from durable.waiters") == []
        step.go_on.set()
        assert await soon(result) == {"a": "done"}
        assert asked(app, flushes) == []


async def test_two_waiters(dsn: str, step: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        flushes = note_flushes(monkeypatch)
        run = await app.start("w", 1)
        results = [asyncio.create_task(run.result()) for _ in range(2)]
        await waits(app, run, 2)
        step.go_on.set()
        assert await soon(asyncio.gather(*results)) == [{"a": "done"}] * 2
        assert asked(app, flushes) == []


async def test_after_a_signal(dsn: str, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    async with an_app(dsn, WAITING) as app, app.worker() as worker:
        run = await app.start("waiting")
        await until(lambda: facts.run(run)["waiting_for"] == "signal")
        await until(lambda: facts.jobs() == [] and rests(worker))
        assert await run.signal("go", 7)
        flushes = note_flushes(monkeypatch)
        assert await soon(run.result()) == {"go": 7}
        assert asked(app, flushes) == []


# ---------------------------------------------------------------- told, and read


async def test_a_run_that_fails(dsn: str) -> None:
    async def fail(ctx: Ctx) -> None:
        raise NonRetryable("for good")

    async with at_work(dsn, define("w").step("a", fail)) as app:
        run = await app.start("w")
        with pytest.raises(RunFailed, match="for good"):
            await soon(run.result())


async def test_a_run_that_is_canceled(dsn: str, step: Held) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        result = asyncio.create_task(run.result())
        await until(lambda: step.began)
        await waits(app, run)
        assert await run.cancel(reason="enough")
        with pytest.raises(RunCanceled, match="enough"):
            await soon(result)


async def test_a_run_that_goes_on_as_another_one(dsn: str) -> None:
    @workflow
    async def chained(ctx: Context, n: int) -> int:
        await ctx.step(abs, n)
        if n < 3:
            ctx.continue_as_new(n + 1)
        return n

    async with at_work(dsn, chained) as app:
        run = await app.start(chained, 0)
        assert await soon(run.result()) == 3


async def test_a_run_that_goes_on_as_one_that_takes_long(dsn: str, facts: Facts, step: Held) -> None:
    @workflow
    async def chained(ctx: Context, n: int) -> int:
        if n == 0:
            ctx.continue_as_new(1)
        await ctx.step(step.go_on.wait)
        return n

    async with at_work(dsn, chained) as app:
        run = await app.start(chained, 0)
        result = asyncio.create_task(run.result())
        (successor,) = await until(lambda: facts.rows("select id from durable.runs where predecessor is not null"))
        await until(lambda: successor["id"] in endings_of(app)._waiting)
        assert run.id not in endings_of(app)._waiting
        step.go_on.set()
        assert await soon(result) == 1


async def test_a_run_that_parks_and_is_ended_by_another_worker(dsn: str, facts: Facts) -> None:
    async with an_app(dsn, WAITING) as app:
        async with app.worker() as worker:
            await until(lambda: rests(worker))
            run = await app.start("waiting")
            result = asyncio.create_task(run.result())
            await until(lambda: facts.rows("select * from durable.waiters"))
            assert endings_of(app)._at_hand == set()
        async with at_work(dsn, WAITING) as elsewhere:
            assert await elsewhere.signal(run.id, "go", 7)
            assert await soon(result) == {"go": 7}
        assert endings_of(app)._waiting == {}


async def test_a_doorbell_that_finds_it_busy(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is over while another one has the run in hand: who waits asks the database meanwhile."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_MS", 50)
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        result = asyncio.create_task(run.result())
        await waits(app, run)
        await until(lambda: step.began)
        assert await run.signal("go", 7)
        await until(lambda: facts.rows("select * from durable.waiters"))
        step.go_on.set()
        assert await soon(result) == {"a": "done"}
        await until(lambda: facts.jobs() == [])


async def test_an_end_before_it_was_waited_for(dsn: str, step: Held) -> None:
    """And its job is not over yet."""
    step.go_on.set()
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        assert await soon(run.result()) == {"a": "done"}
        endings_of(app).hold(run.id)
        result = asyncio.create_task(run.result())
        await waits(app, run)
        endings_of(app).let_go(run.id)
        assert await soon(result) == {"a": "done"}


# ---------------------------------------------------------------- not told


async def test_an_end_that_comes_from_elsewhere(
    dsn: str, facts: Facts, step: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in hand here may be ended there: who relies on this process does so once, for a moment."""
    monkeypatch.setattr(waiting, "LOOK", 0.01)
    definition = define("w", input=Any).step("a", step)
    async with an_app(dsn, definition) as app:
        run = await app.start("w", 1)
        endings_of(app).hold(run.id)
        result = asyncio.create_task(run.result())
        await until(lambda: facts.rows("select * from durable.waiters"))
        step.go_on.set()
        async with at_work(dsn, definition):
            assert await soon(result) == {"a": "done"}
        assert endings_of(app)._waiting == {}


async def test_a_waiter_with_a_timeout(dsn: str, step: Held) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        assert run.id in endings_of(app)._at_hand
        with pytest.raises(TimeoutError, match=r"it is (pending|running)"):
            await soon(run.result(timeout=0.05))
        assert endings_of(app)._waiting == {}
        assert run.id in endings_of(app)._at_hand
        step.go_on.set()
        assert await soon(run.result()) == {"a": "done"}


async def test_a_waiter_that_does_not_wait(dsn: str, step: Held) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        with pytest.raises(TimeoutError, match="has not ended within 0 s"):
            await soon(run.result(timeout=0))
        step.go_on.set()
        assert await soon(run.result()) == {"a": "done"}


async def test_a_waiter_that_is_cancelled(dsn: str, step: Held) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        run = await app.start("w", 1)
        result = asyncio.create_task(run.result())
        await waits(app, run)
        result.cancel()
        with pytest.raises(asyncio.CancelledError):
            await result
        assert endings_of(app)._waiting == {}
        step.go_on.set()


async def test_no_such_run(dsn: str, step: Held) -> None:
    async with at_work(dsn, define("w", input=Any).step("a", step)) as app:
        with pytest.raises(RunNotFound):
            await soon(app.result(uuid.uuid4()))
