"""A crash is charged to the steps that were running in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from durable.core.moves import NOT_BEGUN, move
from durable.core.state import Begun, Failure, View
from durable.core.transition import FailedAttempt, Limits, Transition
from durable.values import Status, WaitingFor

_BACKOFF_LIMIT: Final = 60.0


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
    return move(view, now, active(view), frame=frame, attempts=tuple(records))


def _after_crash(begun: Begun, now: datetime, limits: Limits) -> Begun:
    """The first takeover is immediate, later ones back off, after the last one there is nothing to wait for. Jittered:
    a killer and its neighbours, charged together, must not come back together."""
    crashes = begun.crashes + 1
    backs_off = 1 < crashes < limits.max_crashes
    delay = min(2.0 ** (crashes - 2), _BACKOFF_LIMIT) * (0.5 + limits.chance / 2)
    due = now + timedelta(seconds=delay) if backs_off else None
    waits = WaitingFor.RETRY if due is not None else None
    return replace(begun, crashes=crashes, since=begun.since or now, due=due, waits=waits, running=False)


def active(view: View) -> Status:
    return Status.COMPENSATING if view.run.status is Status.COMPENSATING else Status.RUNNING
