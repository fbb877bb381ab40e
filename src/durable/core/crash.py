"""What is made of a run whose worker died, and how a worker takes a claim.

A crash is charged to the steps that were running: of a claimed run the frame says which; of one whose row was held, it
is what planning would run under the row's lock now.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from durable.core import control, undo
from durable.core.charge import active, charge
from durable.core.functions.plan import suspect
from durable.core.moves import NOT_BEGUN, move
from durable.core.plan import go_on, plan
from durable.core.state import Claim, View
from durable.core.transition import Call, Fanout, Limits, Transition
from durable.values import Status, WaitingFor


def died(view: View, now: datetime, limits: Limits) -> Transition | None:
    """The worker that executed this run is gone: charge the crash, let go of the claim, hand the run back. None if it
    was executing nothing of it."""
    if view.run.claim is not None:
        free = view.ahead(view.run.changed(claim=None))
        running = [step_id for step_id, begun in view.run.frame.items() if begun.running]
        charged = charge(free, now, limits, running) if running else go_on(free, now)
        return charged.of_row(view.run)
    if view.workflow is not None and view.workflow.body is not None:
        return _died_in_body(view, now, limits)
    match plan(view, now, limits):
        case Call(claims_first=False, step_id=step_id):
            return charge(view, now, limits, [step_id])
        case Call() | Fanout():  # it runs by a claim only, and there was none yet
            return move(view, now, active(view))
        case decided:
            return decided


def _died_in_body(view: View, now: datetime, limits: Limits) -> Transition | None:
    """The same for a function, whose body is not driven here: if that was the killer, it would kill again."""
    if (asked := control.apply_next(view, now)) is not None:
        return asked
    if view.run.status is Status.COMPENSATING:
        return _died_in_rollback(view, now, limits)
    if view.run.status.ended or view.run.status is Status.PAUSED:
        return None
    return suspect(view, now, limits)


def _died_in_rollback(view: View, now: datetime, limits: Limits) -> Transition | None:
    """The compensator that was to run is charged; what needs no user code is decided here."""
    target = undo.compensator(view)
    if target is None:
        decided = undo.plan(view, now, limits, frozenset())
        assert not isinstance(decided, Call | Fanout)
        return decided
    begun = view.run.frame.get(target.undo_id, NOT_BEGUN)
    waits = begun.due is not None and begun.due > now
    return None if waits else charge(view, now, limits, [target.undo_id])


def claimed(view: View, now: datetime, claim: Claim, calls: tuple[Call, ...]) -> Transition:
    """From now on `claim` executes these calls without holding the row."""
    frame = dict(view.run.frame)
    for call in calls:
        begun = frame.get(call.step_id, NOT_BEGUN)
        frame[call.step_id] = replace(begun, since=begun.since or now, waits=None, due=None, running=True)
    return move(view, now, active(view), claim=claim, frame=frame)


def postponed(view: View, now: datetime, work: Call | Fanout, seconds: float) -> Transition:
    """Steps that a crash is charged to already wait until they can run alone; their siblings go on."""
    due = now + timedelta(seconds=seconds)
    frame = dict(view.run.frame)
    for call in work.calls:
        if call.crashes:
            frame[call.step_id] = replace(frame[call.step_id], due=due, waits=WaitingFor.RETRY)
    return move(view, now, active(view), frame=frame)
