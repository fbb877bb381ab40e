"""How nodes and runs end: a node is done, a step fails for good, the run completes, fails, or turns to its rollback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from durable.core.moves import move, without
from durable.core.state import Ending, Entry, EntryKind, Failure, MessageKind, Run, View
from durable.core.transition import Outgoing, Transition
from durable.core.undo_targets import targets
from durable.define.nodes import Node
from durable.values import JsonText, Status


def node_done(
    view: View, now: datetime, node: Node, value: JsonText, *, entries: tuple[Entry, ...] = (), **write: Any
) -> Transition:
    """The node under the cursor is done: journal it, move the cursor; after the last node the run completes."""
    run = view.run
    if not entries or entries[-1].step_id != node.name:  # its own comes last
        begun = run.frame.get(node.name)
        since = begun.since if begun else None
        own = Entry(node.name, EntryKind(node.kind), "completed", value, started_at=since or now, finished_at=now)
        entries = (*entries, own)
    write = {  # what the caller says wins
        "entries": entries,
        "current_step": run.current_step + 1,
        "frame": without(run, *[entry.step_id for entry in entries]),
        "claim": None,
        **write,
    }
    if _is_last(view) and not asked(view):
        return complete(view, now, **write)
    return move(view, now, Status.RUNNING, **write)


def complete(view: View, now: datetime, *, entries: tuple[Entry, ...] = (), **write: Any) -> Transition:
    """All nodes are done and there is nothing left to compute. `entries` are the last ones."""
    if view.run.parent_id is not None:  # who else wants the result reads it from the journal
        passed = view.ahead(view.run, {**view.journal, **{entry.step_id: entry for entry in entries}})
        write = _sending(write, _answer(view, Status.COMPLETED, result=result_text(passed)))
    return move(view, now, Status.COMPLETED, entries=entries, **write)


def fail(view: View, now: datetime, failure: Failure, **write: Any) -> Transition:
    """The run fails: roll back first if there is anything to undo, else at once.

    Children that still run are told to cancel, with their own rollback, and are awaited: one that was faster than that
    has to be undone. If a cancel waits for the handlers to end, a failure of theirs does not make it a failed run.
    """
    run = view.run
    ended = {entry.step_id for entry in write.get("entries", ())}
    children = {s: begun for s, begun in run.frame.items() if begun.child is not None and s not in ended}
    stop = [_cancel(begun.child, "its parent failed", compensate=True) for begun in children.values()]
    ending = run.ending or Ending(Status.FAILED, failure)
    write = {"claim": None, "pausing": False, "error": ending.error, **_sending(write, stop)}
    if targets(view) or children:
        return move(view, now, Status.COMPENSATING, ending=ending, **{**write, "frame": children})
    return end(view, now, ending.status, **write)


def end(view: View, now: datetime, status: Status, **write: Any) -> Transition:
    """The run ends `failed` or `canceled`; its parent hears of it."""
    error = write.get("error", view.run.error)
    reason = write.get("reason", view.run.reason)
    answer = _answer(view, status, error=error, reason=reason)
    return move(view, now, status, **_sending(write, answer))


def result_text(view: View) -> JsonText:
    """The result of a completed run: what `result=fn` gave, else ``{node: result}`` in the order of definition."""
    computed = view.journal.get("run:result")
    if computed is not None:
        return computed.result or "null"
    nodes = view.workflow.nodes if view.workflow else ()
    done = {node.name: view.journal[node.name].result or "null" for node in nodes if node.name in view.journal}
    return object_text(done)


def object_text(values: dict[str, JsonText]) -> JsonText:
    """A JSON object put together from texts that are not parsed."""
    return "{" + ",".join([f"{_quoted(key)}:{text}" for key, text in values.items()]) + "}"


def failure_json(failure: Failure | None) -> dict[str, Any] | None:
    """A failure as it travels in a message."""
    if failure is None:
        return None
    names = Failure.__dataclass_fields__
    return {name: value for name in names if (value := getattr(failure, name)) is not None}


def _is_last(view: View) -> bool:
    assert view.workflow is not None
    return view.run.current_step + 1 == len(view.workflow.nodes) and view.workflow.result is None


def asked(view: View) -> bool:
    """Whether somebody asked for a pause or a cancel meanwhile: then the run must not complete over it."""
    unread = any(m.kind in (MessageKind.PAUSE, MessageKind.CANCEL) for m in view.inbox)
    return unread or view.run.pausing or view.run.ending is not None


def _answer(
    view: View, status: Status, *, result: JsonText = "null", error: Failure | None = None, reason: str | None = None
) -> list[Outgoing]:
    """The message that tells a run's parent how it ended."""
    run = view.run
    if run.parent_id is None or run.parent_step is None:
        return []
    name = run.ending.answer_to if run.ending and run.ending.answer_to else run.parent_step
    return [Outgoing(run.parent_id, MessageKind.CHILD, name, answer_text(run, status, result, error, reason))]


def answer_text(run: Run, status: Status, result: JsonText, error: Failure | None, reason: str | None) -> JsonText:
    """What a parent is told of its child's end. It says which run that is: a retried parent has a new child."""
    about = json.dumps({"error": failure_json(error), "reason": reason}, ensure_ascii=False)[1:-1]
    return f'{{"run":"{run.chain or run.id}","status":"{status.value}","result":{result},{about}}}'


def _cancel(child: Any, reason: str, *, compensate: bool) -> Outgoing:
    body = json.dumps({"reason": reason, "compensate": compensate})
    return Outgoing(child, MessageKind.CANCEL, None, body)


_quoted: Final = json.JSONEncoder(ensure_ascii=False).encode


def _sending(write: dict[str, Any], more: Sequence[Outgoing]) -> dict[str, Any]:
    return {**write, "outgoing": (*write.get("outgoing", ()), *more)}
