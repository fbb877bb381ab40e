"""Builder workflows end to end, through the facade and the harness: what each kind of node does and what is told."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from tests.engine.kit import Facts

from durable import (
    Durable,
    NonRetryable,
    Retry,
    RunCanceled,
    RunExists,
    RunFailed,
    RunNotFound,
    StepContext,
    Suspend,
    WorkflowNotRegistered,
    branch,
    define,
)
from durable.errors import RetryRefused
from durable.testing import Harness, assert_history

Ctx = StepContext[Any]


@pytest.fixture
def app(dsn: str) -> Iterator[Durable]:
    with Durable(dsn) as app:
        yield app


@pytest.fixture
def t(app: Durable, facts: Facts) -> Iterator[Harness]:
    with Harness(app) as harness:
        yield harness
        facts.check_rest()


def boom(ctx: Ctx) -> None:
    raise ValueError("boom")


class Log:
    """Handlers that note their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, name: str, value: Any = None) -> Any:
        def handler(ctx: Ctx) -> Any:
            self.calls.append(name)
            return value

        return handler


# ---------------------------------------------------------------- steps


@pytest.mark.behaviour("SD-07", "SW-01")
def test_steps_are_chained(app: Durable, t: Harness) -> None:
    app.register(
        define("count")
        .step("one", lambda ctx: 1)
        .step("two", lambda ctx: ctx.results["one"] + 1)
        .step("three", lambda ctx: ctx.results["two"] + 1)
    )
    run = app.start("count")
    assert run.status().status == "pending"
    assert t.drain() == 3
    assert run.result(timeout=10) == {"one": 1, "two": 2, "three": 3}
    assert_history(
        t.history(run),
        [
            "created",
            "started",
            "attempt_started one",
            "attempt_succeeded one",
            "attempt_started two",
            "attempt_succeeded two",
            "attempt_started three",
            "attempt_succeeded three",
            "completed",
        ],
    )


def test_the_result_can_be_computed(app: Durable, t: Harness) -> None:
    app.register(define("w", result=lambda ctx: ctx.results["a"] * 2).step("a", lambda ctx: 21))
    run = app.start("w")
    t.drain()
    assert run.result(timeout=10) == 42


@dataclass
class Order:
    id: int
    at: datetime


def test_values_come_back_as_the_types_that_were_declared(app: Durable, t: Harness) -> None:
    seen: list[Any] = []

    def make(ctx: StepContext[Order]) -> Order:
        seen.append(ctx.input)
        return Order(2, ctx.input.at)

    app.register(define("w", input=Order).step("a", make).step("b", lambda ctx: seen.append(ctx.results["a"])))
    at = datetime(2026, 1, 1, tzinfo=UTC)
    run = app.start("w", Order(1, at))
    t.drain()
    assert seen == [Order(1, at), Order(2, at)]
    assert run.result(timeout=10) == {"a": Order(2, at), "b": None}


@pytest.mark.behaviour("SD-15")
def test_a_flaky_step_succeeds_at_its_third_attempt(app: Durable, t: Harness) -> None:
    attempts: list[int] = []
    undone = Log()

    def flaky(ctx: Ctx) -> int:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt}")
        return ctx.attempt

    app.register(define("w").step("a", lambda ctx: 1, compensate=undone("a")).step("flaky", flaky))
    run = app.start("w")
    t.drain()
    waiting = run.status()
    assert (waiting.status, waiting.derived, waiting.waiting_name) == ("suspended", "retrying", "flaky")
    assert waiting.wake_at is not None
    assert attempts == [1]
    t.skip(minutes=1)
    t.drain()
    assert attempts == [1, 2]
    t.skip(minutes=1)
    t.drain()
    assert run.result(timeout=10) == {"a": 1, "flaky": 3}
    assert undone.calls == []
    failed = t.history(run).of("attempt_failed")
    assert [(event.step, event.attempt) for event in failed] == [("flaky", 1), ("flaky", 2)]
    assert all(event.next_attempt_at is not None and event.error is not None for event in failed)


@pytest.mark.behaviour("SN-31")
def test_an_exhausted_step_fails_with_its_last_error(app: Durable, t: Harness) -> None:
    def always(ctx: Ctx) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    undone = Log()
    app.register(
        define("w").step("a", lambda ctx: 1, compensate=undone("a")).step("bad", always, retry=Retry(max_attempts=2))
    )
    run = app.start("w")
    t.drain()
    t.skip(minutes=1)
    t.drain()
    with pytest.raises(RunFailed, match="attempt 2"):
        run.result(timeout=10)
    error = run.status().error
    assert error is not None
    assert (error.kind, error.attempts, error.step) == ("exhausted", 2, "bad")
    assert undone.calls == ["a"]
    assert [event.kind for event in t.history(run).of("compensating", "compensated", "failed")] == [
        "compensating",
        "compensated",
        "failed",
    ]


def test_non_retryable_gives_up_at_once(app: Durable, t: Harness) -> None:
    calls = Log()

    def never(ctx: Ctx) -> None:
        calls.calls.append("x")
        raise NonRetryable("card is stolen")

    app.register(define("w").step("a", never))
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match="card is stolen"):
        run.result(timeout=10)
    assert calls.calls == ["x"]


def test_a_step_that_takes_too_long_fails(app: Durable, t: Harness) -> None:
    async def forever(ctx: Ctx) -> None:
        await asyncio.Event().wait()

    app.register(define("w").step("a", forever, timeout=0.05))
    run = app.start("w")
    t.drain()
    error = run.status().error
    assert error is not None
    assert error.kind == "timeout"
    assert error.attempts == 1


def test_a_step_that_ran_out_of_attempts_can_wait_for_a_person(app: Durable, t: Harness) -> None:
    broken = True

    def work(ctx: Ctx) -> int:
        if broken:
            raise ValueError("not yet")
        return ctx.attempt

    app.register(define("w").step("a", work, retry=Retry(max_attempts=1, on_exhausted="pause")))
    run = app.start("w")
    t.drain()
    status = run.status()
    assert status.status == "paused"
    assert status.error is not None
    assert "not yet" in status.error.message
    broken = False
    assert run.resume()
    t.drain()
    assert run.result(timeout=10) == {"a": 1}


