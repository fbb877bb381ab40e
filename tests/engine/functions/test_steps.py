"""``ctx.step``: names, arguments, types, retries, timeouts, suspending, transactions, ephemeral entries."""

from __future__ import annotations

import asyncio
import functools
import threading
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from tests.engine.functions.kit import ONCE, Log, Place, crashing, failed_with, failure, fault, told
from tests.engine.kit import Facts, until

from durable import (
    Context,
    NonRetryable,
    Retry,
    StepContext,
    StepFailed,
    StepInterrupted,
    StepTimeout,
    Suspend,
    step,
    workflow,
)
from durable.engine.points import Point

SOON = Retry(max_attempts=3, initial=5, jitter=False)


class Kind(StrEnum):
    SMALL = "small"


class Order(BaseModel):
    id: int
    due: datetime


@dataclass(frozen=True)
class Parcel:
    kind: Kind
    weight: Decimal
    to: uuid.UUID


# ---------------------------------------------------------------- results


@pytest.mark.behaviour("RV-01", "RV-23")
async def test_one_step(place: Place, log: Log) -> None:
    @workflow
    async def one(ctx: Context) -> str:
        return str(await ctx.step(log.do, "hello"))

    async with place.working(one) as b:
        run = await b.app.start(one)
        await b.drain()
        assert await run.result() == "hello"
        assert (await run.status()).status == "completed"
        assert await told(run) == ["created", "started", "attempt_started do", "attempt_succeeded do", "completed"]


@pytest.mark.behaviour("RV-02")
async def test_a_finished_step_is_not_called_again(dsn: str, log: Log) -> None:
    @workflow
    async def two(ctx: Context) -> int:
        await ctx.step(log.do, "one")
        await ctx.sleep(60)
        await ctx.step(log.do, "two")
        return len(log)

    for_restarts = Place(dsn, replays=False)
    async with for_restarts.app(two) as app:
        async with for_restarts.bench(app) as first:
            run = await app.start(two, key="k")
            await first.drain()
            await first.skip(seconds=61)
        async with for_restarts.bench(app) as second:
            await second.drain()
            assert await run.result() == 2
        async with for_restarts.bench(app) as third:
            assert (await app.start(two, key="k")).id == run.id  # it has ended: nothing is run again
            await third.drain()
    assert log == ["one", "two"]


@pytest.mark.behaviour("RV-04")
async def test_three_steps(place: Place, log: Log) -> None:
    @workflow
    async def three(ctx: Context) -> int:
        total = 0
        for value in (1, 2, 3):
            total += await ctx.step(log.do, "add", value)
        return total

    async with place.working(three) as b:
        run = await b.app.start(three)
        await b.drain()
        assert await run.result() == 6
        assert [s.step_id for s in (await run.status()).steps] == ["do", "do#2", "do#3"]


def make(ctx: StepContext[Order], order: Order, *, heavy: bool = False) -> Parcel:
    assert isinstance(order, Order)
    assert isinstance(ctx.input, Order)
    return Parcel(Kind.SMALL, Decimal("2.50") * order.id, uuid.UUID(int=order.id))


async def weigh(parcel: Parcel) -> Decimal:
    return parcel.weight


async def send(parcel: Parcel, weight: Decimal | None) -> list[Parcel]:
    return [parcel]


@workflow
async def typed(ctx: Context, order: Order) -> tuple[Parcel, Decimal, datetime]:
    assert type(order) is Order
    parcel = await ctx.step(make, order)
    assert parcel == Parcel(Kind.SMALL, Decimal("7.50"), uuid.UUID(int=3)), parcel
    assert type(parcel.kind) is Kind
    assert type(parcel.weight) is Decimal
    weight = await ctx.step(weigh, parcel)
    assert type(weight) is Decimal
    sent = await ctx.step(send, parcel, weight)
    assert sent == [parcel]
    return parcel, weight, order.due


