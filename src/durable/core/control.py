"""What people ask of a run: cancel, pause, resume, retry; and what a parent asks of a finished child: roll back.

The requests travel as messages and are applied by whoever holds the row: a worker between two steps, or the asking
process itself when the row is free. None of them needs the run's definition.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from durable.core.finish import answer_text, end
from durable.core.functions.errors import led_to
from durable.core.moves import move
from durable.core.state import REQUESTS as REQUESTS
from durable.core.state import Ending, Entry, EntryKind, Failure, Message, MessageKind, Run, View
from durable.core.transition import Outgoing, Transition
from durable.core.undo_targets import targets
from durable.values import Status, WaitingFor


def apply_next(view: View, now: datetime) -> Transition | None:
    """Apply the oldest request of the inbox; None if there is none."""
    for message in view.inbox:
        if message.kind in REQUESTS:
            return apply(view, message, now)
    return None


def apply(view: View, request: Message, now: datetime) -> Transition:
    """What `request` makes of the run. One that no longer applies is taken all the same, and changes nothing."""
    taken = {request.seq: None} if request.seq else {}
    body: Mapping[str, Any] = json.loads(request.body) if request.body else {}
    match request.kind:
        case MessageKind.CANCEL:
            done = _cancel(view, now, body.get("reason"), bool(body.get("compensate")), taken)
        case MessageKind.PAUSE:
            done = _pause(view, now, taken)
        case MessageKind.RESUME:
            done = _resume(view, now, taken)
        case MessageKind.ROLLBACK:
            done = _roll_back(view, now, request.name or "", taken)
        case _:
            raise AssertionError(f"{request.kind} is not a request")
    return done or _unchanged(view, now, taken)


def takes_effect(run: Run, kind: MessageKind) -> bool:
    """Whether a request of this kind changes a run in this state: what the operation answers."""
    match kind:
        case MessageKind.CANCEL:
            return not run.status.ended
        case MessageKind.PAUSE:
            return run.status in (Status.PENDING, Status.RUNNING, Status.SUSPENDED) and not run.pausing
        case MessageKind.RESUME:
            return run.status is Status.PAUSED or run.pausing
        case _:
            return run.status is Status.COMPLETED


def retry(view: View, now: datetime) -> Transition | None:
    """Take a failed run up again at the step that failed, with fresh attempts; or look anew at a run that is parked
    for a person. None if the run is neither. The caller has made sure that nothing of it was undone."""
    run = view.run
    if run.waiting_for is WaitingFor.PERSON:
        return move(view, now, Status.RUNNING, error=None)
    if run.status is not Status.FAILED:
        return None
    failed = [entry for entry in view.journal.values() if entry.status == "failed" and _led_to(run, entry)]
    deadline = run.deadline if run.deadline is not None and run.deadline > now else None
    fresh: dict[str, Any] = {
        "error": None,
        "ending": None,
        "undo_cursor": None,
        "finished_at": None,
        "deadline": deadline,
    }
    stale = {message.seq: None for message in view.inbox if message.kind in REQUESTS}  # they were for its first life
    if _is_function(run) and failed:
        fresh["entries"] = (parting(f"{run.retries + 1}", min(entry.seq for entry in failed), now),)
    forget = tuple(entry.step_id for entry in failed)
    return move(view, now, Status.RUNNING, forget=forget, taken=stale, retries=run.retries + 1, **fresh)


def parting(what: str, since: int, now: datetime) -> Entry:
    """A failure is taken up anew: what a body did because of it, after `since`, it may not come to again."""
    key = f"patch:retry:{what}"
    return Entry(key, EntryKind.PATCH, "completed", "true", finished_at=now, extra={"since": since})


def _is_function(run: Run) -> bool:
    return run.error is not None and "retry" in (run.error.details or {})


def _led_to(run: Run, failed: Entry) -> bool:
    """Whether a failed entry led to the run's failure. A body may have gone on from others: those it says itself."""
    causes = (run.error.details or {}).get("retry") if run.error is not None else None
    return causes is None or led_to(failed.step_id, causes)


def was_undone(view: View) -> bool:
    """Whether any of its entries was undone, or tried to be, since it last went back to a checkpoint."""
    since = max((entry.seq for entry in view.journal.values() if entry.kind is EntryKind.ROLLBACK), default=0)
    return any(entry.kind is EntryKind.UNDO and entry.seq > since for entry in view.journal.values())


def begin_rollback(view: View, now: datetime, **write: Any) -> Transition:
    """No handler of the run is alive any more: the rollback that `ending` asks for begins, or the run just ends."""
    ending = view.run.ending
    assert ending is not None
    children = {step_id: begun for step_id, begun in view.run.frame.items() if begun.child is not None}
    if view.workflow is not None and not targets(view) and not children:
        return end(view, now, ending.status, error=ending.error, reason=ending.reason, **write)
    return move(view, now, Status.COMPENSATING, claim=None, pausing=False, frame=children, **write)


def _cancel(view: View, now: datetime, reason: str | None, compensate: bool, taken: Any) -> Transition | None:
    run = view.run
    if run.status.ended:
        return None
    if run.status is Status.COMPENSATING:
        return _cancel_rollback(view, now, reason, compensate, taken)
    if run.cleanup and run.waiting_for not in (WaitingFor.PERSON, WaitingFor.DEFINITION):
        return _cancel_body(view, now, reason, compensate, taken)
    down = {"outgoing": _to_children(run, MessageKind.CANCEL, {"reason": reason, "compensate": compensate})}
    if not compensate or not (view.journal or run.frame):
        return end(view, now, Status.CANCELED, reason=reason, taken=taken, error=None, **down)
    asked = {"ending": Ending(Status.CANCELED, reason=reason), "reason": reason, "error": None, "taken": taken, **down}
    if run.claim is not None:  # its owner ends the handlers first: what they still bring is journaled, then undone
        return move(view, now, run.status, **asked)
    children = {step_id: begun for step_id, begun in run.frame.items() if begun.child is not None}
    return move(view, now, Status.COMPENSATING, pausing=False, frame=children, **asked)


