"""Which journal entries a rollback has to undo, and with what."""

from __future__ import annotations

from dataclasses import dataclass

from durable.core.state import Entry, EntryKind, View
from durable.define.nodes import ChildWorkflow, Loop, Node, Parallel, Route, Step, Work


@dataclass(frozen=True, slots=True)
class Target:
    """A finished entry and its compensator; `work` is None for a child, which rolls itself back."""

    entry: Entry
    work: Work | None

    @property
    def undo_id(self) -> str:
        return f"undo:{self.entry.step_id}"


def targets(view: View) -> list[Target]:
    """What is still to be undone, newest first. Empty where the definition is not known."""
    if view.workflow is None:
        return []
    nodes = {node.name: node for node in view.workflow.nodes}
    newest_first = sorted(view.journal.values(), key=lambda entry: -entry.seq)
    found = (_target(nodes, entry) for entry in newest_first if entry.status == "completed")
    return [t for t in found if t is not None and t.undo_id not in view.journal]


def is_target(view: View, entry: Entry) -> bool:
    """Whether a rollback has to undo `entry`."""
    nodes = view.workflow.nodes if view.workflow is not None else ()
    return _target({node.name: node for node in nodes}, entry) is not None


def _target(nodes: dict[str, Node], entry: Entry) -> Target | None:
    node = nodes.get(entry.parent or entry.step_id)
    match entry.kind, node:
        case EntryKind.CHILD, ChildWorkflow(compensate=True):
            return Target(entry, None)
        case EntryKind.STEP, Step(work=work):
            pass
        case EntryKind.ITERATION, Loop(work=work):
            pass
        case EntryKind.BRANCH, (Parallel() | Route()) as fork if entry.step_id.partition("/")[2] in fork.branches:
            work = fork.branches[entry.step_id.partition("/")[2]]
        case _:
            return None
    return Target(entry, work.compensate) if work.compensate is not None else None