async def test_the_same_types_live_and_on_replay(place: Place) -> None:
    due = datetime(2026, 1, 2, tzinfo=UTC)
    async with place.working(typed) as b:
        run = await b.app.start(typed, Order(id=3, due=due))
        await b.drain()
        assert await run.result() == (Parcel(Kind.SMALL, Decimal("7.50"), uuid.UUID(int=3)), Decimal("7.50"), due)


async def test_the_same_types_with_a_crash_after_each_step(dsn: str) -> None:
    due = datetime(2026, 1, 2, tzinfo=UTC)
    run = await crashing(dsn, typed, Order(id=3, due=due))
    assert (await run.status()).status == "completed"


class Machine:
    def __call__(self, value: int) -> int:
        return value + 1


def add(a: int, b: int, *, c: int = 0) -> int:
    return a + b + c


async def test_what_a_step_may_be(place: Place, log: Log) -> None:
    """Sync and async functions, methods, partials, callables, classes; a lambda with a name."""
    threads: list[bool] = []

    def where() -> None:
        threads.append(threading.current_thread() is threading.main_thread())

    @workflow
    async def all_kinds(ctx: Context) -> list[Any]:
        await ctx.step(where)
        return [
            await ctx.step(add, 1, 2),
            await ctx.step(functools.partial(add, c=10), 1, 2),
            await ctx.step(Machine(), 1),
            await ctx.step(log.do, "method"),
            await ctx.step(lambda: 5, name="five"),
            await ctx.step(abs, -7),
        ]

    async with place.working(all_kinds) as b:
        run = await b.app.start(all_kinds)
        await b.drain()
        assert await run.result() == [3, 13, 2, "method", 5, 7]
        names = [s.step_id for s in (await run.status()).steps]
        assert names == ["where", "add", "add#2", "Machine", "do", "five", "abs"]
        assert threads == [False]


def annotated_elsewhere(context: StepContext[Any], value: int) -> int:
    return context.attempt + value


def not_a_context(ctx: int, value: int) -> int:
    return ctx + value