def test_what_cannot_be_stored_fails_the_step(app: Durable, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: "\x00"))
    run = app.start("w")
    t.drain()
    error = run.status().error
    assert error is not None
    assert error.type == "durable.errors.PayloadError"


def test_an_exception_whose_message_cannot_be_printed(app: Durable, t: Harness) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def odd(ctx: Ctx) -> None:
        raise Odd

    app.register(define("w").step("a", odd, retry=1))
    run = app.start("w")
    t.drain()
    error = run.status().error
    assert run.status().status == "failed"
    assert error is not None
    assert "Odd" in error.type


# ---------------------------------------------------------------- parallel, route, loop


@pytest.mark.behaviour("SD-11", "SN-40", "SW-04")
def test_branches_stand_under_their_names(app: Durable, facts: Facts, t: Harness) -> None:
    app.register(
        define("w")
        .parallel("p", {"x": lambda ctx: {"x": 1}, "y": lambda ctx: {"y": 2}, "z": lambda ctx: "plain"})
        .step("after", lambda ctx: ctx.results["p"]["z"])
    )
    run = app.start("w")
    t.drain()
    assert run.result(timeout=10) == {"p": {"x": {"x": 1}, "y": {"y": 2}, "z": "plain"}, "after": "plain"}
    assert sorted(facts.journal(run)) == ["after", "p", "p/x", "p/y", "p/z"]
    assert {event.parent for event in run.history() if (event.step or "").startswith("p/")} == {"p"}


@pytest.mark.behaviour("SN-41", "SW-05", "SW-14")
def test_a_bad_branch_fails_the_node_after_all_have_ended(app: Durable, facts: Facts, t: Harness) -> None:
    log = Log()
    app.register(
        define("w")
        .step("pre", log("pre"), compensate=log("undo pre"))
        .parallel("p", {"bad": branch(boom, retry=1), "ok": branch(log("ok"), compensate=log("undo ok"))})
        .step("post", log("post"))
    )
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match="boom"):
        run.result(timeout=10)
    assert log.calls == ["pre", "ok", "undo ok", "undo pre"]
    error = run.status().error
    assert error is not None
    assert error.type == "durable.errors.JoinFailed"
    assert list(error.details["branches"]) == ["bad"]


def test_a_crash_repeats_unfinished_branches_only(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("w").parallel("p", {"a": log("a", 1), "b": log("b", 2), "c": log("c", 3)}))
    run = app.start("w")
    assert t.drain(max_steps=1) == 1
    t.drain()
    assert run.result(timeout=10) == {"p": {"a": 1, "b": 2, "c": 3}}
    assert log.calls.count("a") == 1


def test_a_branch_retries_while_its_siblings_are_kept(app: Durable, t: Harness) -> None:
    log = Log()

    def flaky(ctx: Ctx) -> int:
        log.calls.append(f"flaky {ctx.attempt}")
        if ctx.attempt == 1:
            raise ValueError("no")
        return 2

    app.register(define("w").parallel("p", {"a": log("a", 1), "b": flaky}))
    run = app.start("w")
    t.drain()
    assert run.status().derived == "retrying"
    t.skip(minutes=1)
    t.drain()
    assert run.result(timeout=10) == {"p": {"a": 1, "b": 2}}
    assert sorted(log.calls) == ["a", "flaky 1", "flaky 2"]


@pytest.mark.behaviour("SD-13", "SW-06")
def test_a_route_takes_one_branch(app: Durable, facts: Facts, t: Harness) -> None:
    log = Log()
    app.register(
        define("w").route("r", lambda ctx: ctx.input["to"], {"cloud": log("cloud", 1), "metal": log("metal", 2)})
    )
    run = app.start("w", {"to": "metal"})
    t.drain()
    assert run.result(timeout=10) == {"r": {"branch": "metal", "value": 2}}
    assert log.calls == ["metal"]
    assert facts.journal(run) == ["choice:r", "r/metal", "r"]


def test_a_route_is_never_chosen_anew(app: Durable, t: Harness) -> None:
    choices = iter(["a", "b"])
    log = Log()

    def flaky(ctx: Ctx) -> None:
        log.calls.append("a")
        if ctx.attempt == 1:
            raise ValueError("no")

    app.register(define("w").route("r", lambda ctx: next(choices), {"a": flaky, "b": log("b")}))
    run = app.start("w")
    t.drain()
    t.skip(minutes=1)
    t.drain()
    assert run.status().status == "completed"
    assert log.calls == ["a", "a"]


@pytest.mark.behaviour("SN-43", "SW-07")
def test_an_unknown_branch_fails_and_is_named(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(
        define("w").step("a", log("a"), compensate=log("undo a")).route("r", lambda ctx: "missing", {"one": log("one")})
    )
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match=r"missing.*one"):
        run.result(timeout=10)
    assert log.calls == ["a", "undo a"]


@pytest.mark.behaviour("SW-08")
def test_a_selector_that_raises_fails_its_node(app: Durable, t: Harness) -> None:
    def choose(ctx: Ctx) -> str:
        raise NonRetryable("cannot choose")

    app.register(define("w").route("r", choose, {"one": boom}))
    run = app.start("w")
    t.drain()
    error = run.status().error
    assert error is not None
    assert "cannot choose" in error.message
    assert "r" in {step.step_id for step in run.status().steps}


@pytest.mark.behaviour("SD-14", "SW-10", "SW-12")
def test_a_loop_until(app: Durable, facts: Facts, t: Harness) -> None:
    app.register(define("w").loop("l", lambda ctx: ctx.item + 1, until=lambda result, i: result >= 5, keep="last"))
    run = app.start("w", 0)
    t.drain()
    assert run.result(timeout=10) == {"l": 5}
    assert facts.journal(run) == ["l[0]", "l[1]", "l[2]", "l[3]", "l[4]", "l"]


