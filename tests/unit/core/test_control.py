"""Cancel, pause, resume and retry, in every status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.core.model import Sim, World, calls, once

from durable import errors
from durable.core import control
from durable.core.state import Message, MessageKind
from durable.define.builder import define
from durable.define.options import branch
from durable.define.retry import Retry
from durable.values import Status, Suspend, WaitingFor

BOOM = errors.NonRetryable("boom")
ASKED = [MessageKind.CANCEL, MessageKind.PAUSE, MessageKind.RESUME]


def in_status(status: Status) -> Sim:
    """A run in each status, with something done that could be undone."""
    undo = once(ValueError("busy"), None)
    flow = define("w").step("a", once(1), compensate=undo).wait_for_signal("w", "go").step("b", once(BOOM, 2))
    world = World(flow)
    run = world.start(flow)
    match status:
        case Status.PENDING:
            return run
        case Status.RUNNING:
            world.drain(jobs=1)
            return run
    world.drain()
    match status:
        case Status.PAUSED:
            run.pause()
        case Status.CANCELED:
            run.cancel()
        case Status.COMPENSATING:
            run.signal("go")
            world.drain()
        case Status.FAILED:
            run.signal("go")
            world.drive()
        case Status.COMPLETED:
            run.signal("go")
            plain = define("c").step("a", once(1))
            world.registry.add(plain)
            run = world.start(plain)
            world.drain()
    assert run.status is status
    return run


@pytest.mark.parametrize("status", list(Status))
def test_cancel_in_every_status(status: Status) -> None:
    run = in_status(status)
    assert run.cancel("why") is (not status.ended)
    if status.ended:
        assert run.status is status
        return
    run.world.drive()
    assert run.has(Status.CANCELED)
    assert run.run.reason == "why"
    assert not run.cancel(), "twice"


@pytest.mark.parametrize("status", [s for s in Status if not s.ended])
def test_cancel_with_compensation_in_every_status(status: Status) -> None:
    run = in_status(status)
    assert run.cancel("why", compensate=True)
    run.world.drive()
    assert run.has(Status.CANCELED)
    assert run.undone() == ([] if status is Status.PENDING else ["a"])
    assert run.run.error is None or status is Status.COMPENSATING


@pytest.mark.parametrize("status", list(Status))
def test_pause_and_resume_in_every_status(status: Status) -> None:
    run = in_status(status)
    works = status in (Status.PENDING, Status.RUNNING, Status.SUSPENDED)
    assert run.resume() is (status is Status.PAUSED)
    if status is Status.PAUSED:
        run.world.drain()
        assert run.waits() == (WaitingFor.SIGNAL, "go")
        return
    assert run.pause() is works
    if not works:
        assert run.status is status
        return
    assert run.has(Status.PAUSED)
    assert not run.pause(), "twice"
    run.world.drain()
    run.signal("go")
    run.world.drain()
    assert run.has(Status.PAUSED), "messages wait in the inbox"
    assert len(run.inbox) == 1
    assert run.resume()
    assert not run.resume()
    run.world.drain()
    assert run.value("w") is None


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("kind", ASKED)
def test_a_request_by_message_does_what_it_does_directly(status: Status, kind: MessageKind) -> None:
    run = in_status(status)
    takes = control.takes_effect(run.run, kind)
    before = run.run
    run.inbox.append(Message(9_999, kind, None, None, run.world.now))
    run.world._take_further(run)
    assert run.taken == {**run.taken, 9_999: None}
    assert run.run.revision == before.revision + 1
    unchanged = run.run.status is before.status and run.waits() == (before.waiting_for, before.waiting_name)
    assert takes is not unchanged or kind is MessageKind.CANCEL
    run.world.drain()


@pytest.mark.parametrize(
    "asked",
    [("pause", "resume"), ("pause", "cancel"), ("resume", "pause"), ("pause", "pause", "resume"), ("resume", "signal")],
)
def test_requests_that_come_together_are_all_heard(asked: tuple[str, ...]) -> None:
    """The write that applies the first marks all as seen, and their doorbells then find nothing new."""
    flow = define("w").wait_for_signal("w", "go").sleep("nap", 60)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    run.busy = True
    for what in asked:
        run.signal("go", 1) if what == "signal" else getattr(run, what)()
    run.busy = False
    world.drain()
    expected = {"resume": Status.SUSPENDED, "cancel": Status.CANCELED, "pause": Status.PAUSED}
    assert run.has(expected.get(asked[-1], Status.SUSPENDED))
    assert ("w" in run.journal) is (asked[-1] == "signal")
    assert [m for m in run.inbox if m.kind is not MessageKind.SIGNAL] == []


def during(ask: Callable[[Sim], Any], outcome: Any = 1, *, detached: bool, **more: Any) -> Sim:
    """A run whose last step is asked something of while it runs."""

    def work(ctx: Any) -> Any:
        if not asked:
            asked.append(ask(run))
        if isinstance(outcome, Exception) and ctx.attempt == 1:
            raise outcome
        return ctx.resume_data or (1 if isinstance(outcome, Exception) else outcome)

    asked: list[Any] = []
    flow = define("w").step("a", once(1), compensate=once(None))
    flow.step("b", work, transactional=False if detached else None, compensate=once(None))
    world = World(flow, **more)
    run = world.start(flow)
    world.drain()
    assert asked == [True]
    return run


@pytest.mark.parametrize("detached", [False, True])
def test_a_pause_during_the_last_step_ends_paused_and_is_completed_on_resume(detached: bool) -> None:
    run = during(lambda run: run.pause(), detached=detached)
    assert run.has(Status.PAUSED)
    assert run.keys() == ["a", "b"]
    assert run.run.claim is None
    run.resume()
    run.world.drain()
    assert run.result == {"a": 1, "b": 1}


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize(
    ("outcome", "waits"), [(ValueError("again"), WaitingFor.RETRY), (Suspend(), WaitingFor.RESUME)]
)
def test_a_pause_acts_at_once_when_the_step_parks(outcome: Any, waits: WaitingFor, detached: bool) -> None:
    run = during(lambda run: run.pause(), outcome, detached=detached)
    assert run.has(Status.PAUSED)
    assert run.waits() == (waits, "b"), "what it waited for stays written"
    run.resume()
    run.world.drain()
    assert run.has(Status.SUSPENDED)
    assert run.waits() == (waits, "b")
    run.resume("b", 5)
    run.world.drive()
    assert run.result["b"] == (5 if waits is WaitingFor.RESUME else 1)


@pytest.mark.parametrize("detached", [False, True])
def test_a_pause_that_is_taken_back_during_the_step_leaves_no_trace(detached: bool) -> None:
    run = during(lambda run: run.pause() and run.resume(), detached=detached)
    assert run.result == {"a": 1, "b": 1}


@pytest.mark.parametrize("interrupts", [False, True])
@pytest.mark.parametrize(
    "outcome", [1, ValueError("again"), BOOM, Suspend()], ids=["done", "retry", "failed", "parked"]
)
def test_cancel_with_compensation_awaits_the_handler_and_then_rolls_back(outcome: Any, interrupts: bool) -> None:
    run = during(lambda run: run.cancel("why", compensate=True), outcome, detached=True, interrupts=interrupts)
    assert run.has(Status.CANCELED), "at once, whatever the step came to"
    assert run.run.reason == "why"
    assert run.run.error is None
    assert run.undone() == (["b", "a"] if outcome == 1 else ["a"]), "what arrives meanwhile is journaled and undone"


def test_cancel_interrupts_an_async_handler_that_is_still_to_run_and_undoes_the_rest() -> None:
    def ask(ctx: Any) -> int:
        run.cancel("why", compensate=True)
        return 1

    undo, never = once(None), once(2)
    branches = {"a": branch(ask, compensate=undo), "b": branch(never, compensate=undo)}
    flow = define("w").parallel("p", branches)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.CANCELED)
    assert run.undone() == ["p/a"]
    assert calls(never) == 0
    assert [(record.step_id, record.kind) for record in run.attempts] == [("p/b", "interrupted")]


def test_cancel_with_compensation_and_nothing_to_undo_just_ends() -> None:
    def ask(ctx: Any) -> int:
        run.cancel("why", compensate=True)
        raise BOOM

    for retries in (1, 2):
        flow = define("w").step("a", ask, transactional=False, retry=retries)
        world = World(flow, interrupts=False)
        run = world.start(flow)
        world.drain()
        assert run.statuses[-2:] == ["running", "canceled"]


def test_cancel_with_compensation_of_an_interrupted_first_step_just_ends() -> None:
    def ask(ctx: Any) -> int:
        run.cancel("why", compensate=True)
        return 1

    flow = define("w").parallel("p", {"a": ask, "b": once(2)})
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.statuses == ["pending", "running", "canceled"]
    assert run.keys() == ["p/a"]


@pytest.mark.parametrize("detached", [False, True])
def test_cancel_without_compensation_discards_what_the_handler_brings(detached: bool) -> None:
    run = during(lambda run: run.cancel(), detached=detached)
    assert run.has(Status.CANCELED)
    assert run.keys() == (["a"] if detached else ["a", "b"])
    assert run.undone() == []


def test_a_second_cancel_ends_a_run_that_waits_for_its_handlers_at_once() -> None:
    run = during(
        lambda run: run.cancel("soft", compensate=True) and run.cancel("hard"), detached=True, interrupts=False
    )
    assert run.has(Status.CANCELED)
    assert (run.run.reason, run.undone()) == ("hard", [])


def test_a_request_that_comes_while_another_waits_in_the_inbox_queues_behind_it() -> None:
    run = in_status(Status.SUSPENDED)
    run.busy = True
    run.pause()
    run.busy = False
    assert run.resume()
    assert [message.kind for message in run.inbox] == [MessageKind.PAUSE, MessageKind.RESUME]
    run.world.drain()
    assert run.statuses[-2:] == ["paused", "suspended"]


def test_a_deadline_that_passes_in_a_pause_acts_on_resume() -> None:
    flow = define("w").step("a", once(1)).wait_for_signal("w", "go")
    world = World(flow)
    run = world.start(flow, timeout=60)
    world.drain()
    run.pause()
    world.skip(100)
    assert run.has(Status.PAUSED)
    run.resume()
    world.drain()
    assert run.has(Status.FAILED)
    assert "deadline" in run.error


def test_a_delayed_start_can_be_paused_resumed_and_canceled() -> None:
    flow = define("w").step("a", once(1))
    world = World(flow)
    run, other = world.start(flow, delay=60), world.start(flow, delay=60)
    run.pause()
    run.resume()
    world.drain()
    assert run.waits() == (WaitingFor.START, None)
    assert other.cancel()
    assert other.run.started_at is None
    world.skip(60)
    assert run.result == {"a": 1}


def test_a_pause_while_branches_run_lets_them_end_and_keeps_their_waits() -> None:
    def ask(ctx: Any) -> int:
        run.pause()
        return 1

    flaky = branch(once(ValueError(), 2), retry=Retry(jitter=False))
    flow = define("w").parallel("p", {"flaky": flaky, "ask": ask})
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.PAUSED)
    assert run.keys() == ["p/ask"]
    run.resume()
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "p/flaky")
    world.drive()
    assert run.result == {"p": {"flaky": 2, "ask": 1}}


# ---------------------------------------------------------------- retry


@pytest.mark.parametrize("status", list(Status))
def test_retry_is_for_failed_runs_that_nothing_was_undone_of(status: Status) -> None:
    run = in_status(status)
    assert run.retry() == ("undone" if status is Status.FAILED else "refused")
    assert run.status is status


def test_retry_goes_on_at_the_failed_step_with_fresh_attempts() -> None:
    first, work = once(1), once(ValueError("a"), ValueError("b"), ValueError("c"), 4)
    flow = define("w").step("a", first).step("b", work, retry=2)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    assert run.retry() == "accepted"
    assert (run.run.retries, run.run.error, run.run.finished_at) == (1, None, None)
    assert run.transitions[-1].forget == ("b",)
    world.drive()
    assert run.result == {"a": 1, "b": 4}
    assert (calls(first), calls(work)) == (1, 4)
    assert run.journal["b"].attempt == 2
    assert run.retry() == "refused"


def test_retry_keeps_the_branches_that_were_done() -> None:
    done, bad = once(1), once(BOOM, 2)
    flow = define("w").parallel("p", {"done": done, "bad": bad})
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.retry() == "accepted"
    assert set(run.transitions[-1].forget) == {"p/bad", "p"}
    world.drain()
    assert run.result == {"p": {"done": 1, "bad": 2}}
    assert calls(done) == 1


def test_retry_keeps_a_deadline_that_is_still_to_come() -> None:
    flow = define("w").step("a", once(BOOM, 1)).sleep("nap", 100)
    world = World(flow)
    run = world.start(flow, timeout=50)
    world.drain()
    run.retry()
    world.drain()
    assert run.rest().total_seconds() == 50


def test_retry_forgets_what_was_asked_of_the_run_before_it_failed() -> None:
    def work(ctx: Any) -> int:
        if not asked:
            asked.append(run.pause())
            raise BOOM
        return 1

    asked: list[bool] = []
    flow = define("w").step("a", work)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.FAILED)
    assert run.retry() == "accepted"
    world.drain()
    assert run.result == {"a": 1}


def test_a_rollback_takes_effect_on_completed_runs_only() -> None:
    taking = [status for status in Status if control.takes_effect(in_status(status).run, MessageKind.ROLLBACK)]
    assert taking == [Status.COMPLETED]


def test_other_messages_are_no_requests() -> None:
    run = in_status(Status.SUSPENDED)
    with pytest.raises(AssertionError, match="is not a request"):
        control.apply(run.view, Message(1, MessageKind.SIGNAL, "x", None, run.world.now), run.world.now)


def test_a_request_that_crosses_the_end_is_taken_and_does_not_hide_a_rollback() -> None:
    undo = once(None)
    child = define("kid").step("x", once(1), compensate=undo)
    parent = define("parent").child_workflow("sub", "kid", compensate=True).wait_for_signal("w", "go")
    world = World(parent, child)
    run = world.start(parent)
    world.drain()
    kid = world.child(run, "sub")
    world.seq += 1
    kid.inbox.append(Message(world.seq, MessageKind.CANCEL, None, None, world.now))
    run.cancel(compensate=True)
    world.drain()
    assert kid.has(Status.CANCELED)
    assert calls(undo) == 1
    assert run.undone() == ["sub"]
