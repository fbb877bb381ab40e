"""Which journal entries a rollback has to undo, and with what."""

from __future__ import annotations

from dataclasses import dataclass

from durable.core.state import Entry, EntryKind, View
from durable.define.nodes import ChildWorkflow, Loop, Node, Parallel, Route, Step, Work


@dataclass(frozen=True, slots=True)
class Target:
    """A finished entry and its compensator. `work` is None for a `child`, which rolls itself back, and for a function's
    step, whose compensator only its body knows."""

    entry: Entry
    work: Work | None = None
    child: bool = False

    @property
    def undo_id(self) -> str:
        return f"undo:{self.entry.step_id}"


def targets(view: View) -> list[Target]:
    """What is still to be undone, newest first. Empty where the definition is not known."""
    if view.workflow is None:
        return []
    newest_first = sorted(view.journal.values(), key=lambda entry: -entry.seq)
    if view.workflow.body is not None:
        return [
            t for t in map(_of_function, _since_checkpoint(view, newest_first)) if t and t.undo_id not in view.journal
        ]
    nodes = {node.name: node for node in view.workflow.nodes}
    found = (_target(nodes, entry) for entry in newest_first if entry.status == "completed")
    return [t for t in found if t is not None and t.undo_id not in view.journal]


def is_target(view: View, entry: Entry) -> bool:
    """Whether a rollback has to undo `entry`."""
    if view.workflow is not None and view.workflow.body is not None:
        return _of_function(entry) is not None
    nodes = view.workflow.nodes if view.workflow is not None else ()
    return _target({node.name: node for node in nodes}, entry) is not None


def _since_checkpoint(view: View, entries: list[Entry]) -> list[Entry]:
    """What a rollback is about: everything, or what was done since the checkpoint to which it goes back."""
    ending = view.run.ending
    if ending is None or ending.to is None or ending.to not in view.journal:
        return entries
    return [entry for entry in entries if entry.seq > view.journal[ending.to].seq]


def _of_function(entry: Entry) -> Target | None:
    extra = entry.extra or {}
    if entry.status != "completed" or not extra.get("undo") or extra.get("copied"):
        return None
    return Target(entry, child=entry.kind is EntryKind.CHILD)


def _target(nodes: dict[str, Node], entry: Entry) -> Target | None:
    node = nodes.get(entry.parent or entry.step_id)
    match entry.kind, node:
        case EntryKind.CHILD, ChildWorkflow(compensate=True):
            return None if (entry.extra or {}).get("copied") else Target(entry, child=True)
        case EntryKind.STEP, Step(work=work):
            pass
        case EntryKind.ITERATION, Loop(work=work):
            pass
        case EntryKind.BRANCH, (Parallel() | Route()) as fork if entry.step_id.partition("/")[2] in fork.branches:
            work = fork.branches[entry.step_id.partition("/")[2]]
        case _:
            return None
    if work.compensate is None or (entry.extra or {}).get("copied"):  # what a fork copied, its origin undoes
        return None
    return Target(entry, work.compensate)