@pytest.mark.behaviour("SN-44")
def test_a_loop_while(app: Durable, t: Harness) -> None:
    app.register(
        define("w")
        .loop("l", lambda ctx: ctx.iteration * 10, while_=lambda ctx, i: i < 3)
        .step("after", lambda ctx: ctx.results["l"])
    )
    run = app.start("w")
    t.drain()
    assert run.result(timeout=10) == {"l": [0, 10, 20], "after": [0, 10, 20]}


@pytest.mark.behaviour("SW-09", "SW-11")
@pytest.mark.parametrize(("count", "expected"), [(3, [1, 2, 3]), (1, [1]), (0, [])])
def test_a_counted_loop(app: Durable, t: Harness, count: int, expected: list[int]) -> None:
    app.register(define("w").loop("l", lambda ctx: ctx.item + 1, max_iterations=count))
    run = app.start("w", 0)
    t.drain()
    assert run.result(timeout=10) == {"l": expected}


def test_a_loop_that_needs_one_iteration_more_than_it_may(app: Durable, t: Harness) -> None:
    app.register(
        define("w").loop("l", lambda ctx: ctx.iteration, until=lambda result, i: i >= ctx_limit, max_iterations=3)
    )
    ctx_limit = 2
    exact = app.start("w")
    t.drain()
    assert exact.result(timeout=10) == {"l": [0, 1, 2]}
    ctx_limit = 3
    over = app.start("w")
    t.drain()
    error = over.status().error
    assert error is not None
    assert error.type == "durable.errors.LoopLimitExceeded"


def test_a_loop_feeds_back(app: Durable, t: Harness) -> None:
    app.register(
        define("w").loop(
            "l",
            lambda ctx: {"seen": ctx.item},
            map_input=lambda ctx: ctx.input * 10,
            feedback=lambda result: result["seen"] + 1,
            max_iterations=3,
        )
    )
    run = app.start("w", 1)
    t.drain()
    assert run.result(timeout=10) == {"l": [{"seen": 10}, {"seen": 11}, {"seen": 12}]}


def test_a_crash_goes_on_at_the_first_unfinished_iteration(app: Durable, t: Harness) -> None:
    calls: list[int] = []

    def work(ctx: Ctx) -> int:
        calls.append(ctx.iteration or 0)
        return int(ctx.item) + 1

    app.register(define("w").loop("l", work, max_iterations=5))
    run = app.start("w", 0)
    assert t.drain(max_steps=2) == 2
    t.drain()
    assert run.result(timeout=10) == {"l": [1, 2, 3, 4, 5]}
    assert calls == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- waits


@pytest.mark.behaviour("SD-17", "SD-18", "SD-21", "SN-38")
def test_a_run_waits_for_a_signal(app: Durable, facts: Facts, t: Harness) -> None:
    app.register(
        define("w")
        .step("prepare", lambda ctx: 1)
        .wait_for_signal("wait", "approved")
        .step("finish", lambda ctx: ctx.results["wait"])
    )
    run = app.start("w")
    t.drain()
    status = run.status()
    assert (status.id, status.workflow, status.status, status.cursor, status.total_steps) == (
        run.id,
        "w",
        "suspended",
        1,
        3,
    )
    assert (status.waiting_for, status.waiting_name, status.derived) == ("signal", "approved", "waiting_for_signal")
    assert status.results == {"prepare": 1}
    assert facts.jobs() == []
    refused = run.resume("denied", 1)
    assert not refused.accepted
    assert refused.status == "suspended"
    assert facts.jobs() == []
    assert facts.inbox(run) == []
    assert run.resume("approved", {"by": "me"}).accepted
    t.drain()
    assert run.result(timeout=10) == {"prepare": 1, "wait": {"by": "me"}, "finish": {"by": "me"}}
    assert not run.resume("approved", {"by": "you"}).accepted
    assert run.result(timeout=10)["wait"] == {"by": "me"}
    assert not run.signal("approved", 1)
    assert "wait_waiting wait" in t.history(run).lines
    assert "wait_satisfied wait" in t.history(run).lines


def test_signals_that_came_early_are_taken_oldest_first(app: Durable, t: Harness) -> None:
    app.register(define("w").wait_for_signal("one", "go").wait_for_signal("two", "go"))
    run = app.start("w")
    assert run.signal("go", 1)
    assert run.signal("other", 0)
    assert run.signal("go", 2, id="x")
    assert run.signal("go", 2, id="x")
    t.drain()
    assert run.result(timeout=10) == {"one": 1, "two": 2}


def test_a_signal_has_a_type(app: Durable, t: Harness) -> None:
    app.register(define("w").wait_for_signal("wait", "go", type=Order).step("a", lambda ctx: ctx.results["wait"].id))
    good, bad = app.start("w"), app.start("w")
    good.signal("go", {"id": 7, "at": "2026-01-01T00:00:00Z"})
    bad.signal("go", {"id": "x"})
    t.drain()
    assert good.result(timeout=10)["a"] == 7
    error = bad.status().error
    assert error is not None
    assert error.type == "durable.errors.PayloadError"


def test_a_wait_times_out(app: Durable, t: Harness) -> None:
    app.register(define("strict").wait_for_signal("wait", "go", timeout=timedelta(days=3)))
    app.register(define("mild").wait_for_signal("wait", lambda ctx: "go", timeout=timedelta(days=3), on_timeout="late"))
    strict, mild = app.start("strict"), app.start("mild")
    t.drain()
    t.skip(days=2)
    t.drain()
    assert strict.status().status == mild.status().status == "suspended"
    t.skip(days=1, seconds=1)
    t.drain()
    error = strict.status().error
    assert error is not None
    assert error.type == "durable.errors.SignalTimeout"
    assert mild.result(timeout=10) == {"wait": "late"}
    assert "wait_timed_out wait" in t.history(strict).lines
    assert "wait_timed_out wait" in t.history(mild).lines


