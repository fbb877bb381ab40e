"""What an app knows of workflows: how it is told, and what it shows of them. Shared by both facades."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Never, TypeVar, overload

from durable.define.builder import Builder
from durable.define.builder import define as new_builder
from durable.define.function import AnyBody, Decorator, WorkflowFunction, make_function
from durable.define.nodes import Workflow
from durable.define.options import Handler, Seconds
from durable.define.registry import AnyWorkflow, Registry
from durable.engine.hooks import ErrorReport, Hooks, StatusChange
from durable.errors import ConfigurationError, DefinitionError, WorkflowNotRegistered

if TYPE_CHECKING:
    from durable.core.functions.context import Context

In = TypeVar("In")
Out = TypeVar("Out")
OnStatusChange = TypeVar("OnStatusChange", bound=Callable[[StatusChange], object])
OnError = TypeVar("OnError", bound=Callable[[ErrorReport], object])


class Definitions:
    """The workflows of one app. Modules named by ``imports=`` are imported when a workflow is first looked for, and
    not when the app is made: they may import the app's module in their turn."""

    def __init__(self, workflows: Iterable[AnyWorkflow] = (), imports: Iterable[str] = ()) -> None:
        if isinstance(imports, str):
            raise ConfigurationError(f"imports={imports!r} must be a list of modules' names: write [{imports!r}]")
        if isinstance(workflows, Builder | WorkflowFunction | Workflow):
            raise ConfigurationError(f"workflows= takes a list: write [{workflows.name}]")
        self.hooks = Hooks()
        self._known = Registry()
        self._imports = list(imports)
        self._importing = threading.RLock()
        for workflow in workflows:
            self._known.add(workflow)

    @property
    def known(self) -> Registry:
        """What was registered so far; nothing is imported for it."""
        return self._known

    @property
    def registry(self) -> Registry:
        """All workflows, those of ``imports=`` included. Raises ConfigurationError if an import fails."""
        if self._imports:
            with self._importing:
                while self._imports:
                    for workflow in workflows_in(self._imports[0]):
                        self._known.add(workflow)
                    self._imports.pop(0)
        return self._known


class Defining:
    """The methods of an app that define workflows."""

    _definitions: Definitions

    @property
    def registry(self) -> Registry:
        """All workflows of this app, in all versions. Raises ConfigurationError if a module of ``imports=`` fails."""
        return self._definitions.registry

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The workflows by name, each in the version that was added last. Read-only, and always up to date."""
        return Workflows(self.registry)

    @property
    def hooks(self) -> Hooks:
        """What `on_status_change` and `on_error` have made known."""
        return self._definitions.hooks

    def on_status_change(self, hook: OnStatusChange) -> OnStatusChange:
        """Decorator: call `hook`, a function of one :class:`StatusChange`, after each change of a run's status.

        After the commit, at least once; the same change has the same id each time. Workers of this app call it: a sync
        hook in a thread, an async one on their event loop. One that raises is logged and called again later, and never
        touches the run. Raises DefinitionError if it can't be called with one argument.
        """
        self.hooks.add("status", hook)
        return hook

    def on_error(self, hook: OnError) -> OnError:
        """Decorator: call `hook`, a function of one :class:`ErrorReport`, after each failed attempt of a step, and
        when a run fails by something else. Otherwise as :meth:`on_status_change`."""
        self.hooks.add("error", hook)
        return hook

    def register(self, *workflows: AnyWorkflow) -> None:
        """Make workflows known that were defined without an app. The same one again changes nothing.

        Raises DefinitionError for another one of the same name and version; the message names both places.
        """
        for workflow in workflows:
            self._definitions.known.add(workflow)

    @overload
    def define(
        self, name: str, *, version: str = "1", input: type[In], result: Handler | None = None, **unknown: Never
    ) -> Builder[In]: ...
    @overload
    def define(
        self, name: str, *, version: str = "1", input: Any = Any, result: Handler | None = None, **unknown: Never
    ) -> Builder[Any]: ...
    def define(
        self,
        name: str,
        *,
        version: str = "1",
        input: Any = Any,  # noqa: A002  # the name that users expect
        result: Handler | None = None,
        **unknown: Never,
    ) -> Builder[Any]:
        """Begin a workflow and register it at once; nodes are added by the methods of the Builder that this returns.

        See :func:`durable.define` for the arguments. Raises DefinitionError.
        """
        builder: Builder[Any] = new_builder(name, version=version, input=input, result=result, **unknown)
        self.register(builder)
        return builder

    @overload
    def workflow(self, body: Callable[[Context, In], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[In, Out]: ...
    @overload
    def workflow(self, body: Callable[[Context], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[None, Out]: ...
    @overload
    def workflow(
        self, /, *, name: str | None = None, version: str = "1", cancel_timeout: Seconds | None = None
    ) -> Decorator: ...
    def workflow(
        self, body: Any = None, /, *, name: str | None = None, version: str = "1", cancel_timeout: Seconds | None = None
    ) -> Any:
        """Make a workflow of an async function and register it at once: ``@app.workflow`` or ``@app.workflow(...)``.

        See :func:`durable.workflow` for the options. Raises DefinitionError.
        """

        def made(decorated: AnyBody) -> WorkflowFunction[Any, Any]:
            function = make_function(decorated, name=name, version=version, cancel_timeout=cancel_timeout)
            self.register(function)
            return function

        return made if body is None else made(body)


class Workflows(Mapping[str, Workflow]):
    """A read-only view of a registry: by name, the version that was added last."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> Workflow:
        found = self._registry.latest(name)
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._registry

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.names())

    def __len__(self) -> int:
        return len(self._registry.names())

    def __repr__(self) -> str:
        versions = ", ".join(f"{name!r}: {version}" for name, version in sorted(self._registry.known()))
        return f"<workflows {versions or 'none'}>"


def workflows_in(module: str) -> list[AnyWorkflow]:
    """The workflows at the top level of a module. Raises ConfigurationError if it can't be imported or has none."""
    try:
        imported = importlib.import_module(module)
    except DefinitionError:
        raise  # says where and what already
    except Exception as error:
        raise ConfigurationError(f"cannot import {module!r}, of imports=: {type(error).__name__}: {error}") from error
    defined = (value for value in vars(imported).values() if isinstance(value, Builder | WorkflowFunction | Workflow))
    found = list({id(value): value for value in defined}.values())
    if not found:
        raise ConfigurationError(
            f"the module {module!r}, of imports=, has no workflow at its top level: "
            "assign what define() or @workflow made to a name there"
        )
    return found


def total_steps(registry: Registry, workflow: str, version: str) -> int | None:
    """How many nodes a workflow has; None for a function, and if it is not known here."""
    try:
        found = registry.find(workflow, version)
    except DefinitionError:
        return None
    return len(found.nodes) if found is not None and found.body is None else None


def required(registry: Registry, workflow: str | AnyWorkflow, version: str | None) -> Workflow:
    """The registered definition that is meant. Raises WorkflowNotRegistered."""
    if isinstance(workflow, Builder | WorkflowFunction | Workflow):
        return registry.require(workflow.name, workflow.version if version is None else version)
    if not isinstance(workflow, str):
        raise WorkflowNotRegistered(repr(workflow), version, known=registry.known())
    return registry.require(workflow, version)
