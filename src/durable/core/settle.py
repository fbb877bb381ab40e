"""What a call led to, made into a transition: 4 in the corridor of `engine/advance.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, assert_never

from durable.core import undo
from durable.core.attempt import signal
from durable.core.charge import charge
from durable.core.finish import asked, complete, node_done
from durable.core.frozen import value
from durable.core.functions.plan import with_body
from durable.core.give_up import current_node, entry_of, step_failed
from durable.core.loops import iterations, loop_result
from durable.core.moves import NOT_BEGUN, move, park, with_step, without
from durable.core.plan import plan
from durable.core.state import Begun, Entry, EntryKind, Failure, View
from durable.core.transition import (
    Call,
    Failed,
    FailedAttempt,
    Interrupted,
    Iterated,
    Limits,
    Outcome,
    Purpose,
    Succeeded,
    Suspended,
    Transition,
)
from durable.core.undo_targets import Target
from durable.core.waits import begin_sleep, begin_wait
from durable.define.nodes import ChildWorkflow, Loop, Parallel, Route, Sleep, WaitForSignal, Work
from durable.values import Status, WaitingFor


@value(frozen=True, slots=True)
class Ended:
    """A call that has ended: what settle looks at beside the view."""

    call: Call
    outcome: Outcome
    started_at: datetime
    now: datetime


def settle(view: View, ended: Ended, limits: Limits) -> Transition:
    """The transition that `ended.outcome` makes of the run."""
    match ended.outcome:
        case Succeeded(value):
            return _succeeded(view, ended, value, limits)
        case Iterated() as iterated:
            return _iterated(view, ended, iterated)
        case Suspended(snapshot):
            return _suspended(view, ended, snapshot)
        case Failed() as failed:
            return _failed(view, ended, failed, limits)
        case Interrupted("crash"):
            return _crashed(view, ended, limits)
        case Interrupted(by):
            return _interrupted(view, ended, by)
        case _:
            assert_never(ended.outcome)


def step_ended(view: View, now: datetime, limits: Limits, call: Call, entry: Entry) -> Transition:
    """A step has ended, well or badly: its entry, and all that follows from it without user code.

    One that shares its claim with others only writes its entry: the claim's owner plans on. So does one that a crash is
    charged to: should the body kill the worker behind it, that must not be charged to this step again.
    """
    view = with_body(view)
    assert view.body is not None
    view.body.defer(entry)
    frame = without(view.run, entry.step_id)
    if call.shares and view.run.claim is not None:
        return move(view, now, view.run.status, frame=frame, waiting_for=None)
    if call.crashes:
        return move(view, now, Status.RUNNING, frame=frame, claim=None)
    passed = _with_entry(view, entry)
    decided = plan(passed, now, limits)
    if isinstance(decided, Transition):
        return decided.of_row(view.run)
    going_on = move(passed, now, Status.RUNNING)
    if isinstance(decided, Call):
        view.body.ready = (going_on.after.revision, decided)
    return going_on.of_row(view.run)


def _with_entry(view: View, entry: Entry) -> View:
    """`view` with a step ended by `entry`, which is still to be written; the claim that it ran under is over."""
    run = view.run
    if run.claim is not None or entry.step_id in run.frame:
        run = run.changed(frame=without(run, entry.step_id), claim=None)
    return view.ahead(run, {**view.journal, entry.step_id: entry})


def defer(view: View, ended: Ended) -> View | None:
    """With an ephemeral step that has succeeded, `view` with its entry, which is written with the next transition; None
    for any other outcome. Its run stays locked meanwhile."""
    if not (ended.call.ephemeral and isinstance(ended.outcome, Succeeded)) or ended.call.crashes:
        return None
    view, entry = with_body(view), _entry(view, ended, ended.outcome.value)
    assert view.body is not None
    view.body.defer(entry)
    return _with_entry(view, entry)


def is_function(view: View) -> bool:
    return view.workflow is not None and view.workflow.body is not None


def _succeeded(view: View, ended: Ended, value: str, limits: Limits) -> Transition:
    call, now = ended.call, ended.now
    match call.purpose:
        case Purpose.STEP if is_function(view):
            return step_ended(view, now, limits, call, _entry(view, ended, value))
        case Purpose.STEP:
            node = current_node(view)
            assert node is not None
            return node_done(view, now, node, value, entries=(_entry(view, ended, value),))
        case Purpose.BRANCH:
            return _branch_done(view, ended, value)
        case Purpose.CHOICE:
            return _chosen(view, ended, value)
        case Purpose.RESULT:
            entry = _entry(view, ended, value)
            if asked(view):  # it completes when that has been done
                frame = without(view.run, entry.step_id)
                return move(view, now, Status.RUNNING, entries=(entry,), frame=frame, claim=None)
            return complete(view, now, entries=(entry,))
        case Purpose.UNDO:
            return undo.undone(view, now, _target(view, call), started_at=ended.started_at)
        case Purpose.ITERATION:
            raise AssertionError("an iteration answers Iterated")
        case _:
            assert_never(call.purpose)


def _branch_done(view: View, ended: Ended, value: str) -> Transition:
    node = current_node(view)
    entry = _entry(view, ended, value)
    if isinstance(node, Parallel):  # its siblings go on under the same claim; planning sees when all have ended
        return move(view, ended.now, Status.RUNNING, entries=(entry,), frame=without(view.run, entry.step_id))
    assert isinstance(node, Route)
    branch = json.dumps(entry.step_id.partition("/")[2], ensure_ascii=False)
    return node_done(view, ended.now, node, f'{{"branch":{branch},"value":{value}}}', entries=(entry,))


def _chosen(view: View, ended: Ended, value: str) -> Transition:
    node = current_node(view)
    match node:
        case Route() if (unknown := _unknown_branch(node, value)) is not None:
            return step_failed(view, ended.now, ended.call, unknown, started_at=ended.started_at)
        case Route() | ChildWorkflow():
            entry = _entry(view, ended, value)
            frame = without(view.run, entry.step_id)
            return move(view, ended.now, Status.RUNNING, entries=(entry,), frame=frame, claim=None)
        case Sleep(until=Work() as work):
            return _must(begin_sleep(view, node, ended.now, work.result.load(value)))
        case WaitForSignal():
            return _must(begin_wait(view, node, ended.now, json.loads(value)))
        case _:
            raise AssertionError(f"{node} computes nothing")


def _unknown_branch(node: Route, value: str) -> Failure | None:
    branch = json.loads(value)
    if isinstance(branch, str) and branch in node.branches:
        return None
    message = f"route {node.name!r} chose {branch!r}, which is not one of its branches: {', '.join(node.branches)}"
    return Failure("durable.errors.UnknownBranch", message, "critical", node.name)


def _iterated(view: View, ended: Ended, iterated: Iterated) -> Transition:
    call, node = ended.call, current_node(view)
    assert isinstance(node, Loop)
    if iterated.value is None:  # `while_` ended the loop before this iteration
        return _loop_done(view, ended, node, ())
    extra: dict[str, Any] = {"iteration": call.iteration, "stop": iterated.stop}
    if iterated.next_item is not None:
        extra["next"] = iterated.next_item
    entry = entry_of(
        view, call, ended.now, "completed", started_at=ended.started_at, result=iterated.value, extra=extra
    )
    assert call.iteration is not None
    if iterated.stop or (not node.conditional and call.iteration + 1 >= node.max_iterations):
        return _loop_done(view, ended, node, (entry,))
    return move(view, ended.now, Status.RUNNING, entries=(entry,), frame=without(view.run, call.step_id), claim=None)


def _loop_done(view: View, ended: Ended, node: Loop, last: tuple[Entry, ...]) -> Transition:
    done = [*iterations(view, node), *last]
    since = done[0].started_at if done else ended.started_at
    value = loop_result(node, done)
    own = Entry(node.name, EntryKind.LOOP, "completed", value, started_at=since, finished_at=ended.now)
    frame = without(view.run, node.name, ended.call.step_id)
    return node_done(view, ended.now, node, value, entries=(*last, own), frame=frame)


def _suspended(view: View, ended: Ended, snapshot: str) -> Transition:
    call, run = ended.call, view.run
    begun = run.frame.get(call.step_id, NOT_BEGUN)
    waits = replace(
        begun,
        since=begun.since or ended.started_at,
        due=None,
        waits=WaitingFor.RESUME,
        name=call.step_id,
        resume_data=None,
        running=False,
    )
    entry = entry_of(view, call, ended.now, "suspended", started_at=ended.started_at, result=snapshot)
    frame = with_step(run, call.step_id, waits)
    if call.shares:
        return move(view, ended.now, Status.RUNNING, entries=(entry,), frame=frame)
    early = signal(view, call.step_id) is not None  # its answer was there before the question
    parked = park(view, ended.now, WaitingFor.RESUME, name=call.step_id, frame=frame, entries=(entry,), wake=early)
    return _must(parked)


def _failed(view: View, ended: Ended, failed: Failed, limits: Limits) -> Transition:
    call, retry = ended.call, ended.call.work.retry
    if is_function(view):  # whose steps are not in its definition, where a report would look
        details = {**(failed.failure.details or {}), "limit": retry.max_attempts}
        failed = replace(failed, failure=replace(failed.failure, details=details))
    if failed.retryable and not retry.exhausted(call.attempt):
        delay = failed.delay if failed.delay is not None else retry.delay(call.attempt, limits.chance)
        return _try_again(view, ended, failed.failure, delay)
    failure = failed.failure
    if failed.retryable and call.attempt > 1:
        failure = replace(failure, kind="exhausted", attempts=call.attempt)
    if call.purpose is Purpose.UNDO:
        return undo.undone(view, ended.now, _target(view, call), failure, started_at=ended.started_at)
    if failed.retryable and retry.on_exhausted == "pause":
        return _pause_exhausted(view, ended, failure)
    if is_function(view):
        entry = entry_of(view, call, ended.now, "failed", error=failure, started_at=ended.started_at)
        return step_ended(view, ended.now, limits, call, entry)
    return step_failed(view, ended.now, call, failure, started_at=ended.started_at)


def _try_again(view: View, ended: Ended, failure: Failure, delay: float) -> Transition:
    call, run, now = ended.call, view.run, ended.now
    begun = run.frame.get(call.step_id, NOT_BEGUN)
    due = now + timedelta(seconds=delay)
    since = begun.since or ended.started_at
    waits = replace(begun, attempts=call.attempt, since=since, due=due, waits=WaitingFor.RETRY, running=False)
    frame = with_step(run, call.step_id, waits)
    record = FailedAttempt(call.step_id, call.attempt, "failed", failure, ended.started_at, now, due)
    if call.shares:
        return move(view, now, Status.RUNNING, frame=frame, attempts=(record,))
    return _must(park(view, now, WaitingFor.RETRY, name=call.step_id, wake_at=due, frame=frame, attempts=(record,)))


def _pause_exhausted(view: View, ended: Ended, failure: Failure) -> Transition:
    """Out of attempts, and to be looked at by a person: resume() gives it fresh ones, and what it was resumed with."""
    call = ended.call
    record = FailedAttempt(call.step_id, call.attempt, "failed", failure, ended.started_at, ended.now)
    begun = view.run.frame.get(call.step_id, NOT_BEGUN)
    fresh = Begun(since=begun.since or ended.started_at, resume_data=begun.resume_data)
    frame = with_step(view.run, call.step_id, fresh)
    claim = view.run.claim if call.shares else None
    pause: dict[str, Any] = {"pausing": True, "error": failure, "claim": claim}
    return move(view, ended.now, Status.RUNNING, frame=frame, attempts=(record,), **pause)


def _interrupted(view: View, ended: Ended, by: str) -> Transition:
    """Ended from outside, not counted: the next attempt has the same number. An `at_most_once` step has none."""
    call, run = ended.call, view.run
    failure = Failure(
        "durable.errors.StepInterrupted", f"interrupted by {by}", "interrupted", call.step_id, call.attempt
    )
    record = FailedAttempt(call.step_id, call.attempt, "interrupted", failure, ended.started_at, ended.now)
    begun = run.frame.get(call.step_id)
    if begun is not None:
        begun = replace(begun, running=False, crashes=begun.crashes + call.work.at_most_once)
    frame = with_step(run, call.step_id, begun) if begun is not None else run.frame
    claim = run.claim if call.shares else None
    status = Status.COMPENSATING if run.status is Status.COMPENSATING else Status.RUNNING
    return move(view, ended.now, status, frame=frame, claim=claim, attempts=(record,))


def _crashed(view: View, ended: Ended, limits: Limits) -> Transition:
    """Its transaction was lost with the connection: counted like a crash, so that it can't repeat for ever."""
    free = view if ended.call.shares else view.ahead(view.run.changed(claim=None))
    charged = charge(free, ended.now, limits, [ended.call.step_id], "its connection to the database was lost")
    return charged.of_row(view.run)


def _target(view: View, call: Call) -> Target:
    target = undo.next_target(view)
    assert target is not None
    assert target.undo_id == call.step_id
    return target


def _entry(view: View, ended: Ended, value: str) -> Entry:
    return entry_of(view, ended.call, ended.now, "completed", started_at=ended.started_at, result=value)


def _must(transition: Transition | None) -> Transition:
    assert transition is not None, "a wait that begins changes the run"
    return transition