def test_the_time_of_a_wait_runs_on_in_a_pause(app: Durable, t: Harness) -> None:
    app.register(define("w").wait_for_signal("wait", "go", timeout=60, on_timeout="late"))
    run = app.start("w")
    t.drain()
    assert run.pause()
    t.skip(minutes=5)
    t.drain()
    assert run.status().status == "paused"
    assert run.resume()
    t.drain()
    assert run.result(timeout=10) == {"wait": "late"}


@pytest.mark.behaviour("SD-19")
def test_a_sleep(app: Durable, facts: Facts, t: Harness) -> None:
    log = Log()
    app.register(define("w").step("a", log("a")).sleep("s", 60).step("b", log("b")))
    run = app.start("w")
    t.drain()
    status = run.status()
    assert (status.derived, status.waiting_name, status.cursor) == ("sleeping", "s", 1)
    assert status.wake_at is not None
    assert facts.jobs() == []
    assert log.calls == ["a"]
    t.skip(seconds=61)
    t.drain()
    assert run.status().status == "completed"
    assert log.calls == ["a", "b"]
    assert "sleep_waiting s" in t.history(run).lines
    assert "sleep_elapsed s" in t.history(run).lines


@pytest.mark.behaviour("SN-37", "SN-13")
@pytest.mark.parametrize(
    "until",
    [0, timedelta(0), datetime(2020, 1, 1, tzinfo=UTC), lambda ctx: 0, lambda ctx: -5, lambda ctx: datetime.now(UTC)],
    ids=["0", "timedelta", "past", "computed", "negative", "computed time"],
)
def test_a_sleep_that_is_over_at_once(app: Durable, t: Harness, until: Any) -> None:
    app.register(define("w").sleep("s", until).step("after", lambda ctx: "done"))
    run = app.start("w")
    t.drain()
    assert run.result(timeout=10)["after"] == "done"


def test_a_computed_sleep_is_computed_once(app: Durable, t: Harness) -> None:
    log = Log()

    def until(ctx: Ctx) -> timedelta:
        log.calls.append("until")
        return timedelta(hours=1)

    app.register(define("w").sleep("s", until))
    run = app.start("w")
    t.drain()
    assert run.status().derived == "sleeping"
    t.skip(minutes=59)
    t.drain()
    assert run.status().derived == "sleeping"
    t.skip(minutes=2)
    t.drain()
    assert run.status().status == "completed"
    assert log.calls == ["until"]


def test_a_step_suspends_and_is_entered_again(app: Durable, t: Harness) -> None:
    seen: list[Any] = []

    def ask(ctx: Ctx) -> Any:
        seen.append((ctx.attempt, ctx.snapshot, ctx.resume_data))
        return Suspend({"asked": len(seen)}) if len(seen) < 3 else "answered"

    app.register(define("w").step("ask", ask))
    run = app.start("w")
    t.drain()
    status = run.status()
    assert (status.derived, status.waiting_name) == ("waiting_for_resume", "ask")
    assert status.steps[0].snapshot == {"asked": 1}
    assert not app.resume(run.id, "other", 1).accepted
    assert app.resume(run.id, "ask", "one").accepted
    t.drain()
    assert app.resume(run.id, "ask").accepted
    t.drain()
    assert run.result(timeout=10) == {"ask": "answered"}
    assert seen == [(1, None, None), (1, {"asked": 1}, "one"), (1, {"asked": 2}, None)]


def test_an_agent_that_waits_for_a_tool_suspends(app: Durable, t: Harness) -> None:
    def agent(ctx: Ctx) -> Any:
        if ctx.resume_data is None:
            return {"status": "suspended", "state": {"turn": 1}, "pendingToolCalls": [{"id": 1}]}
        return [ctx.snapshot["state"], ctx.resume_data]

    app.register(define("w").step("agent", agent))
    run = app.start("w")
    t.drain()
    assert run.resume("agent", "tool result").accepted
    t.drain()
    assert run.result(timeout=10) == {"agent": [{"turn": 1}, "tool result"]}


def test_an_absent_payload_and_null_are_the_same(app: Durable, t: Harness) -> None:
    app.register(define("w").wait_for_signal("one", "go").wait_for_signal("two", "go"))
    run = app.start("w")
    run.signal("go")
    run.signal("go", None)
    t.drain()
    assert run.result(timeout=10) == {"one": None, "two": None}


# ---------------------------------------------------------------- children


@pytest.mark.behaviour("SD-26", "SN-46")
def test_a_child_gives_its_result(app: Durable, t: Harness) -> None:
    app.register(define("child").step("do", lambda ctx: {"from": ctx.input["id"]}))
    app.register(
        define("parent")
        .child_workflow("sub", "child", map_input=lambda ctx: {"id": ctx.input["id"] + 1})
        .step("after", lambda ctx: ctx.results["sub"]["do"])
    )
    run = app.start("parent", {"id": 1})
    t.drain()
    assert run.result(timeout=10) == {"sub": {"do": {"from": 2}}, "after": {"from": 2}}
    (child,) = run.status().children
    assert (child.workflow, child.status, child.parent_id, child.parent_step) == ("child", "completed", run.id, "sub")
    assert [found.id for found in app.list(parent=run.id)] == [child.id]


@pytest.mark.behaviour("SD-27", "SN-47")
def test_a_child_that_fails_fails_its_parent(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("child").step("do", boom, retry=1))
    app.register(
        define("parent")
        .step("setup", log("setup"), compensate=log("undo setup"))
        .child_workflow("sub", "child")
        .step("after", log("after"))
    )
    run = app.start("parent")
    t.drain()
    with pytest.raises(RunFailed, match="boom"):
        run.result(timeout=10)
    assert log.calls == ["setup", "undo setup"]
    error = run.status().error
    assert error is not None
    assert error.type == "durable.errors.ChildFailed"
    assert error.details["child"]["error"]


