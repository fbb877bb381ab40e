"""Child workflows: started in the parent's transaction, heard of by a message when they end. Nobody polls."""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from typing import Any

from durable.core.finish import node_done
from durable.core.give_up import node_failed
from durable.core.moves import park, with_step
from durable.core.state import Begun, Entry, EntryKind, Failure, Message, MessageKind, View
from durable.core.transition import Call, ChildStart, Decision, Purpose, Transition
from durable.define.nodes import ChildWorkflow, Work
from durable.errors import PayloadError
from durable.values import Status, WaitingFor, child_id


def plan_child(view: View, node: ChildWorkflow, now: datetime) -> Decision:
    """Find out which workflow and which input, start it, wait for it, take its result."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.child is not None:
        return _await(view, node, now, begun)
    if isinstance(node.workflow, Work) and _chosen(view, f"choice:{node.name}") is None:
        return Call(f"choice:{node.name}", Purpose.CHOICE, node.workflow)
    if node.map_input is not None and _chosen(view, f"input:{node.name}") is None:
        return Call(f"input:{node.name}", Purpose.CHOICE, node.map_input)
    return _start(view, node, now)


def _start(view: View, node: ChildWorkflow, now: datetime) -> Transition | None:
    name, version = _which(view, node)
    workflow = view.registry.find(name, version) if version else view.registry.latest(name)
    if workflow is None:
        return park(view, now, WaitingFor.DEFINITION, name=f"{name}@{version or ''}")
    given = view.run.input if node.map_input is None else _chosen(view, f"input:{node.name}") or "null"
    try:
        given = workflow.input.dump(workflow.input.load(given))
    except PayloadError as error:
        text = f"the input of child workflow {name!r} for {node.name!r}: {error}"
        return node_failed(view, now, node, Failure("durable.errors.PayloadError", text, "critical", node.name))
    child = child_id(view.run.id, node.name, view.run.retries)
    start = ChildStart(child, workflow.name, workflow.version, given, node.name)
    frame = with_step(view.run, node.name, Begun(since=now, waits=WaitingFor.CHILD, child=child))
    return park(view, now, WaitingFor.CHILD, name=node.name, frame=frame, children=(start,))


def _which(view: View, node: ChildWorkflow) -> tuple[str, str | None]:
    """Name and version of the child; a function may have answered a name, or a workflow as ``[name, version]``."""
    if isinstance(node.workflow, str):
        return node.workflow, node.version
    chosen = json.loads(_chosen(view, f"choice:{node.name}") or "null")
    name, version = (chosen, None) if isinstance(chosen, str) else chosen
    return name, node.version or version


def _await(view: View, node: ChildWorkflow, now: datetime, begun: Begun) -> Transition | None:
    message = answer(view, node.name, begun.child)
    if message is None:
        return park(view, now, WaitingFor.CHILD, name=node.name)
    return _ended(view, node, now, begun, message)


def _ended(view: View, node: ChildWorkflow, now: datetime, begun: Begun, message: Message) -> Transition:
    body: dict[str, Any] = json.loads(message.body or "{}")
    taken = {message.seq: node.name}
    extra = {"child": str(begun.child)}
    if body.get("status") == Status.COMPLETED:
        result = json.dumps(body.get("result"), ensure_ascii=False, separators=(",", ":"))
        done = Entry(
            node.name, EntryKind.CHILD, "completed", result, started_at=begun.since, finished_at=now, extra=extra
        )
        return node_done(view, now, node, result, entries=(done,), taken=taken)
    failure = _child_failed(node, body, begun)
    entry = Entry(
        node.name, EntryKind.CHILD, "failed", error=failure, started_at=begun.since, finished_at=now, extra=extra
    )
    return node_failed(view, now, node, failure, entries=(entry,), taken=taken)


def _child_failed(node: ChildWorkflow, body: dict[str, Any], begun: Begun) -> Failure:
    error = body.get("error") or {}
    how = "was canceled" if body.get("status") == Status.CANCELED else "failed"
    why = f"{error['type']}: {error['message']}" if error else body.get("reason") or "no reason given"
    message = f"child workflow of {node.name!r} ({begun.child}) {how}: {why}"
    details = {"child": {"id": str(begun.child), "status": body.get("status"), "error": error or None}}
    return Failure("durable.errors.ChildFailed", message, "error", node.name, details=details)


def answer(view: View, name: str, child: uuid.UUID | None) -> Message | None:
    """What `child` told of its end. A child of before a retry may answer late: that is not heard."""
    told = (m for m in view.inbox if m.kind is MessageKind.CHILD and m.name == name)
    return next((m for m in told if json.loads(m.body or "{}").get("run") == str(child)), None)


def _chosen(view: View, step_id: str) -> str | None:
    entry = view.journal.get(step_id)
    return entry.result or "null" if entry is not None and entry.status == "completed" else None
