"""Which workflows a process knows, by name and version. One registry an app; there is no global one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from durable.define.builder import Builder
from durable.define.nodes import Workflow
from durable.errors import DefinitionError, WorkflowNotRegistered


class Registry:
    """Workflows by name and version, in the order in which they were added.

    A Builder may still grow when it is added: its nodes are taken at each look-up.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Builder[Any] | Workflow] = {}
        self._latest: dict[str, str] = {}

    def add(self, workflow: Builder[Any] | Workflow) -> None:
        """Make a workflow known; adding the same object again changes nothing.

        Raises DefinitionError if another one has its name and version, naming both places.
        """
        if not isinstance(workflow, Builder | Workflow):
            raise DefinitionError(f"{workflow!r} is no workflow: register what define() returned")
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
        return entry.workflow if isinstance(entry, Builder) else entry

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


def _same(one: Builder[Any] | Workflow, other: Builder[Any] | Workflow) -> bool:
    if one is other:
        return True
    built = [w.workflow if isinstance(w, Builder) and w.nodes else w for w in (one, other)]
    return built[0] is built[1]
