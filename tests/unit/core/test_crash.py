"""Workers that die, and what is charged to whom."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.core.model import START, Crash, Sim, World, calls, once

from durable import errors
from durable.core.crash import claimed, died, postponed
from durable.core.settle import Ended, settle
from durable.core.state import Begun, Claim, MessageKind, Run
from durable.core.transition import Call, Fanout, Interrupted
from durable.define.builder import define
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.values import Status, Suspend, WaitingFor


def killer(times: int, then: Any = "done") -> Any:
    return once(*([Crash()] * times), then)


@pytest.mark.parametrize("transactional", [None, False])
def test_the_first_takeover_is_immediate_and_later_ones_back_off(transactional: bool | None) -> None:
    attempts: list[int] = []
    die = killer(4)

    def work(ctx: Any) -> Any:
        attempts.append(ctx.attempt)
        return die(ctx)

    flow = define("w").step("a", once(1)).step("b", work, transactional=transactional)
    world = World(flow)
    run = world.start(flow)
    waited = []
    world.drain()
    while run.run.wake_at is not None:
        assert run.waits() == (WaitingFor.RETRY, "b")
        waited.append(run.rest().total_seconds())
        world.skip(waited[-1])
    assert run.result == {"a": 1, "b": "done"}
    assert waited == [0.75, 1.5, 3]  # 1, 2 and 4 s with half of the jitter
    assert set(attempts) == {1}, "a crash is no attempt that failed"
    assert [(record.kind, record.attempt) for record in run.attempts] == [("interrupted", 1)] * 4


def test_after_max_crashes_the_step_fails_and_the_run_rolls_back() -> None:
    undo = once(None)
    die = killer(99)
    flow = define("w").step("a", once(1), compensate=undo).step("b", die, retry=7)
    world = World(flow, max_crashes=3)
    run = world.start(flow)
    world.drive()
    assert calls(die) == 3
    assert run.has(Status.FAILED)
    assert run.error.startswith("StepInterrupted: step 'b'")
    assert "interrupted 3 times" in run.error
    assert run.run.error is not None
    assert (run.run.error.kind, run.run.error.attempts) == ("interrupted", 3)
    assert run.undone() == ["a"]


def test_a_retry_of_such_a_run_counts_anew() -> None:
    die = killer(3)
    flow = define("w").step("b", die)
    world = World(flow, max_crashes=2)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    run.retry()
    world.drive()
    assert run.result == {"b": "done"}


def test_an_at_most_once_step_is_never_run_again() -> None:
    die = killer(1)
    flow = define("w").step("a", die, at_most_once=True)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert calls(die) == 1
    assert run.has(Status.FAILED)
    assert "at most once" in run.error


@pytest.mark.parametrize("kind", ["pause", "resume"])
def test_not_even_if_something_was_asked_of_the_run_meanwhile(kind: str) -> None:
    def work(ctx: Any) -> Any:
        ran.append(1)
        getattr(run, kind)()
        if kind == "resume":  # one that has no effect, unread
            run.world.send(run.id, MessageKind(kind), None, None)
        raise Crash

    ran: list[int] = []
    flow = define("w").step("a", work, at_most_once=True)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    if kind == "pause":
        assert run.has(Status.PAUSED)
        run.resume()
        world.drive()
    assert ran == [1]
    assert run.has(Status.FAILED)


def test_an_at_most_once_step_that_the_worker_gave_back_is_not_run_again() -> None:
    for at_most_once in (True, False):
        flow = define("w").step("a", once(1), at_most_once=at_most_once, transactional=False)
        world = World(flow)
        run = world.start(flow)
        call, _ = under_claim(world, run)
        run.apply(settle(run.view, Ended(call, Interrupted("shutdown"), world.now, world.now), world.limits))
        world.drain()
        assert run.has(Status.FAILED if at_most_once else Status.COMPLETED)
        assert len(run.attempts) == 1


def test_a_step_that_is_given_back_under_the_rows_lock_is_tried_again_uncounted() -> None:
    flow = define("w").step("a", lambda ctx: ctx.attempt)
    world = World(flow)
    run = world.start(flow)
    call = world.plan(run.view)
    assert isinstance(call, Call)
    world.jobs.clear()
    run.apply(settle(run.view, Ended(call, Interrupted("shutdown"), world.now, world.now), world.limits))
    world.drain()
    assert run.result == {"a": 1}
    assert [record.kind for record in run.attempts] == ["interrupted"]


def test_an_at_most_once_step_that_raises_is_retried_if_asked_for() -> None:
    flow = define("w").step("a", once(ValueError(), 2), at_most_once=True, retry=2)
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.result == {"a": 2}


def under_claim(world: World, run: Sim) -> tuple[Call, Claim]:
    work = world.plan(run.view)
    assert isinstance(work, Call | Fanout)
    claim = Claim(1, uuid.uuid4())
    run.apply(claimed(run.view, world.now, claim, work.calls), run.view)
    world.jobs.clear()
    return work.calls[0], claim


def test_a_worker_that_dies_before_the_claim_is_charged_with_nothing() -> None:
    for flow in (define("w").step("a", once(1), at_most_once=True), define("v").parallel("p", {"a": once(1)})):
        world = World(flow)
        run = world.start(flow)
        world.crash_at = {2}  # after the lock, before the claim is committed
        world.drain()
        assert world.crashes == 1
        assert run.attempts == []
        assert run.has(Status.COMPLETED)


def test_nor_when_it_was_about_to_claim_a_step_whose_retry_was_due() -> None:
    flow = define("w").step("a", once(ValueError(), 1), transactional=False)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    world.crash_at = {world.points + 2}
    world.skip(1)
    assert world.crashes == 1
    assert run.result == {"a": 1}
    assert [record.kind for record in run.attempts] == ["failed"]


def test_a_crash_is_charged_to_the_branches_that_were_running() -> None:
    def work(ctx: Any) -> int:
        if not died_once:
            died_once.append(1)
            raise Crash
        return 3

    died_once: list[int] = []
    done, waits = once(1), once(ValueError(), 2)
    flaky = branch(waits, retry=Retry(jitter=False))
    branches: dict[str, Any] = {"done": done, "waits": flaky, "dies": work, "last": once(4)}
    flow = define("w").parallel("p", branches)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    interrupted = [record.step_id for record in run.attempts if record.kind == "interrupted"]
    assert interrupted == ["p/dies", "p/last"]
    assert run.keys() == ["p/done", "p/dies", "p/last"]
    world.drive()
    assert run.result == {"p": {"done": 1, "waits": 2, "dies": 3, "last": 4}}
    assert calls(done) == 1


def test_a_branch_that_kills_fails_the_node_when_its_siblings_have_ended() -> None:
    other = once(1)
    flow = define("w").parallel("p", {"other": other, "dies": killer(99)})
    world = World(flow, max_crashes=3, order=lambda flights: len(flights) - 1)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    assert run.error.startswith("JoinFailed: ")
    assert "dies: durable.errors.StepInterrupted" in run.error


def test_an_owner_that_dies_while_nothing_runs_is_charged_with_nothing() -> None:
    flow = define("w").step("a", once(1), transactional=False)
    world = World(flow)
    run = world.start(flow)
    under_claim(world, run)
    run.run = _calm(run)
    transition = died(run.view, world.now, world.limits)
    assert transition is not None
    run.apply(transition)
    world.drain()
    assert run.has(Status.COMPLETED)
    assert run.attempts == []


def _calm(run: Sim) -> Run:
    return replace(run.run, frame={name: replace(begun, running=False) for name, begun in run.run.frame.items()})


def test_a_dead_owner_counts_as_ended_for_a_cancel_that_waits_and_for_a_pause() -> None:
    for ask, status in (("cancel", Status.CANCELED), ("pause", Status.PAUSED)):
        undo = once(None)
        flow = define("w").step("a", once(1), compensate=undo).step("b", once(2), transactional=False)
        world = World(flow)
        run = world.start(flow)
        world.drain(jobs=1)
        under_claim(world, run)
        run.cancel(compensate=True) if ask == "cancel" else run.pause()
        transition = died(run.view, world.now, world.limits)
        assert transition is not None
        run.apply(transition, run.view)
        world.drain()
        assert run.has(status)
        assert run.undone() == (["a"] if ask == "cancel" else [])


def test_a_compensator_that_kills_is_charged_too_and_gives_up() -> None:
    for detached in (False, True):
        die = killer(99)
        undo = step(transactional=False)(die) if detached else die
        flow = define("w").step("z", once(0), compensate=once(None)).step("a", once(1), compensate=undo)
        flow.step("b", once(errors.NonRetryable("boom")))
        world = World(flow, max_crashes=3)
        run = world.start(flow)
        world.drive()
        assert calls(die) == 3
        assert run.has(Status.FAILED)
        assert run.not_undone == ["a"]
        assert run.undone() == ["a", "z"]
        assert run.error == "NonRetryable: boom"


def test_a_crash_between_steps_charges_what_would_run_next_and_parked_runs_nothing() -> None:
    flow = define("w").sleep("nap", 10)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert died(run.view, world.now, world.limits) is None
    world.now = run.run.wake_at or world.now
    transition = died(run.view, world.now, world.limits)
    assert transition is not None
    assert transition.after.status is Status.COMPLETED, "it is taken further at once"


def test_suspects_are_postponed_until_they_can_run_alone_and_their_siblings_go_on() -> None:
    flow = define("w").parallel("p", {"suspect": once(2), "innocent": once(1)})
    world = World(flow)
    run = world.start(flow)
    run.run = replace(run.run, frame={"p/suspect": Begun(crashes=1, since=world.now)})
    work = world.plan(run.view)
    assert isinstance(work, Fanout)
    assert [call.crashes for call in work.calls] == [1, 0]
    run.apply(postponed(run.view, world.now, work, 1.0))
    world.drain()
    assert run.keys() == ["p/innocent"]
    assert run.waits() == (WaitingFor.RETRY, "p/suspect")
    world.skip(1)
    assert run.result == {"p": {"suspect": 2, "innocent": 1}}


def test_a_branch_whose_worker_died_does_not_hold_up_one_that_is_due_before_it() -> None:
    times: list[float] = []

    def slow(ctx: Any) -> int:
        times.append((world.now - START).total_seconds())
        if ctx.attempt == 1:
            raise ValueError
        return 1

    flow = define("w").parallel("p", {"slow": branch(slow, retry=Retry(jitter=False)), "dies": killer(4)})
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.COMPLETED)
    assert times[:2] == [0, 1]


def test_a_crash_of_a_step_that_was_resumed_keeps_what_it_was_resumed_with() -> None:
    def work(ctx: Any) -> Any:
        seen.append((ctx.snapshot, ctx.resume_data))
        return [Suspend("s"), Crash(), "ok"][len(seen) - 1]

    def handler(ctx: Any) -> Any:
        answer = work(ctx)
        if isinstance(answer, Crash):
            raise answer
        return answer

    seen: list[Any] = []
    flow = define("w").step("a", handler)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    run.resume("a", 7)
    world.drain()
    assert run.result == {"a": "ok"}
    assert seen == [(None, None), ("s", 7), ("s", 7)]


def test_a_run_is_handed_back_without_a_change() -> None:
    flow = define("w").parallel("p", {"a": once(1)})
    world = World(flow)
    run = world.start(flow)
    under_claim(world, run)
    run.run = _calm(run)
    world.hand_back(run)
    world.drain()
    assert run.result == {"p": {"a": 1}}


def test_a_failed_attempt_before_the_crashes_is_counted_in_the_entry() -> None:
    flow = define("w").step("a", once(ValueError(), Crash(), Crash()))
    world = World(flow, max_crashes=2)
    run = world.start(flow)
    world.drive()
    assert run.has(Status.FAILED)
    assert run.journal["a"].attempt == 2


@pytest.mark.parametrize("point", range(1, 40))
def test_a_crash_anywhere_in_a_workflow_of_all_kinds_changes_nothing(point: int) -> None:
    child = define("kid").step("do", lambda ctx: ctx.input)
    flow = (
        define("all")
        .step("s", lambda ctx: 1)
        .parallel("p", {"x": lambda ctx: "x", "y": lambda ctx: "y"})
        .route("r", lambda ctx: "a", {"a": lambda ctx: "ra", "b": lambda ctx: "rb"})
        .loop("l", lambda ctx: ctx.iteration, max_iterations=2)
        .sleep("z", lambda ctx: 5)
        .wait_for_signal("w", "go")
        .child_workflow("c", "kid", map_input=lambda ctx: ctx.results["l"])
        .step("detached", lambda ctx: 2, transactional=False)
    )
    world = World(flow, child)
    world.crash_at = {point}
    run = world.start(flow)
    run.signal("go", "signal")
    world.drive()
    assert run.result == {
        "s": 1,
        "p": {"x": "x", "y": "y"},
        "r": {"branch": "a", "value": "ra"},
        "l": [0, 1],
        "z": None,
        "w": "signal",
        "c": {"do": [0, 1]},
        "detached": 2,
    }