def test_a_child_is_chosen_by_the_context(app: Durable, t: Harness) -> None:
    app.register(define("one").step("a", lambda ctx: 1))
    app.register(define("two").step("a", lambda ctx: 2))
    app.register(define("parent").child_workflow("sub", lambda ctx: ctx.input))
    run = app.start("parent", "two")
    t.drain()
    assert run.result(timeout=10) == {"sub": {"a": 2}}


def test_a_completed_child_is_rolled_back_through_its_own_journal(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(
        define("child").step("x", log("x"), compensate=log("undo x")).step("y", log("y"), compensate=log("undo y"))
    )
    app.register(
        define("parent")
        .step("a", log("a"), compensate=log("undo a"))
        .child_workflow("sub", "child", compensate=True)
        .step("b", boom, retry=1)
    )
    run = app.start("parent")
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["a", "x", "y", "undo y", "undo x", "undo a"]
    (child,) = run.status().children
    assert (child.status, child.reason) == ("canceled", "rolled back")


def test_a_completed_child_stays_as_it_is_unless_asked_for(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("child").step("x", log("x"), compensate=log("undo x")))
    app.register(define("parent").child_workflow("sub", "child").step("b", boom, retry=1))
    run = app.start("parent")
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["x"]
    assert run.status().children[0].status == "completed"


def test_a_child_whose_rollback_fails_is_told(app: Durable, t: Harness) -> None:
    app.register(define("child").step("x", lambda ctx: 1, compensate=boom))
    app.register(define("parent").child_workflow("sub", "child", compensate=True).step("b", boom, retry=1))
    run = app.start("parent")
    for _ in range(4):
        t.drain()
        t.skip(minutes=5)
    status = run.status()
    assert status.status == "failed"
    assert status.not_undone == ("sub",)
    assert status.children[0].not_undone == ("x",)


# ---------------------------------------------------------------- rollback


@pytest.mark.behaviour("SN-32", "SW-13")
def test_a_failure_undoes_what_was_done_newest_first(app: Durable, facts: Facts, t: Harness) -> None:
    log = Log()
    app.register(
        define("saga")
        .step("reserve", log("reserve"), compensate=log("undo reserve"))
        .step("charge", log("charge"), compensate=log("undo charge"))
        .step("ship", boom, retry=1, compensate=log("undo ship"))
    )
    run = app.start("saga")
    t.drain()
    with pytest.raises(RunFailed, match="boom"):
        run.result(timeout=10)
    assert log.calls == ["reserve", "charge", "undo charge", "undo reserve"]
    assert facts.journal(run) == ["reserve", "charge", "ship", "undo:charge", "undo:reserve"]
    assert_history(
        t.history(run),
        [
            ...,
            "attempt_failed ship",
            "compensating",
            "compensated charge",
            "compensated reserve",
            "failed",
        ],
    )


@pytest.mark.behaviour("SD-29")
def test_a_rollback_survives_a_crash(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(
        define("w")
        .step("a", log("a"), compensate=log("undo a"))
        .step("b", log("b"), compensate=log("undo b"))
        .step("c", boom, retry=1)
    )
    run = app.start("w")
    t.drain(max_steps=4)
    assert run.status().status == "compensating"
    assert log.calls == ["a", "b", "undo b"]
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["a", "b", "undo b", "undo a"]


@pytest.mark.behaviour("SW-15")
def test_a_compensator_that_gives_up_is_recorded_and_the_rest_run(app: Durable, t: Harness) -> None:
    log = Log()

    def stuck(ctx: Ctx) -> None:
        log.calls.append(f"stuck {ctx.attempt}")
        raise RuntimeError("the bank is closed")

    app.register(
        define("w")
        .step("a", log("a", 1), compensate=log("undo a"))
        .step("b", log("b", 2), compensate=stuck)
        .step("c", boom, retry=1)
    )
    run = app.start("w")
    for _ in range(3):
        t.drain()
        assert run.status().status != "completed"
        t.skip(minutes=5)
    t.drain()
    status = run.status()
    assert log.calls == ["a", "b", "stuck 1", "stuck 2", "stuck 3", "undo a"]
    assert status.status == "failed"
    assert status.not_undone == ("b",)
    assert status.error is not None
    assert "boom" in status.error.message
    with pytest.raises(RunFailed) as failed:
        run.result(timeout=10)
    assert "b" in str(failed.value)
    assert "compensation_failed b" in t.history(run).lines


@pytest.mark.behaviour("SW-16")
def test_a_failure_with_nothing_to_undo_fails_at_once(app: Durable, t: Harness) -> None:
    app.register(define("w").step("a", boom, retry=1).step("b", boom))
    run = app.start("w")
    t.drain()
    assert run.status().status == "failed"
    assert t.history(run).count("compensating") == 0


def test_a_compensator_sees_what_the_step_returned(app: Durable, t: Harness) -> None:
    seen: list[Any] = []

    def undo(ctx: Ctx) -> None:
        seen.append((ctx.step_id, ctx.output, ctx.item, ctx.iteration, ctx.input))

    app.register(
        define("w")
        .step("a", lambda ctx: {"id": 1}, compensate=undo)
        .route("r", lambda ctx: "x", {"x": branch(lambda ctx: "routed", compensate=undo)})
        .loop("l", lambda ctx: ctx.item + 1, max_iterations=2, compensate=undo)
        .step("z", boom, retry=1)
    )
    run = app.start("w", 5)
    t.drain()
    assert run.status().status == "failed"
    assert seen == [
        ("undo:l[1]", 7, 6, 1, 5),
        ("undo:l[0]", 6, 5, 0, 5),
        ("undo:r/x", "routed", None, None, 5),
        ("undo:a", {"id": 1}, None, None, 5),
    ]


def test_finished_iterations_of_a_loop_that_fails_are_undone(app: Durable, t: Harness) -> None:
    log = Log()

    def work(ctx: Ctx) -> int:
        if ctx.iteration == 2:
            raise NonRetryable("third")
        return int(ctx.iteration or 0)

    app.register(define("w").loop("l", work, max_iterations=5, compensate=lambda ctx: log.calls.append(ctx.step_id)))
    run = app.start("w")
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["undo:l[1]", "undo:l[0]"]


@pytest.mark.parametrize("compensate", [False, True])
def test_cancel_of_a_waiting_run(app: Durable, t: Harness, compensate: bool) -> None:
    log = Log()
    app.register(define("w").step("a", log("a"), compensate=log("undo a")).wait_for_signal("s", "go"))
    run = app.start("w")
    t.drain()
    assert run.cancel(reason="no longer wanted", compensate=compensate)
    t.drain()
    assert log.calls == (["a", "undo a"] if compensate else ["a"])
    status = run.status()
    assert (status.status, status.reason) == ("canceled", "no longer wanted")
    with pytest.raises(RunCanceled, match="no longer wanted"):
        run.result(timeout=10)
    assert not run.cancel()
    assert not run.pause()
    assert not run.resume()
    assert_history(t.history(run), [..., "canceled"])


# ---------------------------------------------------------------- deadlines, delays, priorities, keys, retry


def test_a_run_has_a_deadline(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("w").step("a", log("a"), compensate=log("undo a")).wait_for_signal("s", "go"))
    run = app.start("w", timeout=60)
    t.drain()
    t.skip(seconds=61)
    t.drain()
    status = run.status()
    assert status.status == "failed"
    assert status.error is not None
    assert status.error.kind == "timeout"
    assert log.calls == ["a", "undo a"]


def test_a_deadline_acts_on_resume(app: Durable, t: Harness) -> None:
    app.register(define("w").wait_for_signal("s", "go"))
    run = app.start("w", timeout=60)
    t.drain()
    run.pause()
    t.skip(seconds=90)
    t.drain()
    assert run.status().status == "paused"
    run.resume()
    t.drain()
    assert run.status().status == "failed"


def test_the_deadline_limits_an_attempt(app: Durable, t: Harness) -> None:
    async def forever(ctx: Ctx) -> None:
        await asyncio.Event().wait()

    app.register(define("w").step("a", forever, timeout=3600))
    run = app.start("w", timeout=0.3)
    t.drain()
    status = run.status()
    assert status.status == "failed"
    assert status.error is not None
    assert status.error.kind == "timeout"


def test_a_delayed_start(app: Durable, facts: Facts, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: 1))
    run = app.start("w", delay=timedelta(hours=1), timeout=60)
    t.drain()
    assert run.status().derived == "delayed"
    assert facts.jobs() == []
    t.skip(minutes=59)
    t.drain()
    assert run.status().status == "pending"
    t.skip(minutes=1, seconds=5)
    t.drain()
    assert run.result(timeout=10) == {"a": 1}  # its deadline counts from the start


def test_cancel_of_a_delayed_start(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("w").step("a", log("a")))
    run = app.start("w", delay=3600)
    assert run.cancel()
    t.skip(hours=2)
    t.drain()
    assert run.status().status == "canceled"
    assert log.calls == []


def test_a_higher_priority_goes_first(app: Durable, t: Harness) -> None:
    order: list[Any] = []
    app.register(define("w").step("a", lambda ctx: order.append(ctx.input)))
    for priority in (0, 5, -5, 10):
        app.start("w", priority, priority=priority)
    t.drain()
    assert order == [10, 5, 0, -5]


@pytest.mark.behaviour("SN-28")
def test_a_start_writes_one_run_and_one_job(app: Durable, facts: Facts) -> None:
    app.register(define("w").step("a", lambda ctx: 1))
    run = app.start("w")
    assert facts.run(run)["workflow"] == "w"
    (job,) = facts.jobs()
    assert (job["task_name"], job["args"]) == ("durable.advance", {"run_id": str(run.id), "revision": 0})


@pytest.mark.behaviour("SN-29")
def test_a_job_that_is_lost_between_two_steps(app: Durable, facts: Facts, t: Harness) -> None:
    log = Log()
    app.register(define("w").step("once", log("once", 1)).step("twice", log("twice", 2)))
    run = app.start("w")
    t.drain(max_steps=1)
    facts.execute("delete from durable.procrastinate_jobs")
    assert app.recover() == 1
    t.drain()
    assert run.result(timeout=10) == {"once": 1, "twice": 2}
    assert log.calls == ["once", "twice"]


@pytest.mark.behaviour("SD-25")
def test_recover_finds_runs_without_jobs(app: Durable, facts: Facts, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: 1))
    lost, kept = app.start("w"), app.start("w")
    facts.execute("delete from durable.procrastinate_jobs where args ->> 'run_id' = %s", str(lost.id))
    assert app.recover() == 1
    assert app.recover() == 0, "a run that has a job needs no other"
    assert len(facts.jobs()) == 2
    t.drain()
    assert lost.status().status == kept.status().status == "completed"