def _cancel_body(view: View, now: datetime, reason: str | None, compensate: bool, taken: Any) -> Transition | None:
    """Its body may clean up first: a worker raises Canceled in it. Asked again, nothing changes."""
    run = view.run
    if run.ending is not None:
        return None
    ending = Ending(Status.CANCELED, reason=reason, compensate=compensate)
    down = _to_children(run, MessageKind.CANCEL, {"reason": reason, "compensate": compensate})
    write: dict[str, Any] = {"ending": ending, "reason": reason, "error": None, "taken": taken, "outgoing": down}
    status = run.status if run.claim is not None else Status.RUNNING
    return move(view, now, status, pausing=False, **write)


def _cancel_rollback(view: View, now: datetime, reason: str | None, compensate: bool, taken: Any) -> Transition:
    """It ends canceled: after the current compensator, unless all was to be undone."""
    ending = view.run.ending
    assert ending is not None
    stop = ending.stop or not compensate
    canceled = replace(ending, status=Status.CANCELED, reason=reason, stop=stop, to=None)
    return move(view, now, Status.COMPENSATING, ending=canceled, reason=reason, taken=taken)


def _pause(view: View, now: datetime, taken: Any) -> Transition | None:
    run = view.run
    if not takes_effect(run, MessageKind.PAUSE):
        return None
    down = _to_children(run, MessageKind.PAUSE, None)
    if run.claim is not None:
        return move(view, now, run.status, pausing=True, taken=taken, outgoing=down)
    return paused(view, now, taken=taken, outgoing=down)


def paused(view: View, now: datetime, **write: Any) -> Transition:
    """The pause takes effect: what the run waited for stays written, for its resumption."""
    kept = {**_waits(view.run), "error": view.run.error}
    return move(view, now, Status.PAUSED, **{**kept, "claim": None, "pausing": False, **write})


def _resume(view: View, now: datetime, taken: Any) -> Transition | None:
    run = view.run
    down = _to_children(run, MessageKind.RESUME, None)
    if run.pausing:
        kept = {**_waits(run), "pausing": False, "error": None}
        return move(view, now, run.status, wake=True, taken=taken, outgoing=down, **kept)
    if run.status is not Status.PAUSED:
        return None
    if run.waiting_for is None:
        return move(view, now, Status.RUNNING, error=None, taken=taken, outgoing=down)
    return move(view, now, Status.SUSPENDED, wake=True, taken=taken, outgoing=down, **_waits(run))


def _roll_back(view: View, now: datetime, answer_to: str, taken: Any) -> Transition | None:
    run = view.run
    if run.status is Status.COMPLETED:
        ending = Ending(Status.CANCELED, reason="rolled back", answer_to=answer_to)
        asked: dict[str, Any] = {"ending": ending, "reason": "rolled back", "finished_at": None}
        return move(view, now, Status.COMPENSATING, taken=taken, **asked)
    if run.status.ended and run.parent_id is not None:  # nothing is left to undo: the parent must hear it all the same
        body = answer_text(run, run.status, "null", None, run.reason)
        answer = Outgoing(run.parent_id, MessageKind.CHILD, answer_to, body)
        return _unchanged(view, now, taken, outgoing=(answer,))
    return None


def _unchanged(view: View, now: datetime, taken: Any, **write: Any) -> Transition:
    """The message is taken, the run stays as it is. Others that came with it have been seen now: they are looked at."""
    run = view.run
    others = any(message.seq not in taken for message in view.inbox)
    done = move(view, now, run.status, wake=others, taken=taken, **_waits(run), **write)
    kept = replace(run, revision=run.revision + 1, wake_at=done.after.wake_at, current_step=done.after.current_step)
    return replace(done, after=kept)


def _waits(run: Run) -> dict[str, Any]:
    return {"waiting_for": run.waiting_for, "waiting_name": run.waiting_name, "wake_at": run.wake_at}


def _to_children(run: Run, kind: MessageKind, body: Mapping[str, Any] | None) -> tuple[Outgoing, ...]:
    text = json.dumps(body) if body is not None else None
    return tuple(Outgoing(b.child, kind, None, text) for b in run.frame.values() if b.child is not None)


def not_undone(view: View) -> list[str]:
    """What a rollback left behind: the steps whose compensators gave up, and those that it never came to."""
    undos = (entry for step_id, entry in view.journal.items() if step_id.startswith("undo:"))
    gave_up = [entry.step_id.removeprefix("undo:") for entry in undos if entry.status == "failed"]
    return gave_up + [target.entry.step_id for target in targets(view)]


def ending_failure(view: View) -> Failure | None:
    """The error that a rolled-back run ends with: the original one, with what could not be undone."""
    ending = view.run.ending
    assert ending is not None
    left = not_undone(view)
    if not left:
        return ending.error
    canceled = Failure("RunCanceled", ending.reason or "canceled", kind="canceled")
    failure = ending.error or canceled
    return replace(failure, details={**(failure.details or {}), "not_undone": left})
