"""The rollback, planned: newest finished entry that has a compensator, else the end.

One compensator a transaction, each with a journal entry of its own (``undo:<step>``) and a cursor that moves down the
journal's own sequence, so that a rollback survives crashes as the forward path does.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Any

from durable.core.attempt import Waits, attempt
from durable.core.children import answer
from durable.core.control import ending_failure
from durable.core.finish import end
from durable.core.functions.ending import gone_back
from durable.core.functions.undo import step_undone_by
from durable.core.loops import next_item
from durable.core.moves import move, park, with_step, without
from durable.core.results import schema_of
from durable.core.state import Begun, Entry, EntryKind, Failure, Message, MessageKind, View
from durable.core.transition import Call, Decision, Limits, Outgoing, Purpose, Transition
from durable.core.undo_targets import Target, is_target, targets
from durable.define.nodes import Work
from durable.define.payload import Schema
from durable.values import Status, WaitingFor


def plan(view: View, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    """What the rollback does next."""
    ending = view.run.ending
    assert ending is not None
    if running:
        return None
    if view.workflow is None:
        missing = f"{view.run.workflow}@{view.run.version}"
        return park(view, now, WaitingFor.DEFINITION, name=missing)
    if (open_child := _open_child(view)) is not None and not ending.stop:
        return _await_child(view, now, open_child)
    target = next_target(view)
    if target is None and ending.to is not None and not ending.stop:
        return gone_back(view, now)
    if target is None or (ending.stop and not _child_is_undoing(view, target)):
        return end(view, now, ending.status, error=ending_failure(view), reason=ending.reason)
    return _undo_child(view, now, target) if target.child else _undo(view, now, target, limits)


def _child_is_undoing(view: View, target: Target) -> bool:
    """Whether the current compensator is a child's own rollback: a stop waits for it as for any other."""
    return target.child and target.undo_id in view.run.frame


def next_target(view: View) -> Target | None:
    """The newest entry below the rollback's cursor that is to be undone."""
    cursor = view.run.undo_cursor
    return next((t for t in targets(view) if cursor is None or t.entry.seq < cursor), None)


def compensator(view: View) -> Target | None:
    """What the rollback is to undo now by user code; None: what it does next needs none."""
    ending = view.run.ending
    assert ending is not None
    target = next_target(view)
    needs_none = target is None or target.child or ending.stop or _open_child(view) is not None
    return None if needs_none else target


def undone(view: View, now: datetime, target: Target, failure: Failure | None = None, **write: Any) -> Transition:
    """The compensator of `target` ended, well or for good with `failure`: journal it, move the cursor down."""
    begun = view.run.frame.get(target.undo_id)
    entry = Entry(
        target.undo_id,
        EntryKind.UNDO,
        "failed" if failure else "completed",
        error=failure,
        attempt=begun.attempts + 1 if begun else 1,
        started_at=write.pop("started_at", None) or (begun.since if begun else None) or now,
        finished_at=now,
        parent=target.entry.parent,
    )
    frame = without(view.run, target.undo_id)
    write = {"frame": frame, "undo_cursor": target.entry.seq, "claim": None, **write}
    return move(view, now, Status.COMPENSATING, entries=(entry,), **write)


def _undo(view: View, now: datetime, target: Target, limits: Limits) -> Decision:
    entry = target.entry
    undoing = _work(view, target, now)
    if isinstance(undoing, Failure):
        return park(view, now, WaitingFor.PERSON, name="HistoryDiverged", error=undoing)
    work, output_type = undoing
    call = Call(target.undo_id, Purpose.UNDO, work, output=entry.result, output_type=output_type, undoes=entry.step_id)
    iteration = (entry.extra or {}).get("iteration")
    if iteration is not None:
        before = view.journal.get(f"{entry.parent}[{iteration - 1}]")
        call = replace(call, iteration=iteration, item=next_item(before))
    state = attempt(view, now, limits, call)
    match state:
        case Waits(begun):
            return park(view, now, WaitingFor.RETRY, name=target.undo_id, wake_at=begun.due)
        case Failure() as failure:
            return undone(view, now, target, failure)
        case _:
            return state


def _work(view: View, target: Target, now: datetime) -> tuple[Work, Schema] | Failure:
    """How it is undone, and the type of what is handed to that; or how journal and code differ."""
    if target.work is not None:
        return target.work, schema_of(view.workflow, target.entry.step_id)
    done = step_undone_by(view, target.entry.step_id, now)
    if isinstance(done, Failure):
        return done
    assert done.compensate is not None
    return done.compensate, done.result


def _undo_child(view: View, now: datetime, target: Target) -> Transition | None:
    begun = view.run.frame.get(target.undo_id)
    extra = target.entry.extra or {}
    if begun is None:
        child = uuid.UUID(extra["child"])
        ask = Outgoing(child, MessageKind.ROLLBACK, target.undo_id, id=target.undo_id)
        frame = with_step(view.run, target.undo_id, Begun(waits=WaitingFor.ROLLBACK, since=now))
        return park(view, now, WaitingFor.ROLLBACK, name=target.undo_id, frame=frame, outgoing=(ask,))
    told = answer(view, target.undo_id, uuid.UUID(extra["child"]))
    if told is None:
        return park(view, now, WaitingFor.ROLLBACK, name=target.undo_id)
    return undone(view, now, target, _left_behind(told), taken={told.seq: target.undo_id})


def _left_behind(answer: Message) -> Failure | None:
    error = json.loads(answer.body or "{}").get("error")
    if not error:
        return None
    return Failure(
        "ChildFailed", f"the child was not undone as a whole: {error.get('message')}", details={"child": error}
    )


def _open_child(view: View) -> str | None:
    """The step whose child was still running when the rollback began: its end is awaited before anything is undone."""
    return next((step_id for step_id, begun in view.run.frame.items() if begun.child is not None), None)


def _await_child(view: View, now: datetime, step_id: str) -> Transition | None:
    begun = view.run.frame[step_id]
    told = answer(view, step_id, begun.child)
    if told is None:
        return park(view, now, WaitingFor.ROLLBACK, name=step_id)
    body = json.loads(told.body or "{}")
    result = json.dumps(body.get("result"), ensure_ascii=False)
    extra: dict[str, Any] = {"child": str(begun.child)} | ({"undo": True} if begun.undo else {})
    around = step_id.rpartition("[" if step_id.endswith("]") else "/")[0] or None
    ended = Entry(step_id, EntryKind.CHILD, "completed", result, started_at=begun.since, finished_at=now, parent=around)
    ended = replace(ended, extra=extra)
    # It was faster than our cancel: it is undone like any finished step. One that needs no undoing is not journaled:
    # the cursor has not passed it, and a retried run starts it anew.
    late = body.get("status") == Status.COMPLETED and is_target(view, ended)
    frame, taken = without(view.run, step_id), {told.seq: step_id}
    return move(view, now, Status.COMPENSATING, frame=frame, entries=(ended,) if late else (), taken=taken)
