"""What is made of a run whose worker died, and how a worker takes a claim.

A crash is charged to the steps that were running: of a claimed run the frame says which; of one whose row was held, it
is what planning would run under the row's lock now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from durable.core.graph import go_on, plan
from durable.core.moves import NOT_BEGUN, move
from durable.core.state import Begun, Claim, Failure, View
from durable.core.transition import Call, FailedAttempt, Fanout, Limits, Transition
from durable.values import Status, WaitingFor

_BACKOFF_LIMIT = 60.0


def died(view: View, now: datetime, limits: Limits) -> Transition | None:
    """The worker that executed this run is gone: charge the crash, let go of the claim, hand the run back. None if it
    was executing nothing of it."""
    if view.run.claim is not None:
        free = replace(view, run=replace(view.run, claim=None))
        running = [step_id for step_id, begun in view.run.frame.items() if begun.running]
        return replace(charge(free, now, limits, running) if running else go_on(free, now), before=view.run)
    match plan(view, now, limits):
        case Call(claims_first=False, step_id=step_id):
            return charge(view, now, limits, [step_id])
        case Call() | Fanout():  # it runs by a claim only, and there was none yet
            return move(view, now, _active(view))
        case decided:
            return decided


def claimed(view: View, now: datetime, claim: Claim, calls: tuple[Call, ...]) -> Transition:
    """From now on `claim` executes these calls without holding the row."""
    frame = dict(view.run.frame)
    for call in calls:
        begun = frame.get(call.step_id, NOT_BEGUN)
        frame[call.step_id] = replace(begun, since=begun.since or now, waits=None, due=None, running=True)
    return move(view, now, _active(view), claim=claim, frame=frame)


def postponed(view: View, now: datetime, work: Call | Fanout, seconds: float) -> Transition:
    """Steps that a crash is charged to already wait until they can run alone; their siblings go on."""
    due = now + timedelta(seconds=seconds)
    frame = dict(view.run.frame)
    for call in work.calls:
        if call.crashes:
            frame[call.step_id] = replace(frame[call.step_id], due=due, waits=WaitingFor.RETRY)
    return move(view, now, _active(view), frame=frame)


def charge(view: View, now: datetime, limits: Limits, steps: Sequence[str], why: str = "its worker died") -> Transition:
    """Count a crash of these steps, and hand them back."""
    frame = dict(view.run.frame)
    records = []
    for step_id in steps:
        begun = frame.get(step_id, NOT_BEGUN)
        frame[step_id] = charged = _after_crash(begun, now, limits)
        attempt = begun.attempts + 1
        failure = Failure("durable.errors.StepInterrupted", why, "interrupted", step_id, attempt)
        record = FailedAttempt(step_id, attempt, "interrupted", failure, begun.since, now, charged.due)
        records.append(record)
    return move(view, now, _active(view), frame=frame, attempts=tuple(records))


def _after_crash(begun: Begun, now: datetime, limits: Limits) -> Begun:
    """The first takeover is immediate, later ones back off, after the last one there is nothing to wait for. Jittered:
    a killer and its neighbours, charged together, must not come back together."""
    crashes = begun.crashes + 1
    backs_off = 1 < crashes < limits.max_crashes
    delay = min(2.0 ** (crashes - 2), _BACKOFF_LIMIT) * (0.5 + limits.chance / 2)
    due = now + timedelta(seconds=delay) if backs_off else None
    waits = WaitingFor.RETRY if due is not None else None
    return replace(begun, crashes=crashes, since=begun.since or now, due=due, waits=waits, running=False)


def _active(view: View) -> Status:
    return Status.COMPENSATING if view.run.status is Status.COMPENSATING else Status.RUNNING
