"""What is made of a run whose worker died, and how a worker takes a claim.

A crash is charged to the steps that could have been running: those that planning would run now.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from durable.core.graph import go_on, plan
from durable.core.moves import NOT_BEGUN, move, park, with_step
from durable.core.state import Begun, Claim, Failure, View
from durable.core.transition import Call, FailedAttempt, Fanout, Limits, Transition
from durable.values import Status, WaitingFor

_BACKOFF_LIMIT = 60.0


def died(view: View, now: datetime, limits: Limits) -> Transition | None:
    """The worker that executed this run is gone: charge the crash, let go of the claim, hand the run back. None if it
    was executing nothing of it."""
    free = replace(view, run=replace(view.run, claim=None))
    match plan(free, now, limits):
        case Call() as call:
            return _charge(free, now, (call,))
        case Fanout(calls):
            return _charge(free, now, calls)
        case Transition() as transition:
            return replace(transition, before=view.run)
        case None:
            return go_on(free, now) if view.run.claim is not None else None


def claimed(view: View, now: datetime, claim: Claim, calls: tuple[Call, ...]) -> Transition:
    """From now on `claim` executes these calls without holding the row."""
    frame = dict(view.run.frame)
    for call in calls:
        begun = frame.get(call.step_id, NOT_BEGUN)
        frame[call.step_id] = replace(begun, since=begun.since or now, waits=None, due=None, running=True)
    return move(view, now, _active(view), claim=claim, frame=frame)


def postponed(view: View, now: datetime, work: Call | Fanout, seconds: float) -> Transition:
    """A step that a crash is charged to already waits until it can run alone."""
    call = next(call for call in work.calls if call.crashes)
    begun = view.run.frame.get(call.step_id, NOT_BEGUN)
    due = now + timedelta(seconds=seconds)
    frame = with_step(view.run, call.step_id, replace(begun, due=due, waits=WaitingFor.RETRY, running=False))
    parked = park(view, now, WaitingFor.RETRY, name=call.step_id, wake_at=due, frame=frame)
    assert parked is not None
    return parked


def _charge(view: View, now: datetime, calls: tuple[Call, ...]) -> Transition:
    frame = dict(view.run.frame)
    records = []
    for call in calls:
        begun = frame.get(call.step_id, NOT_BEGUN)
        frame[call.step_id] = charged = _after_crash(begun, now)
        failure = Failure(
            "durable.errors.StepInterrupted", "its worker died", "interrupted", call.step_id, call.attempt
        )
        record = FailedAttempt(call.step_id, call.attempt, "interrupted", failure, begun.since, now, charged.due)
        records.append(record)
    attempts = tuple(records)
    first, *others = (frame[call.step_id] for call in calls)
    if first.due is not None and not others:
        step_id = calls[0].step_id
        parked = park(view, now, WaitingFor.RETRY, name=step_id, wake_at=first.due, frame=frame, attempts=attempts)
        assert parked is not None
        return parked
    return move(view, now, _active(view), frame=frame, attempts=attempts)


def _after_crash(begun: Begun, now: datetime) -> Begun:
    """The first takeover is immediate, later ones back off."""
    crashes = begun.crashes + 1
    delay = min(2.0 ** (crashes - 2), _BACKOFF_LIMIT) if crashes > 1 else None
    due = now + timedelta(seconds=delay) if delay is not None else None
    waits = WaitingFor.RETRY if due is not None else None
    return replace(begun, crashes=crashes, since=begun.since or now, due=due, waits=waits, running=False)


def _active(view: View) -> Status:
    return Status.COMPENSATING if view.run.status is Status.COMPENSATING else Status.RUNNING
