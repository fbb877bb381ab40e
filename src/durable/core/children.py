"""A builder's children: started in the parent's transaction, heard of by a message when they end. Nobody polls."""

from __future__ import annotations

import json
from datetime import datetime

from durable.core import progress
from durable.core.give_up import node_failed
from durable.core.moves import park
from durable.core.progress import answer as answer
from durable.core.state import View
from durable.core.transition import Call, Decision, Purpose, Transition
from durable.core.waits import carry
from durable.define.nodes import ChildWorkflow, Work
from durable.errors import PayloadError
from durable.values import WaitingFor


def plan_child(view: View, node: ChildWorkflow, now: datetime) -> Decision:
    """Find out which workflow and which input, start it, wait for it, take its result."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.child is not None:
        told = answer(view, node.name, begun.child)
        return carry(view, node, now, progress.child(view, node.name, begun, now, told))
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
        return node_failed(view, now, node, progress.child_refused(node.name, name, error))
    return carry(view, node, now, progress.begin_child(view, node.name, workflow, given, now))


def _which(view: View, node: ChildWorkflow) -> tuple[str, str | None]:
    """Name and version of the child; a function may have answered a name, or a workflow as ``[name, version]``."""
    if isinstance(node.workflow, str):
        return node.workflow, node.version
    chosen = json.loads(_chosen(view, f"choice:{node.name}") or "null")
    name, version = (chosen, None) if isinstance(chosen, str) else chosen
    return name, node.version or version


def _chosen(view: View, step_id: str) -> str | None:
    entry = view.journal.get(step_id)
    return entry.result or "null" if entry is not None and entry.status == "completed" else None