def test_a_key_is_used_once(app: Durable, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: 1))
    app.register(define("other").step("a", lambda ctx: 1))
    run = app.start("w", {"n": 1}, key="k")
    assert app.start("w", {"n": 1}, key="k") == run
    assert app.start("other", {"n": 1}, key="k") != run
    t.drain()
    assert app.start("w", {"n": 1}, key="k") == run
    with pytest.raises(RunExists):
        app.start("w", {"n": 2}, key="k")


@pytest.mark.behaviour("SD-22", "SN-34", "SN-35")
def test_what_is_not_known(app: Durable) -> None:
    app.register(define("known"))
    with pytest.raises(WorkflowNotRegistered, match="known"):
        app.start("unknown")
    nobody = uuid.uuid4()
    for ask in (app.status, app.history, app.pause, app.cancel, app.retry, app.result):
        with pytest.raises(RunNotFound):
            ask(nobody)
    with pytest.raises(RunNotFound):
        app.signal(nobody, "go")
    with pytest.raises(RunNotFound):
        app.resume(nobody, "go")


def test_retry_goes_on_at_the_failed_step(app: Durable, t: Harness) -> None:
    log = Log()
    broken = True

    def work(ctx: Ctx) -> int:
        log.calls.append(f"work {ctx.attempt}")
        if broken:
            raise ValueError("broken")
        return 2

    app.register(define("w").step("a", log("a", 1)).step("b", work, retry=Retry(max_attempts=2)))
    run = app.start("w")
    t.drain()
    t.skip(minutes=1)
    t.drain()
    assert run.status().status == "failed"
    broken = False
    assert run.retry().id == run.id
    t.drain()
    assert run.result(timeout=10) == {"a": 1, "b": 2}
    assert log.calls == ["a", "work 1", "work 2", "work 1"]
    assert run.status().retries == 1
    with pytest.raises(RetryRefused):
        run.retry()


