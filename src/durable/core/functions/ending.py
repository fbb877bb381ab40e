"""How a body ends: it fails, goes back to a checkpoint, or continues as new."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import datetime
from typing import Any

from durable.core.finish import fail
from durable.core.functions.errors import failed_entries, failure
from durable.core.moves import move
from durable.core.state import Ending, Entry, EntryKind, Failure, MessageKind, View
from durable.core.transition import Outgoing, Successor, Transition
from durable.errors import DefinitionError, PayloadError
from durable.values import ContinueAsNew, Rollback, Status


def failed(view: View, now: datetime, error: BaseException, **write: Any) -> Transition:
    """The body raised `error`."""
    assert view.body is not None
    match error:
        case ContinueAsNew():
            return _continued(view, now, error, **write)
        case Rollback(to=str() as name):
            checkpoint = view.body.checkpoint(name)
            if checkpoint is not None:
                return _go_back(view, now, checkpoint, **write)
            known = ", ".join(repr(passed) for _, passed, _ in view.body.checkpoints) or "none"
            error = DefinitionError(f"workflow {view.run.workflow!r}: Rollback(to={name!r}): no such checkpoint was "
                                    f"passed in a part of the body that still runs; passed: {known}")  # fmt: skip
    return fail(view, now, _told(error), **write)


def _told(error: BaseException) -> Failure:
    """What is recorded of it; with the entries that a retry of the run takes up anew."""
    record = failure(error)
    if isinstance(error, DefinitionError | PayloadError):
        record = replace(record, kind="critical")
    return replace(record, details={**(record.details or {}), "retry": failed_entries(error)})


def _go_back(view: View, now: datetime, checkpoint: Entry, **write: Any) -> Transition:
    """All since `checkpoint` is undone; then the body goes on from it. Children that run are canceled, and undone."""
    children = {s: begun for s, begun in view.run.frame.items() if begun.child is not None}
    stop = [cancel_message(b.child, "rolled back", compensate=True) for b in children.values() if b.child is not None]
    outgoing = (*write.pop("outgoing", ()), *stop)
    ending = Ending(Status.FAILED, to=checkpoint.step_id)
    return move(
        view,
        now,
        Status.COMPENSATING,
        ending=ending,
        claim=None,
        pausing=False,
        frame=children,
        outgoing=outgoing,
        **write,
    )


def gone_back(view: View, now: datetime) -> Transition:
    """All since the checkpoint has been undone: the run goes on from there."""
    ending = view.run.ending
    assert ending is not None
    epoch = 1 + sum(entry.kind is EntryKind.ROLLBACK for entry in view.journal.values())
    extra = {"to": ending.to, "epoch": epoch}
    entry = Entry(f"rollback:{epoch}", EntryKind.ROLLBACK, "completed", finished_at=now, extra=extra)
    return move(
        view, now, Status.RUNNING, entries=(entry,), ending=None, undo_cursor=None, frame={}, claim=None, error=None
    )


def _continued(view: View, now: datetime, error: ContinueAsNew, **write: Any) -> Transition:
    """The run ends, and its successor begins: by the newest version of the workflow that is known here."""
    run = view.run
    workflow = view.registry.latest(run.workflow) or view.workflow
    assert workflow is not None
    try:
        given = workflow.input.dump(error.input)
    except PayloadError as refused:
        return fail(view, now, _told(refused.at(f"the input of continue_as_new in workflow {run.workflow!r}")), **write)
    successor = Successor(uuid.uuid5(run.id, "successor"), workflow.version, given)
    return move(view, now, Status.COMPLETED, successor=successor, **write)


def cancel_message(child: uuid.UUID, reason: str, *, compensate: bool = False) -> Outgoing:
    """To a child: cancel."""
    return Outgoing(child, MessageKind.CANCEL, None, json.dumps({"reason": reason, "compensate": compensate}))
