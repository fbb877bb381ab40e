"""What finished nodes yielded, read from the journal as the types that their handlers declared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from durable.core.moves import OPERATIONS
from durable.core.state import Entry
from durable.define import results as typed
from durable.define.nodes import Loop, Node, Parallel, Route, Step, WaitForSignal, Workflow
from durable.define.payload import ANY, Schema
from durable.errors import PayloadError

_STEP_ID = re.compile(r"(?:undo:)?(?P<node>[^/\[#]+)(?:\[\d+\])?(?:/(?P<branch>[^/\[#]+))?")


class Results(Mapping[str, Any]):
    """The results of the top-level nodes that have finished, loaded when they are asked for, each once."""

    def __init__(self, workflow: Workflow | None, journal: Mapping[str, Entry]) -> None:
        self._workflow, self._journal = workflow, journal
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            if not self._has(name):
                there = ", ".join(map(repr, self)) or "none yet"
                raise KeyError(f"no finished node {name!r}; finished: {there}")
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _has(self, name: str) -> bool:
        entry = self._journal.get(name)
        if self._workflow is None or entry is None or not _finished(entry):
            return False
        if self._workflow.body is not None:
            return entry.parent is None and entry.kind in OPERATIONS
        return name in self._workflow.by_name

    def _load(self, name: str) -> Any:
        assert self._workflow is not None
        if self._workflow.body is not None:  # a step is told its arguments; this is for those who want to look around
            return json.loads(self._journal[name].result or "null")
        return load_result(self._workflow, name, self._journal)

    def __iter__(self) -> Iterator[str]:
        if self._workflow is not None and self._workflow.body is not None:
            own = (entry for entry in self._journal.values() if entry.parent is None and entry.kind in OPERATIONS)
            return (entry.step_id for entry in own if _finished(entry))
        nodes = self._workflow.nodes if self._workflow is not None else ()
        return (node.name for node in nodes if _finished(self._journal.get(node.name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<results of {', '.join(self) or 'no node yet'}>"


def load_result(workflow: Workflow, name: str, journal: Mapping[str, Entry]) -> Any:
    """What the finished top-level node `name` yielded.

    Raises KeyError if it has not finished, PayloadError if its result does not match the type in the code any more.
    """
    node, entry = workflow.by_name.get(name), journal.get(name)
    if node is None or entry is None or not _finished(entry):
        raise KeyError(name)
    try:
        return typed.load_result(node, entry.result or "null")
    except PayloadError as error:
        raise error.at(f"the result of step {name!r} of workflow {workflow.name!r}") from None


def schema_of(workflow: Workflow | None, step_id: str) -> Schema:
    """The declared type of what the work behind a journal key (``build/api``, ``poll[2]``) yields; ANY if unknown."""
    node, found = node_of(workflow, step_id), _STEP_ID.match(step_id)
    match node:
        case Step() | Loop():
            return node.work.result
        case Parallel() | Route() if found is not None and found["branch"] in node.branches:
            return node.branches[found["branch"]].result
        case WaitForSignal():
            return node.payload
    return ANY


def node_of(workflow: Workflow | None, step_id: str) -> Node | None:
    """The top-level node that a journal key belongs to; None if the code has none."""
    found = _STEP_ID.match(step_id)
    if workflow is None or found is None:
        return None
    return workflow.by_name.get(found["node"])


def _finished(entry: Entry | None) -> bool:
    return entry is not None and entry.status == "completed"
