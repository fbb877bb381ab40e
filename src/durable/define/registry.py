"""Which workflows a process knows, by name and version. One registry an app; there is no global one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from durable.define.builder import Builder
from durable.define.function import WorkflowFunction
from durable.define.nodes import Workflow
from durable.errors import DefinitionError, WorkflowNotRegistered

AnyWorkflow: TypeAlias = Builder[Any] | WorkflowFunction[Any, Any] | Workflow
"""A definition, as people hold it in their hands."""


class Registry:
    """Workflows by name and version, in the order in which they were added.

    A Builder may still grow when it is added: its nodes are taken at each look-up.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], AnyWorkflow] = {}
        self._latest: dict[str, str] = {}

    def add(self, workflow: AnyWorkflow) -> None:
        """Make a workflow known; adding the same object again changes nothing.

        Raises DefinitionError if another one has its name and version, naming both places.
        """
        if not isinstance(workflow, Builder | WorkflowFunction | Workflow):
            raise DefinitionError(f"{workflow!r} is no workflow: register what define() or @workflow made")
        key = workflow.name, workflow.version
        existing = self._entries.get(key)
        if existing is None:
            self._entries[key] = workflow
            self._latest[workflow.name] = workflow.version
        elif not _same(existing, workflow):
            raise DefinitionError(
                f"version {workflow.version!r} is defined twice, at {existing.place} and at {workflow.place}: "
                "give one of them another version or name",
                workflow=workflow.name,
            )

    def find(self, name: str, version: str) -> Workflow | None:
        """The workflow of this name and version, if it is known. Raises DefinitionError if it has no nodes."""
        entry = self._entries.get((name, version))
        return entry if isinstance(entry, Workflow) or entry is None else entry.workflow

    def latest(self, name: str) -> Workflow | None:
        """The version of `name` that was added last, if there is one."""
        version = self._latest.get(name)
        return None if version is None else self.find(name, version)

    def require(self, name: str, version: str | None = None) -> Workflow:
        """The workflow of this name and version (default: the one added last).

        Raises WorkflowNotRegistered, which lists what is known.
        """
        found = self.latest(name) if version is None else self.find(name, version)
        if found is None:
            raise WorkflowNotRegistered(name, version, known=self.known())
        return found

    def names(self) -> list[str]:
        """The known names, in the order in which they were first added."""
        return list(self._latest)

    def known(self) -> frozenset[tuple[str, str]]:
        """The known (name, version) pairs."""
        return frozenset(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._latest

    def __iter__(self) -> Iterator[Workflow]:
        return (self.require(name, version) for name, version in list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def _same(one: AnyWorkflow, other: AnyWorkflow) -> bool:
    if one is other:
        return True
    built = [w if isinstance(w, Workflow) or not _is_whole(w) else w.workflow for w in (one, other)]
    return built[0] is built[1]


def _is_whole(workflow: Builder[Any] | WorkflowFunction[Any, Any]) -> bool:
    return isinstance(workflow, WorkflowFunction) or bool(workflow.nodes)