def test_retry_of_branches_keeps_those_that_succeeded(app: Durable, t: Harness) -> None:
    log = Log()
    broken = True

    def work(ctx: Ctx) -> int:
        if broken:
            raise ValueError("broken")
        return 2

    app.register(define("w").parallel("p", {"good": log("good", 1), "bad": branch(work, retry=1)}))
    run = app.start("w")
    t.drain()
    assert run.status().status == "failed"
    broken = False
    run.retry()
    t.drain()
    assert run.result(timeout=10) == {"p": {"good": 1, "bad": 2}}
    assert log.calls == ["good"]


def test_retry_of_a_failed_child_starts_another_one(app: Durable, t: Harness) -> None:
    broken = True

    def work(ctx: Ctx) -> int:
        if broken:
            raise NonRetryable("broken")
        return 2

    app.register(define("child").step("a", work))
    app.register(define("parent").child_workflow("sub", "child"))
    run = app.start("parent")
    t.drain()
    assert run.status().status == "failed"
    broken = False
    run.retry()
    t.drain()
    assert run.result(timeout=10) == {"sub": {"a": 2}}
    assert {child.status for child in run.status().children} == {"failed", "completed"}


def test_retry_of_a_rolled_back_run_is_refused(app: Durable, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: 1, compensate=lambda ctx: None).step("b", boom, retry=1))
    run = app.start("w")
    t.drain()
    with pytest.raises(RetryRefused, match="undone"):
        run.retry()


# ---------------------------------------------------------------- crashes, told by the harness


@pytest.mark.parametrize("steps", range(1, 13))
def test_a_crash_after_any_step_leaves_no_gap(app: Durable, facts: Facts, t: Harness, steps: int) -> None:
    """What was executing is run again; what was journaled is not, and is undone once."""
    log = Log()
    app.register(
        define("w")
        .step("a", log("a"), compensate=log("undo a"))
        .parallel("p", {"x": log("x"), "y": log("y")}, compensate=log("undo p"))
        .route("r", lambda ctx: "one", {"one": branch(log("r"), compensate=log("undo r"))})
        .loop("l", log("l"), max_iterations=2, compensate=log("undo l"))
        .sleep("s", 0)
        .step("z", boom, retry=1)
    )
    run = app.start("w")
    assert t.drain(max_steps=steps) == steps
    before = log.calls.copy()
    t.drain()
    assert run.status().status == "failed"
    journal = facts.journal(run)
    assert sorted(journal[:10]) == sorted(["a", "p/x", "p/y", "p", "choice:r", "r/one", "r", "l[0]", "l[1]", "l"])
    assert journal[10:12] == ["s", "z"]
    undone = [f"undo:{step}" for step in reversed(journal) if step in ("a", "p/x", "p/y", "r/one", "l[0]", "l[1]")]
    assert journal[12:] == undone
    assert log.calls[:2] == ["a", "x"]
    assert [call for call in log.calls if call not in ("x", "y")] == [
        *("a", "r", "l", "l"),
        *("undo l", "undo l", "undo r", "undo p", "undo p", "undo a"),
    ]
    assert [attempt[1:] for attempt in facts.attempts(run)] in ([], [("interrupted", 1)])
    assert log.calls[: len(before)] == before


def test_the_harness_says_how_many_steps_were_journaled(app: Durable, t: Harness) -> None:
    app.register(define("w").step("a", lambda ctx: 1).step("b", lambda ctx: 2).step("c", lambda ctx: 3))
    run = app.start("w")
    assert t.drain(max_steps=2) == 2
    assert run.status().cursor == 2
    assert t.drain() == 1
    assert t.drain() == 0


def test_start_and_signal_live_and_die_with_a_transaction(app: Durable, dsn: str, facts: Facts, t: Harness) -> None:
    app.register(define("w").wait_for_signal("s", "go"))
    with psycopg.connect(dsn) as connection:
        run = app.start("w", connection=connection)
        app.signal(run.id, "go", 1, connection=connection)
        assert facts.jobs() == []
        connection.rollback()
        with pytest.raises(RunNotFound):
            run.status()
        run = app.start("w", connection=connection)
        app.signal(run.id, "go", 1, connection=connection)
        connection.commit()
    t.drain()
    assert run.result(timeout=10) == {"s": 1}


# ---------------------------------------------------------------- one with another


def test_a_result_that_cannot_be_computed_fails_the_run(app: Durable, t: Harness) -> None:
    log = Log()

    def bad(ctx: Ctx) -> None:
        raise NonRetryable("no result")

    app.register(define("w", result=bad).step("a", log("a"), compensate=log("undo a")))
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match="no result"):
        run.result(timeout=10)
    assert log.calls == ["a", "undo a"]


def test_a_loop_whose_condition_raises_fails(app: Durable, t: Harness) -> None:
    def until(result: Any, iteration: int) -> bool:
        raise NonRetryable("cannot say")

    app.register(define("w").loop("l", lambda ctx: 1, until=until))
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match="cannot say"):
        run.result(timeout=10)


