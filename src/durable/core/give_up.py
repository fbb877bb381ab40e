"""When work fails for good: what is journaled, and what becomes of its node and its run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from durable.core.finish import fail
from durable.core.moves import NOT_BEGUN, move, without
from durable.core.state import Entry, EntryKind, EntryStatus, Failure, View
from durable.core.transition import Call, Purpose, Transition
from durable.define.nodes import Loop, Node, Parallel
from durable.values import JsonText, Status

_KINDS = {
    Purpose.STEP: EntryKind.STEP,
    Purpose.BRANCH: EntryKind.BRANCH,
    Purpose.ITERATION: EntryKind.ITERATION,
    Purpose.CHOICE: EntryKind.CHOICE,
    Purpose.RESULT: EntryKind.RESULT,
    Purpose.UNDO: EntryKind.UNDO,
}
_NESTED = frozenset({Purpose.BRANCH, Purpose.ITERATION, Purpose.CHOICE})


def step_failed(
    view: View, now: datetime, call: Call, failure: Failure, *, started_at: datetime | None = None, **write: Any
) -> Transition:
    """The work of `call` has failed for good. A branch of a parallel only records it: its siblings may still run."""
    node = current_node(view)
    entry = entry_of(view, call, now, "failed", error=failure, started_at=started_at)
    if isinstance(node, Parallel) and call.purpose is Purpose.BRANCH:
        frame = without(view.run, call.step_id)
        return move(view, now, Status.RUNNING, entries=(entry,), frame=frame, **write)
    return node_failed(view, now, node, failure, entries=(entry,), **write)


def node_failed(
    view: View, now: datetime, node: Node | None, failure: Failure, *, entries: tuple[Entry, ...] = (), **write: Any
) -> Transition:
    """The node under the cursor has failed, and with it the run."""
    if node is not None and all(entry.step_id != node.name for entry in entries):
        begun = view.run.frame.get(node.name)
        since = begun.since if begun is not None else None
        own = Entry(node.name, EntryKind(node.kind), "failed", error=failure, started_at=since or now, finished_at=now)
        entries = (*entries, own)
    return fail(view, now, failure, entries=entries, **write)


def branches_failed(view: View, now: datetime, node: Parallel, entries: Mapping[str, Entry]) -> Transition:
    """All branches have ended, some of them badly."""
    failed = {branch: entry.error for branch, entry in entries.items() if entry.status == "failed" and entry.error}
    first = next(iter(failed.values()))
    told = "; ".join(f"{branch}: {error.type}: {error.message}" for branch, error in failed.items())
    message = f"{len(failed)} of {len(entries)} branches of {node.name!r} failed: {told}"
    branches = {
        branch: {"type": e.type, "message": e.message, "kind": e.kind, "attempts": e.attempts}
        for branch, e in failed.items()
    }
    failure = Failure(
        "durable.errors.JoinFailed",
        message,
        first.kind,
        node.name,
        first.attempts,
        first.traceback,
        {"branches": branches},
    )
    return node_failed(view, now, node, failure)


def loop_limit_reached(view: View, now: datetime, node: Loop) -> Transition:
    """One iteration more would be needed than the loop may make."""
    message = f"loop {node.name!r} did not meet its condition within {node.max_iterations} iterations"
    return node_failed(view, now, node, Failure("durable.errors.LoopLimitExceeded", message, "critical", node.name))


def entry_of(
    view: View,
    call: Call,
    now: datetime,
    status: EntryStatus,
    *,
    started_at: datetime | None = None,
    result: JsonText | None = None,
    error: Failure | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Entry:
    """The journal entry of the work of `call`."""
    begun = view.run.frame.get(call.step_id, NOT_BEGUN)
    since = started_at or begun.since or now
    kind, parent = (call.kind, call.parent) if call.kind is not None else _place(view, call)  # of a function, or not
    return Entry(call.step_id, kind, status, result, error, begun.attempts + 1, since, now, parent, extra or call.extra)


def _place(view: View, call: Call) -> tuple[EntryKind, str | None]:
    """What a builder's call is an entry of, and within which node."""
    kind = _KINDS[call.purpose]
    node = current_node(view) if call.purpose in _NESTED else None
    if node is None:
        return kind, None
    if call.step_id == node.name:  # a wait whose name or time is computed
        return EntryKind(node.kind), None
    return kind, node.name


def current_node(view: View) -> Node | None:
    """The node under the cursor; None past the last one."""
    assert view.workflow is not None
    nodes = view.workflow.nodes
    return nodes[view.run.current_step] if view.run.current_step < len(nodes) else None
