"""A Call turned into an Outcome: values, errors, time, cancellation, loops."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import json
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from durable.core.state import Entry, Run, View
from durable.core.transition import Call, Failed, Iterated, Outcome, Purpose, Succeeded, Suspended
from durable.define.nodes import Loop, Step, Work, Workflow
from durable.define.payload import ANY, Schema
from durable.define.registry import Registry
from durable.define.retry import Retry
from durable.engine.calls import Caller
from durable.engine.context import StepContext
from durable.errors import NonRetryable
from durable.values import Status, Suspend

Ctx = StepContext[Any]

RUN_ID = uuid.UUID("01900000-0000-7000-8000-000000000001")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_call(handler: Callable[..., Any], *, work: Mapping[str, Any] | None = None, **facts: Any) -> Call:
    facts = {"step_id": "charge", "purpose": Purpose.STEP, **facts}
    return Call(work=Work(handler, **(work or {})), **facts)


def a_view(*nodes: Any, text: str = "null", schema: Schema = ANY, journal: Mapping[str, Entry] | None = None) -> View:
    workflow = Workflow("order", "1", nodes or (Step("charge", Work(print)),), input=schema)
    run = Run(RUN_ID, "order", "1", Status.RUNNING, 1, 0, text, "default", NOW)
    return View(run, workflow, Registry(), journal or {}, ())


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    caller = Caller(max_threads=4, app="the app")
    yield Bench(caller)
    await caller.close()


class Bench:
    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.cancelled = threading.Event()
        self.progress: list[Mapping[str, Any]] = []

    async def run(self, call: Call, view: View | None = None) -> Outcome:
        options: dict[str, Any] = {"cancelled": self.cancelled, "on_progress": self.progress.append}
        return await self.caller.run(call, view or a_view(), None, now=lambda: NOW, **options)

    async def step(self, handler: Callable[..., Any], **facts: Any) -> Outcome:
        return await self.run(a_call(handler, **facts))

    async def failed(self, handler: Callable[..., Any], **facts: Any) -> Failed:
        outcome = await self.step(handler, **facts)
        assert isinstance(outcome, Failed)
        return outcome

    async def interrupted(self, handler: Callable[..., Any], at: asyncio.Event, **facts: Any) -> Outcome:
        """The outcome of a handler whose task is cancelled once it has come to `at`."""
        task = asyncio.create_task(self.step(handler, **facts))
        await at.wait()
        task.cancel()
        return await task


def raising(error: BaseException) -> Callable[[Ctx], Any]:
    def handler(ctx: Ctx) -> None:
        raise error

    return handler


def both(fn: Callable[[Ctx], Any]) -> tuple[Callable[[Ctx], Any], Callable[[Ctx], Awaitable[Any]]]:
    """The same handler, sync and async."""

    async def on_loop(ctx: Ctx) -> Any:
        return fn(ctx)

    return fn, on_loop


# ---------------------------------------------------------------- how functions are called


class Service:
    async def method(self, ctx: Ctx) -> int:
        return ctx.attempt

    def sync_method(self, ctx: Ctx) -> int:
        return ctx.attempt

    async def __call__(self, ctx: Ctx) -> int:
        return ctx.attempt


async def later(ctx: Ctx) -> int:
    return ctx.attempt


CALLABLES: dict[str, Callable[..., Any]] = {
    "async": later,
    "partial": functools.partial(lambda add, ctx: ctx.attempt + add, 0),
    "async partial": functools.partial(later),
    "method": Service().sync_method,
    "async method": Service().method,
    "async object": Service(),
    "partial of an async object": functools.partial(Service()),
    "returns an awaitable": lambda ctx: later(ctx),
}


@pytest.mark.parametrize("name", CALLABLES)
async def test_anything_callable_serves(bench: Bench, name: str) -> None:
    assert await bench.step(CALLABLES[name], attempt=3) == Succeeded("3")


async def test_sync_functions_run_in_named_threads_with_the_callers_contextvars(bench: Bench) -> None:
    where: contextvars.ContextVar[str] = contextvars.ContextVar("where")
    where.set("here")
    outcome = await bench.step(lambda ctx: [threading.current_thread().name, where.get()])
    assert isinstance(outcome, Succeeded)
    thread, value = json.loads(outcome.value)
    assert thread.startswith("durable-step")
    assert value == "here"


async def test_async_functions_run_on_the_loop(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> bool:
        return threading.current_thread() is threading.main_thread()

    assert await bench.step(handler) == Succeeded("true")


async def test_the_context_has_the_app_and_reports_progress_in_order(bench: Bench) -> None:
    def handler(ctx: Ctx) -> str:
        ctx.progress(1, 2, "half")
        ctx.heartbeat({"at": 3})
        return str(ctx.app)

    for fn in both(handler):
        assert await bench.step(fn) == Succeeded('"the app"')
        await asyncio.sleep(0)
        assert bench.progress == [
            {"done": 1, "total": 2, "message": "half"},
            {"heartbeat": {"at": 3}},
        ]
        bench.progress.clear()


# ---------------------------------------------------------------- values


async def test_a_value_is_dumped_by_its_declared_type(bench: Bench) -> None:
    outcome = await bench.step(lambda ctx: NOW, work={"result": Schema(datetime)})
    assert outcome == Succeeded('"2026-01-01T00:00:00Z"')


@pytest.mark.parametrize("value", [object(), float("nan"), "a\0b", "\ud800", 2**80, {1: 2}, (1, 2)])
async def test_a_value_that_cannot_be_stored_is_critical_and_says_which_step(bench: Bench, value: Any) -> None:
    for fn in both(lambda ctx: value):
        outcome = await bench.failed(fn)
        assert (outcome.failure.kind, outcome.retryable) == ("critical", False)
        assert outcome.failure.type == "durable.errors.PayloadError"
        assert outcome.failure.message.startswith("the result of step 'charge': ")


@dataclass
class Foreign:
    status: str
    state: dict[str, int]
    pending_tool_calls: list[str]


FOREIGN = '{"status":"suspended","state":{"a":1},"pending_tool_calls":["x"]}'
SUSPENSIONS: list[tuple[Any, str]] = [
    (Suspend(), "null"),
    (Suspend({"a": [1]}), '{"a":[1]}'),
    (Suspend({"at": NOW}), '{"at":"2026-01-01T00:00:00Z"}'),
    (Foreign("suspended", {"a": 1}, ["x"]), FOREIGN),
    ({"status": "suspended", "state": {"a": 1}, "pendingToolCalls": ["x"]}, FOREIGN),
    (SimpleNamespace(status="suspended", state={"a": 1}, pendingToolCalls=["x"]), FOREIGN),
]


@pytest.mark.parametrize(("value", "snapshot"), SUSPENSIONS)
async def test_suspend_and_its_shapes(bench: Bench, value: Any, snapshot: str) -> None:
    for purpose in (Purpose.STEP, Purpose.BRANCH):
        assert await bench.step(lambda ctx: value, purpose=purpose) == Suspended(snapshot)
    for purpose in (Purpose.CHOICE, Purpose.RESULT, Purpose.UNDO):
        outcome = await bench.failed(lambda ctx: value, purpose=purpose)
        assert (outcome.failure.kind, outcome.retryable) == ("critical", False)
        assert "can't suspend" in outcome.failure.message


@pytest.mark.parametrize("value", [{"status": "suspended"}, {"status": "done", "state": 1, "pendingToolCalls": 2}])
async def test_what_only_looks_a_little_like_it_is_a_value(bench: Bench, value: Any) -> None:
    assert isinstance(await bench.step(lambda ctx: value), Succeeded)


async def test_a_snapshot_that_cannot_be_stored_is_critical(bench: Bench) -> None:
    outcome = await bench.failed(lambda ctx: Suspend(float("nan")))
    assert outcome.failure.message.startswith("the snapshot of step 'charge': ")


async def test_objects_with_hostile_attributes_are_just_values(bench: Bench) -> None:
    class Hostile:
        @property
        def status(self) -> str:
            raise ValueError

    outcome = await bench.failed(lambda ctx: Hostile())
    assert outcome.failure.type == "durable.errors.PayloadError"


async def test_an_input_that_no_longer_matches_is_critical(bench: Bench) -> None:
    call, view = a_call(lambda ctx: ctx.input), a_view(text='"no number"', schema=Schema(int))
    outcome = await bench.run(call, view)
    assert isinstance(outcome, Failed)
    assert (outcome.failure.kind, outcome.retryable) == ("critical", False)
    assert "the input of the run, for step 'charge' of workflow 'order'" in outcome.failure.message


# ---------------------------------------------------------------- errors


class CardDeclined(Exception):
    pass


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no")

    __repr__ = __str__


class Ends(Exception):
    def __str__(self) -> str:
        raise SystemExit


async def test_an_error_is_a_failed_attempt_with_all_that_is_known(bench: Bench) -> None:
    def handler(ctx: Ctx) -> None:
        error = CardDeclined("no funds")
        error.add_note("card 42")
        raise error from KeyError("x")

    for fn in both(handler):
        outcome = await bench.failed(fn, attempt=2)
        failure = outcome.failure
        assert failure.type == f"{__name__}.CardDeclined"
        assert (failure.message, failure.kind, failure.step, failure.attempts) == ("no funds", "error", "charge", 2)
        assert failure.details == {"notes": ["card 42"], "cause": {"type": "KeyError", "message": "'x'"}}
        assert failure.traceback is not None
        assert "raise error from KeyError" in failure.traceback
        assert "durable/engine" not in failure.traceback
        assert outcome.retryable


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (ValueError("x"), "error", True),
        (TimeoutError("the handler's own"), "error", True),
        (ExceptionGroup("many", [ValueError("x")]), "error", True),
        (StopIteration("x"), "error", True),
        (KeyError("x"), "error", False),
        (NonRetryable("x"), "critical", False),
        (SystemExit(3), "critical", False),
        (KeyboardInterrupt(), "critical", False),
        (asyncio.CancelledError(), "critical", False),
        (GeneratorExit(), "critical", False),
    ],
)
async def test_kinds_of_errors(bench: Bench, error: BaseException, kind: str, retryable: bool) -> None:
    work = {"retry": Retry(give_up_on=(KeyError,))}
    outcome = await bench.failed(raising(error), work=work)
    assert (outcome.failure.kind, outcome.retryable) == (kind, retryable)
    if isinstance(error, GeneratorExit | StopIteration):
        return  # a coroutine can't raise these
    outcome = await bench.failed(both(raising(error))[1], work=work)
    assert (outcome.failure.kind, outcome.retryable) == (kind, retryable)


@pytest.mark.parametrize("error", [Unprintable(), Ends()])
async def test_an_exception_with_an_unprintable_message(bench: Bench, error: BaseException) -> None:
    outcome = await bench.failed(raising(error))
    assert outcome.failure.message.startswith("<the message can't be printed")
    assert outcome.retryable


async def test_any_text_of_an_exception_can_be_stored(bench: Bench) -> None:
    error = ValueError("\0\ud800" + "x" * 100_000)
    error.add_note("\0\ud800")
    failure = (await bench.failed(raising(error))).failure
    assert len(failure.message) < 10_100
    assert failure.message.startswith("\\x00\\ud800xxx")
    assert failure.message.endswith("[90,002 characters cut]")
    for text in (failure.message, failure.traceback or "", str(failure.details)):
        assert "\0" not in text
        text.encode()
    assert len(failure.traceback or "") < 21_000


async def test_a_backoff_function_is_asked_here(bench: Bench) -> None:
    work = {"retry": Retry(backoff=lambda failed: failed * 7.0)}
    assert (await bench.failed(raising(ValueError()), work=work, attempt=2)).delay == 14.0
    assert (await bench.failed(raising(ValueError()), work=work, attempt=3)).delay is None  # there is no fourth
    assert (await bench.failed(raising(ValueError()))).delay is None


@pytest.mark.parametrize("backoff", [lambda failed: 1 / 0, lambda failed: "soon"])
async def test_a_backoff_function_that_fails_ends_the_retries_and_says_so(bench: Bench, backoff: Any) -> None:
    outcome = await bench.failed(raising(ValueError("x")), work={"retry": Retry(backoff=backoff)})
    assert not outcome.retryable
    assert outcome.failure.message == "x"
    assert outcome.failure.details is not None
    assert outcome.failure.details["backoff"]["message"]


# ---------------------------------------------------------------- time


async def forever(ctx: Ctx) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("retry", [Retry(), Retry(retry_on_timeout=True)])
async def test_a_timeout_ends_an_async_handler(bench: Bench, retry: Retry) -> None:
    outcome = await bench.failed(forever, work={"timeout": 0.01, "retry": retry})
    assert (outcome.failure.kind, outcome.failure.type) == ("timeout", "durable.errors.StepTimeout")
    assert "took longer than 0.01 s" in outcome.failure.message
    assert outcome.retryable is retry.retry_on_timeout


async def test_a_timeout_counts_even_if_an_async_handler_swallows_it(bench: Bench) -> None:
    async def handler(ctx: Ctx) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await forever(ctx)
        return "late"

    assert (await bench.failed(handler, work={"timeout": 0.01})).failure.kind == "timeout"


async def test_a_timed_out_sync_handler_is_awaited_and_its_late_value_dropped(bench: Bench) -> None:
    ended: list[bool] = []

    def handler(ctx: Ctx) -> str:
        assert bench.cancelled.wait(30)
        ended.append(ctx.cancelled)
        return "late"

    outcome = await bench.failed(handler, work={"timeout": 0.01})
    assert ended == [True]
    assert outcome.failure.kind == "timeout"


async def test_the_deadline_counts_where_it_is_sooner(bench: Bench) -> None:
    soon = NOW + timedelta(milliseconds=10)
    assert (await bench.failed(forever, deadline=soon)).failure.kind == "timeout"
    assert (await bench.failed(forever, deadline=soon, work={"timeout": 60})).failure.kind == "timeout"
    far = NOW + timedelta(hours=1)
    assert (await bench.failed(forever, deadline=far, work={"timeout": 0.01})).failure.kind == "timeout"


async def test_after_the_deadline_nothing_is_called(bench: Bench) -> None:
    called: list[int] = []
    outcome = await bench.failed(lambda ctx: called.append(1), deadline=NOW - timedelta(seconds=1))
    assert outcome.failure.kind == "timeout"
    assert called == []


async def test_a_call_leaves_nothing_to_the_cycle_collector(bench: Bench) -> None:
    seen: list[weakref.ref[Any]] = []

    async def handler(ctx: Ctx) -> None:
        seen.extend(map(weakref.ref, (ctx, ctx._lending)))

    gc.disable()
    try:
        assert await bench.step(handler) == Succeeded("null")
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- cancellation


async def test_cancelling_an_async_handler_propagates(bench: Bench) -> None:
    at = asyncio.Event()

    async def handler(ctx: Ctx) -> None:
        at.set()
        await forever(ctx)

    with pytest.raises(asyncio.CancelledError):
        await bench.interrupted(handler, at)


async def test_an_async_handler_that_swallows_the_cancellation_has_an_outcome(bench: Bench) -> None:
    at = asyncio.Event()

    async def swallows(ctx: Ctx) -> str:
        at.set()
        with contextlib.suppress(asyncio.CancelledError):
            await forever(ctx)
        return "done"

    async def fails(ctx: Ctx) -> None:
        at.set()
        try:
            await forever(ctx)
        finally:
            raise ValueError("in clean-up")

    assert await bench.interrupted(swallows, at) == Succeeded('"done"')
    at.clear()
    outcome = await bench.interrupted(fails, at)
    assert isinstance(outcome, Failed)
    assert outcome.failure.message == "in clean-up"


async def test_a_cancelled_sync_handler_is_awaited_and_its_outcome_answered(bench: Bench) -> None:
    loop, at = asyncio.get_running_loop(), asyncio.Event()

    def handler(ctx: Ctx) -> str:
        loop.call_soon_threadsafe(at.set)
        assert bench.cancelled.wait(30)
        return "late"

    assert await bench.interrupted(handler, at) == Succeeded('"late"')


async def test_however_often_it_is_cancelled(bench: Bench) -> None:
    loop, at, go = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def handler(ctx: Ctx) -> str:
        loop.call_soon_threadsafe(at.set)
        assert go.wait(30)
        raise ValueError("late")

    task = asyncio.create_task(bench.step(handler))
    await at.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    outcome = await task
    assert isinstance(outcome, Failed)
    assert task.cancelling() == 3


async def test_a_sync_handler_that_no_thread_took_up_never_runs() -> None:
    caller, go, started = Caller(max_threads=1), threading.Event(), asyncio.Event()
    loop, bench, ran = asyncio.get_running_loop(), Bench(caller), []

    def blocks(ctx: Ctx) -> None:
        loop.call_soon_threadsafe(started.set)
        go.wait(30)

    first = asyncio.create_task(bench.step(blocks))
    await started.wait()
    second = asyncio.create_task(bench.step(lambda ctx: ran.append(1)))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go.set()
    await first
    await caller.close()
    assert ran == []


async def test_eight_sync_handlers_do_not_block_the_loop() -> None:
    caller, barrier = Caller(max_threads=8), threading.Barrier(9)
    bench = Bench(caller)
    steps = [asyncio.create_task(bench.step(lambda ctx: barrier.wait(30) * 0)) for _ in range(8)]
    while barrier.n_waiting < 8:
        await asyncio.sleep(0)
    barrier.wait(30)
    assert await asyncio.gather(*steps) == [Succeeded("0")] * 8
    await caller.close()


# ---------------------------------------------------------------- loops


class Looping:
    """A loop all of whose functions write down that they were called, sync or async."""

    def __init__(self, *, is_async: bool, **options: Any) -> None:
        self.seen: list[Any] = []
        self.threads: set[str] = set()
        self.is_async = is_async
        functions = {name: self.recorded(name, fn) for name, fn in options.items() if callable(fn)}
        work = Work(functions.pop("handler"), result=options.pop("result", ANY))
        rest = {name: value for name, value in options.items() if not callable(value)}
        self.loop = Loop("poll", work, **functions, **rest)  # type: ignore[arg-type]

    def recorded(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            shown = ["ctx" if isinstance(arg, StepContext) else arg for arg in args]
            self.seen.append((name, *shown))
            self.threads.add(threading.current_thread().name)
            return fn(*args)

        async def call_async(*args: Any) -> Any:
            return call(*args)

        return call_async if self.is_async else call

    def call(self, iteration: int, item: str | None = None) -> Call:
        facts: dict[str, Any] = {"loop": self.loop, "iteration": iteration, "item": item}
        return Call(f"poll[{iteration}]", Purpose.ITERATION, self.loop.work, **facts)


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_iteration_calls_in_order(bench: Bench, is_async: bool) -> None:
    looping = Looping(
        is_async=is_async,
        map_input=lambda ctx: ctx.input + 1,
        handler=lambda ctx: [ctx.item, ctx.iteration],
        until=lambda result, i: "yes" if i else "",
        feedback=lambda result: result[0] * 10,
    )
    view = a_view(looping.loop, text="6")
    assert await bench.run(looping.call(0), view) == Iterated("[7,0]", stop=False, next_item="70")
    assert looping.seen == [("map_input", "ctx"), ("handler", "ctx"), ("until", [7, 0], 0), ("feedback", [7, 0])]
    looping.seen.clear()
    assert await bench.run(looping.call(1, "70"), view) == Iterated("[70,1]", stop=True, next_item=None)
    assert looping.seen == [("handler", "ctx"), ("until", [70, 1], 1)]


@pytest.mark.parametrize("is_async", [False, True])
async def test_while_comes_before_the_handler(bench: Bench, is_async: bool) -> None:
    looping = Looping(is_async=is_async, while_=lambda ctx, i: ctx.item < 7, handler=lambda ctx: ctx.item + 1)
    view = a_view(looping.loop, text="6")
    assert await bench.run(looping.call(0), view) == Iterated("7", stop=False, next_item=None)
    assert await bench.run(looping.call(1, "7"), view) == Iterated(None, stop=True)
    assert looping.seen == [("while_", "ctx", 0), ("handler", "ctx"), ("while_", "ctx", 1)]


async def test_sync_functions_of_an_iteration_share_one_hop(bench: Bench) -> None:
    looping = Looping(is_async=False, map_input=lambda ctx: 1, handler=lambda ctx: 2, until=lambda r, i: False)
    await asyncio.gather(*[bench.step(lambda ctx: None) for _ in range(4)])
    await bench.run(looping.call(0), a_view(looping.loop))
    assert len(looping.threads) == 1


async def test_sync_and_async_functions_mix(bench: Bench) -> None:
    async def until(result: int, i: int) -> bool:
        return result == 2

    loop = Loop("poll", Work(lambda ctx: ctx.item + 1), until=until, map_input=lambda ctx: later(ctx))
    call = Call("poll[0]", Purpose.ITERATION, loop.work, loop=loop, iteration=0)
    assert await bench.run(call, a_view(loop)) == Iterated("2", stop=True)


async def test_a_count_never_stops_by_itself(bench: Bench) -> None:
    looping = Looping(is_async=False, handler=lambda ctx: 1, max_iterations=1)
    assert await bench.run(looping.call(0), a_view(looping.loop)) == Iterated("1", stop=False)


async def test_conditions_see_the_result_as_it_will_be_replayed(bench: Bench) -> None:
    looping = Looping(is_async=False, handler=lambda ctx: NOW, result=Schema(datetime), until=lambda r, i: r == NOW)
    assert isinstance(await bench.run(looping.call(0), a_view(looping.loop)), Iterated)
    assert looping.seen[-1] == ("until", NOW, 0)
    assert looping.seen[-1][1] is not NOW


async def test_the_default_item_has_the_type_of_the_result(bench: Bench) -> None:
    looping = Looping(is_async=False, handler=lambda ctx: ctx.item + timedelta(days=1), result=Schema(datetime))
    outcome = await bench.run(looping.call(1, '"2026-01-01T00:00:00Z"'), a_view(looping.loop))
    assert outcome == Iterated('"2026-01-02T00:00:00Z"', stop=False)


async def test_at_the_limit_only_while_is_asked(bench: Bench) -> None:
    looping = Looping(is_async=False, handler=lambda ctx: 1, while_=lambda ctx, i: ctx.item, max_iterations=3)
    assert await bench.run(looping.call(3, "false"), a_view(looping.loop)) == Iterated(None, stop=True)
    outcome = await bench.run(looping.call(3, "true"), a_view(looping.loop))
    assert isinstance(outcome, Failed)
    assert outcome.failure.type == "durable.errors.LoopLimitExceeded"
    assert (outcome.failure.kind, outcome.retryable) == ("critical", False)
    assert ("handler", "ctx") not in looping.seen


@pytest.mark.parametrize("name", ["map_input", "while_", "handler", "until", "feedback"])
async def test_an_error_in_any_of_them_fails_the_attempt(bench: Bench, name: str) -> None:
    options: dict[str, Any] = {"handler": lambda ctx: 1, "map_input": lambda ctx: 1, "feedback": lambda result: 1}
    options["until" if name == "until" else "while_"] = lambda *args: name != "until"
    options[name] = lambda *args: 1 / 0
    looping = Looping(is_async=False, **options)
    outcome = await bench.run(looping.call(0), a_view(looping.loop))
    assert isinstance(outcome, Failed)
    assert outcome.failure.type == "ZeroDivisionError"
    assert outcome.retryable


async def test_a_loops_handler_cannot_suspend(bench: Bench) -> None:
    looping = Looping(is_async=False, handler=lambda ctx: Suspend())
    outcome = await bench.run(looping.call(0), a_view(looping.loop))
    assert isinstance(outcome, Failed)
    assert "a loop's handler can't suspend" in outcome.failure.message


@pytest.mark.parametrize("where", ["while_", "handler"])
async def test_a_cancelled_iteration_goes_on_only_if_its_handler_has_run(bench: Bench, where: str) -> None:
    loop, at = asyncio.get_running_loop(), asyncio.Event()

    def waits(*args: Any) -> bool:
        loop.call_soon_threadsafe(at.set)
        return bench.cancelled.wait(30)

    async def feedback(result: bool) -> str:
        return "next"

    options = {"handler": lambda ctx: True, "while_": lambda ctx, i: True, where: waits}
    looping = Looping(is_async=False, **options)
    looping.loop = replace(looping.loop, feedback=feedback)
    task = asyncio.create_task(bench.run(looping.call(0), a_view(looping.loop)))
    await at.wait()
    task.cancel()
    if where == "handler":
        assert await task == Iterated("true", stop=False, next_item='"next"')
    else:
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ("handler", "ctx") not in looping.seen
