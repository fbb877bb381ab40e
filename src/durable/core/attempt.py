"""The state of one piece of work that has not finished: may it run now, does it wait, or is it beyond its limits?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from durable.core.moves import NOT_BEGUN, move, with_step
from durable.core.state import Begun, Failure, Message, MessageKind, View
from durable.core.transition import Call, Limits, Purpose, Transition
from durable.values import Status, WaitingFor


@dataclass(frozen=True, slots=True)
class Waits:
    """It cannot run yet: it waits for its next attempt's time, or for resume()."""

    begun: Begun


def attempt(view: View, now: datetime, limits: Limits, call: Call) -> Call | Transition | Waits | Failure:
    """`call` as it can be made now; or the transition that takes up what resume() brought; or the wait that it is in;
    or the failure of a step whose worker died too often."""
    begun = view.run.frame.get(call.step_id)
    if begun is None:  # most work ends at its first attempt
        return _ready(view, call, NOT_BEGUN)
    if begun.crashes and (call.work.at_most_once or begun.crashes >= limits.max_crashes):
        return _interrupted(call, begun)
    if begun.waits is WaitingFor.RESUME:
        message = signal(view, call.step_id)
        if message is None:
            return Waits(begun)
        taken_up = replace(begun, waits=None, name=None, resume_data=message.body or "null")
        frame = with_step(view.run, call.step_id, taken_up)
        status = Status.COMPENSATING if view.run.status is Status.COMPENSATING else Status.RUNNING
        return move(view, now, status, frame=frame, taken={message.seq: call.step_id})
    if begun.due is not None and begun.due > now:
        return Waits(begun)
    return _ready(view, call, begun)


def signal(view: View, name: str, *, until: datetime | None = None) -> Message | None:
    """The oldest untaken signal of this name that was sent by `until`."""
    named = (m for m in view.inbox if m.kind is MessageKind.SIGNAL and m.name == name)
    return next((m for m in named if until is None or m.sent_at <= until), None)


def _ready(view: View, call: Call, begun: Begun) -> Call:
    deadline = None if call.purpose is Purpose.UNDO else view.run.deadline  # a rollback has no time limit
    if begun is NOT_BEGUN and deadline is None:
        return call
    suspended = view.journal.get(call.step_id) if begun.resume_data is not None else None
    return replace(
        call,
        attempt=begun.attempts + 1,
        crashes=begun.crashes,
        deadline=deadline,
        snapshot=suspended.result if suspended is not None else None,
        resume_data=begun.resume_data,
        resumed=begun.resume_data is not None,
    )


def _interrupted(call: Call, begun: Begun) -> Failure:
    why = "it may run at most once" if call.work.at_most_once else f"it was interrupted {begun.crashes} times"
    message = f"step {call.step_id!r}: its worker or its connection died before the outcome was recorded, and {why}"
    return Failure(
        "durable.errors.StepInterrupted", message, "interrupted", call.step_id, begun.attempts + begun.crashes
    )