async def test_a_context_is_given_by_annotation(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> list[int]:
        return [await ctx.step(annotated_elsewhere, 1), await ctx.step(not_a_context, 10, 1)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result() == [2, 11]


# ---------------------------------------------------------------- names


async def test_an_explicit_name_twice(live: Place, log: Log) -> None:
    @workflow
    async def twice(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.step(log.do, 2, name="a")

    async with live.working(twice) as b:
        run = await b.app.start(twice)
        await b.drain()
        assert "'a'" in await fault(run)
        assert (await failure(run)).type == "durable.errors.DuplicateStepName"
        assert log == [1]


async def test_a_fault_can_not_be_swallowed(live: Place, log: Log) -> None:
    @workflow
    async def swallows(ctx: Context) -> str:
        await ctx.step(log.do, 1, name="a")
        try:
            await ctx.step(log.do, 2, name="a")
        except BaseException:
            return "all is well"
        return "?"

    async with live.working(swallows) as b:
        run = await b.app.start(swallows)
        await b.drain()
        assert "'a'" in await fault(run)


@pytest.mark.parametrize("order", [("default", "given"), ("given", "default")])
async def test_an_explicit_name_like_a_default_one(live: Place, log: Log, order: tuple[str, str]) -> None:
    """The default one gives way if it comes later; an explicit one that is taken is an error."""

    @workflow
    async def both(ctx: Context) -> None:
        for which in order:
            if which == "given":
                await ctx.step(log.do, "given", name="do")
            else:
                await ctx.step(log.do, "default")

    async with live.working(both) as b:
        run = await b.app.start(both)
        await b.drain()
        if order[0] == "default":
            assert "'do'" in await fault(run)
        else:
            assert [s.step_id for s in (await run.status()).steps] == ["do", "do#2"]


@pytest.mark.parametrize("name", ["a/b", "a#2", "a[1]", "a:b", "", "x" * 201])
async def test_names_that_keys_are_made_of(live: Place, log: Log, name: str) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1, name=name)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        await fault(run)
        assert log == []


async def test_a_lambda_needs_a_name(live: Place) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(lambda: 1)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "name=" in await fault(run)


async def test_arguments_that_the_function_does_not_take(place: Place) -> None:
    """A mistake in the body like any other: raised where it is made."""

    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.step(add, 1, 2, 3, 4)
        except TypeError as error:
            return str(error)
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "too many positional arguments" in await run.result(timeout=5)


@pytest.mark.behaviour("RV-17")
async def test_a_step_that_was_not_awaited(live: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        ctx.step(log.do, 1, name="first")  # type: ignore[unused-awaitable]
        await ctx.step(log.do, 2, name="second")

    @workflow
    async def at_the_end(ctx: Context) -> str:
        ctx.step(log.do, 1, name="first")  # type: ignore[unused-awaitable]
        return "done"

    async with live.working(w, at_the_end) as b:
        for what in (w, at_the_end):
            run = await b.app.start(what)
            await b.drain()
            message = await fault(run)
            assert "'first'" in message
            assert "await" in message
    assert log == []


async def test_an_operation_is_no_truth(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        operation = ctx.step(log.do, 1)
        try:
            if operation:
                return "?"
        except TypeError as error:
            await operation
            return str(error)
        return "?"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "await it" in await run.result(timeout=5)


async def test_an_operation_awaited_twice(live: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        operation = ctx.step(log.do, 1)
        await operation
        await operation

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert "second time" in await fault(run)
        assert log == [1]


# ---------------------------------------------------------------- failures


@pytest.mark.behaviour("RV-05")
async def test_a_flaky_step(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        return int(await ctx.step(log.flaky("x", 2, 7), retry=SOON))

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=11)
        assert await run.result() == 7
        assert log == ["x"] * 3
        assert (await run.status()).steps[0].attempt == 3


@pytest.mark.behaviour("RV-07", "RV-13")
async def test_backoff_is_honoured(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.fail, "x", retry=SOON)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        status = await run.status()
        assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "retry", "fail")
        (waiting,) = status.steps
        assert status.wake_at is not None
        assert waiting.next_attempt_at == status.wake_at
        assert waiting.attempt == 2
        await b.drain()  # nothing is due
        assert log == ["x"]
        await b.skip(seconds=6)
        await b.drain()
        assert log == ["x"] * 2
        await b.skip(seconds=9)  # 5 * 2: not due yet
        await b.drain()
        assert log == ["x"] * 2
        await b.skip(seconds=2)
        await b.drain()
        assert log == ["x"] * 3
        error = await failed_with(run)
        assert "exhausted" in str((await failure(run)).kind)
        assert "no x" in str(error)
        assert facts.attempts(run) == [("fail", "failed", 1), ("fail", "failed", 2)]
        failed = [event for event in await run.history() if event.kind == "attempt_failed"]
        assert [event.next_attempt_at is not None for event in failed] == [True, True, False]


@pytest.mark.behaviour("RV-08")
async def test_a_critical_error(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.refuse, "x", retry=5)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        assert (error.type, error.message, error.kind) == ("durable.errors.NonRetryable", "never x", "critical")
        assert log == ["x"]


class CardDeclined(Exception):
    pass


async def decline() -> None:
    raise CardDeclined("no money")


async def test_a_body_sees_the_same_failure_live_and_on_replay(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.step(decline, retry=2)
        except CardDeclined:
            return ["the original"]
        except StepFailed as error:
            await ctx.sleep(60)
            await ctx.step(log.do, "after")
            causes = error.caused_by(CardDeclined), error.caused_by(ValueError)
            return [type(error).__name__, error.step, error.kind, error.attempts, error.error["message"], *causes]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=61)
        assert await run.result() == ["StepFailed", "decline", "exhausted", 2, "no money", True, False]


@pytest.mark.behaviour("RV-11", "RV-10")
async def test_the_hook_hears_of_an_error_once(place: Place, log: Log) -> None:
    @workflow
    async def steps(ctx: Context) -> None:
        await ctx.step(log.fail, retry=1)

    @workflow
    async def body(ctx: Context) -> None:
        await ctx.step(log.do, 1)
        raise KeyError("of the body")

    async with place.working(steps, body) as b:
        heard: list[Any] = []

        async def hear(report: Any) -> None:
            heard.append((report.workflow, report.step, report.attempt, report.error.type, report.will_retry))

        b.app.on_error(hear)
        for what in (steps, body):
            run = await b.app.start(what, key=what.name)
            await b.drain()
            await b.engine.deliverer.deliver_due()
            assert (await b.app.start(what, key=what.name)).id == run.id
            await b.drain()
            await b.engine.deliverer.deliver_due()
        await until(lambda: len(heard) >= 2)
        assert heard == [("steps", "fail", 1, "ValueError", False), ("body", None, None, "KeyError", False)]


@pytest.mark.behaviour("RV-14")
async def test_retry_gives_fresh_attempts(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        await ctx.step(log.do, "before")
        return str(await ctx.step(log.flaky("x", 5), retry=SOON))

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=11)
        assert (await failure(run)).attempts == 3
        await b.app.retry(run)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=11)
        assert await run.result(timeout=5) == "x"
        assert log == ["before"] + ["x"] * 6


@pytest.mark.behaviour("RV-14")
async def test_retry_ends_exhausted_again(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.fail, "x", retry=Retry(max_attempts=2, initial=0))

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).kind == "exhausted"
        await b.app.retry(run)
        await b.drain()
        assert (await failure(run)).kind == "exhausted"
        assert log == ["x"] * 4


async def hang() -> None:
    await asyncio.Event().wait()


async def test_a_timeout_is_final(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.step(hang, timeout=0.01, retry=5)
        except StepTimeout as error:
            return [error.kind, error.attempts, isinstance(error, TimeoutError)]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == ["timeout", 1, True]


@pytest.mark.behaviour("RV-16")
async def test_a_timeout_that_may_be_retried(place: Place, log: Log) -> None:
    calls: list[int] = []

    async def hang(ctx: StepContext[Any]) -> None:
        calls.append(ctx.attempt)
        await asyncio.Event().wait()

    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.step(hang, timeout=0.01, retry=Retry(max_attempts=3, initial=0, retry_on_timeout=True))
        except StepFailed as error:
            return [error.kind, error.attempts]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == ["exhausted", 3]
        assert calls == [1, 2, 3]


@pytest.mark.behaviour("RV-20")
async def test_a_failed_attempt_has_an_error_and_no_output(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.flaky("x", 1, 5), retry=Retry(initial=0))
        await ctx.step(log.fail, **ONCE)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        attempts = facts.rows("select * from durable.attempts where run_id = %s", run.id)
        assert [row["error"]["message"] for row in attempts] == ["not yet: 1"]
        entries = {row["step_id"]: row for row in facts.rows("select * from durable.journal where run_id = %s", run.id)}
        assert entries["fail"]["status"] == "failed"
        assert entries["fail"]["error"]["message"] == "no fail"
        assert entries["fail"]["result"] is None
        events = [(e.kind, e.payload) for e in await run.history() if e.step == "flaky"]
        assert ("attempt_failed", None) in events
        assert ("attempt_succeeded", 5) in events


async def test_a_result_that_can_not_be_stored(place: Place, log: Log) -> None:
    async def tuples() -> Any:
        log.append("x")
        return (1, 2)

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(tuples, retry=5)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await failure(run)).type == "durable.errors.PayloadError"
        assert log == ["x"]


@pytest.mark.behaviour("RV-103", "RV-101")
async def test_names_and_outcomes_are_journaled(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> str:
        await ctx.step(log.do, 1, name="first")
        return "output"

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        query = "select step_id, kind, status, attempt, result from durable.journal where run_id = %s order by seq"
        rows = [tuple(row.values()) for row in facts.rows(query, run.id)]
        assert rows == [("first", "step", "completed", 1, 1), ("run:result", "result", "completed", 1, "output")]
        assert facts.run(run)["status"] == "completed"


# ---------------------------------------------------------------- options


@step(retry=Retry(max_attempts=2, initial=0), timeout=9)
async def decorated(ctx: StepContext[Any]) -> int:
    if ctx.attempt < 3:
        raise ValueError("not yet")
    return ctx.attempt


async def test_options_of_the_call_win(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        try:
            await ctx.step(decorated)
        except StepFailed as error:
            return [error.attempts, await ctx.step(decorated, retry=Retry(max_attempts=3, initial=0))]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [2, 3]


async def test_the_idempotency_key_is_stable_over_attempts_and_crashes(dsn: str) -> None:
    keys: list[str] = []

    async def charge(ctx: StepContext[Any]) -> None:
        keys.append(ctx.idempotency_key)
        if len(keys) == 1:
            raise ValueError("again")

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(charge, retry=Retry(initial=0))

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        async with place.bench(app) as b:
            run = await app.start(w)
            b.points.on(Point.AFTER_HANDLER, lambda: b.points.on(Point.AFTER_HANDLER, b.points.die))
            job = await b.fetch()
            assert job is not None
            dying = b.begin(b.perform(job))
            await until(lambda: b.points.dead and dying)
            await b.crash()
        async with place.bench(app) as b:
            await b.drain()
            assert (await run.status()).status == "completed"
    assert len(keys) == 3
    assert len({*keys}) == 1


async def write_row(ctx: StepContext[Any], value: int) -> int:
    connection = await ctx.async_connection()
    await connection.execute(text("insert into public.effects values (:value)"), {"value": value})
    return value


@pytest.mark.parametrize("point", [Point.AFTER_HANDLER, Point.BEFORE_COMMIT, Point.AFTER_COMMIT])
async def test_a_transactional_step_takes_effect_exactly_once(dsn: str, facts: Facts, point: Point) -> None:
    facts.execute("create table public.effects (value int)")

    @workflow
    async def w(ctx: Context) -> int:
        await ctx.step(write_row, 1)

        async def inner(c: Context) -> int:
            return await c.step(write_row, 2)

        return await ctx.block("b", inner)

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        run = await app.start(w)
        for _ in range(2):
            async with place.bench(app) as b:
                b.points.on(point, b.points.die)
                await b.start_jobs()
                await until(lambda: b.points.dead or not b.tasks or all(t.done() for t in b.tasks))
                await b.crash()
        async with place.bench(app) as b:
            await b.drain()
            assert await run.result(timeout=5) == 2
    assert [row["value"] for row in facts.rows("select value from public.effects order by value")] == [1, 2]


async def test_at_most_once(dsn: str, log: Log) -> None:
    async def pay() -> None:
        log.append("paid")
        await asyncio.Event().wait()

    @workflow
    async def w(ctx: Context) -> str:
        try:
            await ctx.step(pay, at_most_once=True)
        except StepInterrupted as error:
            return error.kind
        return "?"

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        run = await app.start(w)
        async with place.bench(app) as b:
            await b.start_jobs()
            await until(lambda: log)
            await b.crash()
        async with place.bench(app) as b:
            await b.drain()
            assert await run.result(timeout=5) == "interrupted"
    assert log == ["paid"]


# ---------------------------------------------------------------- suspending


async def ask(ctx: StepContext[Any], question: str) -> Any:
    if ctx.resume_data is None:
        return Suspend({"question": question})
    return [ctx.attempt, ctx.snapshot, ctx.resume_data]


async def test_suspend_and_resume(place: Place) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        return await ctx.step(ask, "may I?")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        status = await run.status()
        assert (status.status, status.waiting_for, status.waiting_name) == ("suspended", "resume", "ask")
        assert status.steps[0].snapshot == {"question": "may I?"}
        assert not (await b.app.resume(run, "other", 1)).accepted
        assert (await b.app.resume(run, "ask", {"yes": True})).accepted
        await b.drain()
        assert await run.result(timeout=5) == [1, {"question": "may I?"}, {"yes": True}]


async def test_suspend_within_blocks_and_branches(place: Place) -> None:
    async def inner(c: Context) -> Any:
        return await c.step(ask, "in a block?")

    @workflow
    async def w(ctx: Context) -> Any:
        first = await ctx.block("b", inner)
        parts = await ctx.join("j", {"x": inner, "y": lambda c: c.sleep(5)})
        return [first[2], parts["x"][2]]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await b.app.resume(run, "b/ask", 1)).accepted
        await b.drain()
        await b.skip(seconds=6)
        await b.drain()
        assert (await run.status()).waiting_name == "j/x/ask"
        assert (await b.app.resume(run, "j/x/ask", 2)).accepted
        await b.drain()
        assert await run.result(timeout=5) == [1, 2]


# ---------------------------------------------------------------- ephemeral steps


@pytest.mark.behaviour("RV-19", "RV-104")
async def test_ephemeral_steps_cost_no_transaction(dsn: str, facts: Facts, log: Log) -> None:
    def made(ephemeral: bool) -> Any:
        @workflow(name=f"w{ephemeral}")
        async def w(ctx: Context) -> list[int]:
            found = [await ctx.step(log.do, n, ephemeral=ephemeral) for n in (1, 2)]
            return [*found, await ctx.step(log.do, 3)]

        return w

    revisions = {}
    async with Place(dsn, replays=False).working(made(True), made(False)) as b:
        for ephemeral in (True, False):
            run = await b.app.start(f"w{ephemeral}")
            await b.drain()
            assert await run.result(timeout=5) == [1, 2, 3]
            assert facts.journal(run) == ["do", "do#2", "do#3", "run:result"]
            revisions[ephemeral] = facts.run(run)["revision"]
    assert revisions == {True: 1, False: 3}


async def test_an_ephemeral_step_runs_again_after_a_crash(dsn: str, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> int:
        await ctx.step(log.do, "cheap", ephemeral=True)
        await ctx.step(log.do, "dear")
        return len(log)

    place = Place(dsn, replays=False)
    async with place.app(w) as app:
        run = await app.start(w)
        async with place.bench(app) as b:
            b.points.on(Point.BEFORE_COMMIT, b.points.die)
            await b.start_jobs()
            await until(lambda: b.points.dead)
            await b.crash()
        assert log == ["cheap", "dear"]
        async with place.bench(app) as b:
            await b.drain()
            assert await run.result(timeout=5) == 4
    assert log == ["cheap", "dear"] * 2


async def test_an_ephemeral_step_that_fails_is_a_failed_attempt_like_any(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> Any:
        value = await ctx.step(log.flaky("x", 1, 7), retry=SOON, ephemeral=True)
        await ctx.sleep(timedelta(minutes=1))
        return value

    async with place.working(w) as b:
        run = await b.app.start(w)
        for _ in range(3):
            await b.drain()
            await b.skip(seconds=61)
        assert await run.result(timeout=5) == 7
        assert log == ["x", "x"]


async def test_the_step_that_failed_is_the_one_that_nonretryable_names(place: Place) -> None:
    class Declined(NonRetryable):
        pass

    async def pay() -> None:
        raise Declined("card")

    @workflow
    async def w(ctx: Context) -> list[Any]:
        try:
            await ctx.step(pay)
        except StepFailed as error:
            return [error.step, error.kind, error.caused_by(Declined)]
        return []

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == ["pay", "critical", True]


async def test_a_lost_connection_does_not_lose_an_ephemeral_entry(dsn: str, facts: Facts, log: Log) -> None:
    """The step after it has run: both entries are written anew."""

    @workflow
    async def w(ctx: Context) -> str:
        await ctx.step(log.do, "cheap", ephemeral=True)
        return str(await ctx.step(log.do, "dear"))

    async with Place(dsn, replays=False).working(w) as b:
        run = await b.app.start(w)
        b.points.on(Point.BEFORE_COMMIT, lambda: facts.terminate("durable worker%"))
        await b.drain()
        assert await run.result(timeout=5) == "dear"
        assert facts.journal(run) == ["do", "do#2", "run:result"]
        assert log == ["cheap", "dear"]


async def test_a_traceback_begins_in_the_users_code(live: Place) -> None:
    async def breaks() -> None:
        raise ValueError("broken")

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(breaks, retry=1)

    async with live.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        error = await failure(run)
        frames = [line for line in error.traceback.splitlines() if line.startswith("  File")]
        assert len(frames) == 1
        assert "test_steps.py" in frames[0]