def test_the_branch_of_a_route_suspends(app: Durable, t: Harness) -> None:
    def ask(ctx: Ctx) -> Any:
        return Suspend("?") if ctx.resume_data is None else ctx.resume_data

    app.register(define("w").route("r", lambda ctx: "one", {"one": ask}))
    run = app.start("w")
    t.drain()
    assert run.status().waiting_name == "r/one"
    assert run.resume("r/one", 3).accepted
    t.drain()
    assert run.result(timeout=10) == {"r": {"branch": "one", "value": 3}}


def test_an_iteration_that_suspends_is_told_that_it_cannot(app: Durable, t: Harness) -> None:
    app.register(define("w").loop("l", lambda ctx: Suspend("?"), max_iterations=2))
    run = app.start("w")
    t.drain()
    with pytest.raises(RunFailed, match="can't suspend"):
        run.result(timeout=10)


def test_one_branch_asks_while_another_waits_for_its_next_attempt(app: Durable, t: Harness) -> None:
    def ask(ctx: Ctx) -> Any:
        return Suspend("?") if ctx.resume_data is None else ctx.resume_data

    def flaky(ctx: Ctx) -> int:
        if ctx.attempt == 1:
            raise ValueError("no")
        return ctx.attempt

    app.register(define("w").parallel("p", {"ask": ask, "flaky": flaky}))
    first, second = app.start("w"), app.start("w")
    t.drain()
    assert first.resume("p/ask", "early").accepted
    t.drain()
    t.skip(minutes=2)
    t.drain()
    assert first.result(timeout=10) == {"p": {"ask": "early", "flaky": 2}}
    assert second.resume("p/ask", "late").accepted
    t.drain()
    assert second.result(timeout=10) == {"p": {"ask": "late", "flaky": 2}}


def test_a_branch_that_ran_out_of_attempts_waits_for_a_person(app: Durable, t: Harness) -> None:
    broken = True
    log = Log()

    def work(ctx: Ctx) -> int:
        if broken:
            raise ValueError("not yet")
        return 2

    pausing = branch(work, retry=Retry(max_attempts=1, on_exhausted="pause"))
    app.register(define("w").parallel("p", {"good": log("good", 1), "bad": pausing}))
    run = app.start("w")
    t.drain()
    assert run.status().status == "paused"
    broken = False
    assert run.resume()
    t.drain()
    assert run.result(timeout=10) == {"p": {"good": 1, "bad": 2}}
    assert log.calls == ["good"]


def test_a_deadline_passes_while_a_branch_waits(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(
        define("w").parallel("p", {"ask": lambda ctx: Suspend(), "done": branch(log("done"), compensate=log("undo"))})
    )
    run = app.start("w", timeout=60)
    t.drain()
    t.skip(minutes=2)
    t.drain()
    status = run.status()
    assert status.status == "failed"
    assert status.error is not None
    assert status.error.kind == "timeout"
    assert log.calls == ["done", "undo"]


def test_a_child_ends_while_its_parent_is_paused(app: Durable, t: Harness) -> None:
    app.register(define("child").step("a", lambda ctx: 1))
    app.register(define("parent").child_workflow("sub", "child"))
    run = app.start("parent")
    assert run.pause()
    t.drain()
    assert run.status().status == "paused"
    assert run.resume()
    t.drain()
    assert run.result(timeout=10) == {"sub": {"a": 1}}


def test_cancel_with_compensation_rolls_back_descendants_first(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("child").step("x", log("x"), compensate=log("undo x")).wait_for_signal("s", "go"))
    app.register(define("parent").step("a", log("a"), compensate=log("undo a")).child_workflow("sub", "child"))
    run = app.start("parent")
    t.drain()
    assert run.cancel(compensate=True)
    t.drain()
    assert log.calls == ["a", "x", "undo x", "undo a"]
    status = run.status()
    assert status.status == "canceled"
    assert status.children[0].status == "canceled"


def test_a_child_that_fails_is_undone_by_itself_before_its_parent(app: Durable, t: Harness) -> None:
    log = Log()
    app.register(define("child").step("x", log("x"), compensate=log("undo x")).step("y", boom, retry=1))
    app.register(define("parent").step("a", log("a"), compensate=log("undo a")).child_workflow("sub", "child"))
    run = app.start("parent")
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["a", "x", "undo x", "undo a"]


def test_a_timeout_can_be_retried(app: Durable, t: Harness) -> None:
    async def work(ctx: Ctx) -> int:
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return ctx.attempt

    app.register(define("w").step("a", work, timeout=0.05, retry=Retry(retry_on_timeout=True)))
    run = app.start("w")
    t.drain()
    assert run.status().derived == "retrying"
    t.skip(minutes=1)
    t.drain()
    assert run.result(timeout=10) == {"a": 2}


def test_a_handler_starts_and_asks_other_runs(app: Durable, t: Harness) -> None:
    def work(ctx: Ctx) -> str:
        other = ctx.app.start("other", key=ctx.idempotency_key)
        ctx.app.signal(other.id, "go", 7)
        return str(other.id)

    app.register(define("other").wait_for_signal("s", "go"))
    app.register(define("w").step("a", work))
    run = app.start("w")
    t.drain()
    assert app.get(run.result(timeout=10)["a"]).result(timeout=10) == {"s": 7}


def test_a_crash_in_a_compensators_wait(app: Durable, t: Harness) -> None:
    log = Log()

    def undo(ctx: Ctx) -> None:
        log.calls.append(f"undo {ctx.attempt}")
        if ctx.attempt == 1:
            raise ValueError("no")

    app.register(
        define("w")
        .step("a", log("a"), compensate=log("undo a"))
        .step("b", log("b"), compensate=undo)
        .step("c", boom, retry=1)
    )
    run = app.start("w")
    t.drain()
    status = run.status()
    assert (status.status, status.waiting_for, status.waiting_name) == ("compensating", "retry", "undo:b")
    t.skip(minutes=1)
    t.drain(max_steps=1)
    assert log.calls == ["a", "b", "undo 1", "undo 2"]
    t.drain()
    assert run.status().status == "failed"
    assert log.calls == ["a", "b", "undo 1", "undo 2", "undo a"]
