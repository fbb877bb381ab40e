"""Steps one after the other, their retries and limits, and how a run completes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.core.model import START, World, calls, once

from durable import errors
from durable.core.state import MessageKind
from durable.define.builder import define
from durable.define.retry import Retry
from durable.values import Status, Suspend, WaitingFor

PLAIN = Retry(max_attempts=3, jitter=False)


@pytest.mark.behaviour("SD-07", "SW-01")
def test_steps_run_in_order_and_see_earlier_results() -> None:
    flow = (
        define("chain")
        .step("one", lambda ctx: 1)
        .step("two", lambda ctx: ctx.results["one"] + 1)
        .step("three", lambda ctx: ctx.results["two"] + 1)
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.result == {"one": 1, "two": 2, "three": 3}
    assert run.statuses == ["pending", "running", "completed"]
    assert run.keys() == ["one", "two", "three"]
    assert (run.run.started_at, run.run.finished_at, run.run.current_step) == (START, START, 3)


def test_a_result_function_is_called_once_all_nodes_are_done() -> None:
    answer = once(ValueError("not yet"), lambda ctx: {"sum": ctx.results["a"] + ctx.results["b"]})
    flow = define("sum", result=answer).step("a", lambda ctx: 1).step("b", lambda ctx: 2)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.result == {"sum": 3}
    assert run.keys() == ["a", "b", "run:result"]


def test_a_result_function_that_fails_fails_the_run_and_is_called_anew_on_retry() -> None:
    undo = once(None)
    answer = once(errors.NonRetryable("no sum"), 5)
    flow = define("sum", result=answer).step("a", lambda ctx: 1)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    assert run.error == "NonRetryable: no sum"
    assert run.retry() == "accepted"
    world.drive()
    assert run.result == 5
    assert calls(undo) == 0


@pytest.mark.parametrize("what", ["pause", "cancel"])
def test_what_is_asked_while_the_result_is_computed_is_not_overlooked(what: str) -> None:
    def answer(ctx: Any) -> int:
        getattr(run, what)()
        return 1

    flow = define("sum", result=answer).step("a", lambda ctx: 1)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    if what == "cancel":
        assert run.has(Status.CANCELED)
        return
    assert run.has(Status.PAUSED)
    assert run.resume()
    world.drain()
    assert run.result == 1


@pytest.mark.behaviour("SD-15")
def test_a_flaky_step_is_tried_again_after_a_growing_delay() -> None:
    seen: list[int] = []

    def flaky(ctx: Any) -> str:
        seen.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt}")
        return "done"

    flow = define("flaky").step("a", once(1), compensate=once(None)).step("b", flaky, retry=PLAIN)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.SUSPENDED)
    assert run.waits() == (WaitingFor.RETRY, "b")
    assert run.rest().total_seconds() == 1
    world.skip(0.5)
    assert seen == [1], "no attempt before its time"
    world.skip(0.5)
    assert run.rest().total_seconds() == 2
    world.skip(2)
    assert run.result == {"a": 1, "b": "done"}
    assert seen == [1, 2, 3]
    assert run.journal["b"].attempt == 3
    assert [(record.attempt, record.kind) for record in run.attempts] == [(1, "failed"), (2, "failed")]
    assert run.undone() == []


@pytest.mark.behaviour("SN-31", "SW-02")
def test_a_step_that_used_up_its_attempts_fails_with_the_last_error() -> None:
    work = once(ValueError("first"), ValueError("second"))
    flow = define("fails").step("a", work, retry=2).step("b", once(1))
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    assert calls(work) == 2
    assert run.run.error is not None
    assert (run.run.error.kind, run.run.error.attempts, run.run.error.step) == ("exhausted", 2, "a")
    assert run.error.endswith("second")
    assert run.keys("failed") == ["a"]
    assert run.run.current_step == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [(errors.NonRetryable("no"), "critical"), (KeyError("k"), "error"), (SystemExit(3), "critical")],
)
def test_errors_that_are_not_retried(error: BaseException, kind: str) -> None:
    flow = define("fails").step("a", once(error), retry=Retry(give_up_on=(KeyError,)))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.FAILED)
    assert run.run.error is not None
    assert run.run.error.kind == kind
    assert run.attempts == []


def test_a_backoff_function_says_the_delay_and_a_wrong_one_fails_the_step() -> None:
    flow = define("own").step("a", once(ValueError(), 1), retry=Retry(backoff=lambda n: 7.5 * n))
    wrong = define("wrong").step("a", once(ValueError()), retry=Retry(backoff=lambda n: -1))
    world = World(flow, wrong)
    run, other = world.start(flow), world.start(wrong)
    world.drain()
    assert run.rest().total_seconds() == 7.5
    assert other.status is Status.FAILED


def test_jitter_comes_from_the_chance_that_the_engine_gives() -> None:
    for chance, seconds in ((0.0, 4.0), (0.5, 6.0)):
        flow = define("jitter").step("a", once(ValueError(), 1), retry=Retry(initial=8))
        world = World(flow, chance=chance)
        run = world.start(flow)
        world.drain()
        assert run.rest().total_seconds() == seconds
        world.drive()


@pytest.mark.parametrize(("retry", "tried"), [(Retry(), 1), (Retry(retry_on_timeout=True), 2)])
def test_a_timeout_is_final_unless_it_may_be_retried(retry: Retry, tried: int) -> None:
    def slow(ctx: Any) -> int:
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            world.now += limit + timedelta(milliseconds=1)
        return 1

    limit = timedelta(seconds=5)
    attempts: list[int] = []
    flow = define("slow").step("a", slow, timeout=5, retry=retry)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert len(attempts) == tried
    assert run.status is (Status.COMPLETED if tried == 2 else Status.FAILED)
    if tried == 1:
        assert run.run.error is not None
        assert run.run.error.kind == "timeout"


def test_out_of_attempts_a_run_can_pause_for_a_person_and_goes_on_with_fresh_ones() -> None:
    work = once(ValueError("a"), ValueError("b"), ValueError("c"), 9)
    flow = define("careful").step("a", work, retry=Retry(max_attempts=2, on_exhausted="pause"))
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.PAUSED)
    assert run.error == "ValueError: b"
    assert run.run.claim is None
    assert run.keys("failed") == []
    assert run.resume()
    assert run.run.error is None
    world.drive()
    assert run.result == {"a": 9}
    assert calls(work) == 4
    assert [record.attempt for record in run.attempts] == [1, 2, 1]


def test_a_step_that_suspended_keeps_what_it_was_resumed_with_over_such_a_pause() -> None:
    def review(ctx: Any) -> Any:
        if ctx.snapshot is None:
            return Suspend({"ask": 1})
        if not fixed:
            raise ValueError("down")
        return [ctx.snapshot, ctx.resume_data, ctx.attempt]

    fixed: list[int] = []
    flow = define("careful").step("a", review, retry=Retry(max_attempts=1, on_exhausted="pause"))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.resume("a", "yes")
    world.drain()
    assert run.has(Status.PAUSED)
    fixed.append(1)
    run.resume()
    world.drain()
    assert run.result == {"a": [{"ask": 1}, "yes", 1]}


@pytest.mark.parametrize("transactional", [None, False])
def test_suspend_parks_on_the_steps_name_and_reentry_is_no_new_attempt(transactional: bool | None) -> None:
    seen: list[Any] = []

    def review(ctx: Any) -> Any:
        seen.append((ctx.attempt, ctx.snapshot, ctx.resume_data))
        return Suspend({"round": len(seen)}) if len(seen) < 3 else "ok"

    flow = define("review").step("review", review, transactional=transactional).step("next", once(1))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.SUSPENDED)
    assert run.waits() == (WaitingFor.RESUME, "review")
    assert run.run.wake_at is None
    assert run.journal["review"].status == "suspended"
    assert run.value("review") == {"round": 1}
    assert not run.resume("other", 1)
    assert run.resume("review", "first")
    assert not run.resume("review", "twice before it was read")
    world.drain()
    assert run.value("review") == {"round": 2}
    assert run.resume("review")
    world.drain()
    assert run.result == {"review": "ok", "next": 1}
    assert seen == [(1, None, None), (1, {"round": 1}, "first"), (1, {"round": 2}, None)]
    assert not run.resume("review", 1)


def test_a_resumed_step_that_fails_is_retried_with_its_resume_data() -> None:
    seen: list[Any] = []

    def review(ctx: Any) -> Any:
        seen.append((ctx.attempt, ctx.resume_data))
        if len(seen) == 1:
            return Suspend()
        if len(seen) == 2:
            raise ValueError
        return ctx.resume_data

    flow = define("review").step("review", review)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    run.resume("review", {"ok": True})
    world.drive()
    assert seen == [(1, None), (1, {"ok": True}), (2, {"ok": True})]
    assert run.result == {"review": {"ok": True}}


def test_a_message_that_came_before_the_step_suspended_resumes_it() -> None:
    flow = define("early").step("a", once(1)).step("review", once(Suspend(), lambda ctx: ctx.resume_data))
    world = World(flow)
    run = world.start(flow)
    assert run.signal("review", "early")
    world.drain()
    assert run.result == {"a": 1, "review": "early"}


def test_a_message_that_comes_while_the_step_runs_resumes_it() -> None:
    def ask(ctx: Any) -> Any:
        run.signal("review", "meanwhile")
        return Suspend()

    flow = define("early").step("review", once(ask, lambda ctx: ctx.resume_data))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.result == {"review": "meanwhile"}


@pytest.mark.parametrize("timeout", [5, 0])
def test_a_run_out_of_time_fails_at_once_or_at_its_next_look(timeout: float) -> None:
    flow = define("slow").sleep("nap", 60).step("b", once(1))
    world = World(flow)
    run = world.start(flow, timeout=timeout)
    world.drain()
    if timeout:
        assert run.rest().total_seconds() == timeout, "it is woken at its deadline"
        world.skip(timeout)
    assert run.has(Status.FAILED)
    assert run.run.error is not None
    assert run.run.error.kind == "timeout"
    assert "deadline" in run.error


def test_the_deadline_limits_an_attempt_too_and_rolls_back() -> None:
    def slow(ctx: Any) -> int:
        world.now += timedelta(seconds=11)
        return 1

    undo = once(ValueError("busy"), None)
    flow = define("slow").step("a", once(1), compensate=undo).step("b", slow, retry=Retry(retry_on_timeout=True))
    world = World(flow)
    run = world.start(flow, timeout=10)
    world.drain()
    assert run.has(Status.COMPENSATING)
    world.drive()
    assert run.has(Status.FAILED)
    assert run.undone() == ["a"]
    assert run.journal["undo:a"].status == "completed", "the deadline does not limit the rollback"
    assert calls(undo) == 2


def test_after_the_deadline_a_suspended_step_begins_anew_on_retry() -> None:
    def review(ctx: Any) -> Any:
        return Suspend("asked") if ctx.snapshot is None else [ctx.snapshot, ctx.resume_data]

    flow = define("slow").step("review", review)
    world = World(flow)
    run = world.start(flow, timeout=10)
    world.drain()
    assert run.waits() == (WaitingFor.RESUME, "review")
    world.skip(10)
    assert run.has(Status.FAILED)
    assert run.retry() == "accepted"
    assert run.run.deadline is None, "a deadline that has passed does not end it again"
    world.drain()
    assert run.waits() == (WaitingFor.RESUME, "review"), "without an answer it must ask again"
    run.resume("review", 1)
    world.drain()
    assert run.result == {"review": ["asked", 1]}


def test_a_delayed_run_waits_for_its_start() -> None:
    flow = define("later").step("a", once(1))
    world = World(flow)
    run = world.start(flow, delay=30, timeout=10)
    world.drain()
    assert (run.status, run.transitions) == (Status.PENDING, [])
    run.signal("x")
    world.skip(29)
    assert run.transitions == []
    world.skip(1)
    assert run.result == {"a": 1}


@pytest.mark.behaviour("SD-09")
def test_redelivery_of_a_continuation_changes_nothing() -> None:
    work = once(1)
    flow = define("twice").step("a", work).sleep("nap", 10)
    world = World(flow)
    run = world.start(flow)
    world.jobs *= 2
    world.drain()
    assert calls(work) == 1
    assert run.keys() == ["a"]
    assert run.run.current_step == 1


@pytest.mark.behaviour("SN-29", "SD-25")
def test_a_lost_job_is_made_up_for_by_the_sweep() -> None:
    first = once("recorded")
    flow = define("lost").step("once", first).step("two", once(2))
    world = World(flow)
    run = world.start(flow)
    world.drain(jobs=1)
    world.jobs.clear()
    world.recover()
    world.drain()
    assert calls(first) == 1
    assert run.result == {"once": "recorded", "two": 2}


def test_what_the_store_can_not_hold_fails_the_step() -> None:
    flow = define("bad").step("a", once(object()))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.FAILED)
    assert "PayloadError" in run.error


def test_messages_that_nobody_waits_for_stay_in_the_inbox() -> None:
    flow = define("deaf").step("a", once(1))
    world = World(flow)
    run = world.start(flow)
    run.signal("x", 1)
    world.drain()
    assert run.has(Status.COMPLETED)
    assert [message.kind for message in run.inbox] == [MessageKind.SIGNAL]
    assert not run.signal("x", 2), "a finished run takes nothing"
