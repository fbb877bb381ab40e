"""Workflows written as ordinary async functions: the ``@workflow`` decorator.

The function is the workflow's *body*: a coroutine that awaits nothing but operations of its context. What it awaits is
executed and journaled by the engine; a body is replayed from the journal whenever its run goes on.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar, overload

from durable.define.annotations import annotation_of, return_annotation
from durable.define.builder import check_name
from durable.define.nodes import Workflow
from durable.define.options import Seconds, checked_seconds, refuse_unknown
from durable.define.payload import ANY, Schema
from durable.errors import DefinitionError

if TYPE_CHECKING:
    from durable.core.functions.context import Context

In = TypeVar("In")
Out = TypeVar("Out")
AnyBody: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]

CANCEL_TIMEOUT: Final = 30.0
"""Seconds that a canceled body has for its clean-up."""


class WorkflowFunction(Generic[In, Out]):
    """A workflow made from an async function: hand it to ``start``, ``register`` and the like.

    Calling it gives the coroutine of the function itself.
    """

    def __init__(self, body: AnyBody, made: Workflow) -> None:
        self._body, self.workflow = body, made
        self.__doc__, self.__name__, self.__wrapped__ = body.__doc__, body.__name__, body

    @property
    def name(self) -> str:
        return self.workflow.name

    @property
    def version(self) -> str:
        return self.workflow.version

    @property
    def place(self) -> str:
        """``file:line`` of the function."""
        return self.workflow.place

    @property
    def input(self) -> Schema:
        """The schema of the input."""
        return self.workflow.input

    def __call__(self, ctx: Context, *given: Any) -> Coroutine[Any, Any, Out]:
        return self._body(ctx, *given)

    def __repr__(self) -> str:
        return f"<workflow {self.name!r}, version {self.version}, a function at {self.place}>"


@overload
def workflow(body: Callable[[Context, In], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[In, Out]: ...
@overload
def workflow(body: Callable[[Context], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[None, Out]: ...
@overload
def workflow(*, name: str | None = None, version: str = "1", cancel_timeout: Seconds | None = None) -> Decorator: ...
def workflow(body: Any = None, /, **options: Any) -> Any:
    """Make a workflow of an async function ``async def order(ctx: Context, order: Order) -> Receipt``.

    - `name`: default: the function's. `version`: several versions of one name may exist side by side.
    - `cancel_timeout`: seconds (or a timedelta) that the body has for clean-up when a run is canceled: default 30, if
      its source mentions ``on_cancel`` or ``Canceled``; given, it has them in any case.

    Input and result are of the types that the annotations declare. Raises DefinitionError.
    """
    if body is None:
        return lambda decorated: make_function(decorated, **options)
    return make_function(body, **options)


class Decorator(Protocol):
    """What ``@workflow(...)`` with options answers."""

    @overload
    def __call__(self, body: Callable[[Context, In], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[In, Out]: ...
    @overload
    def __call__(self, body: Callable[[Context], Coroutine[Any, Any, Out]], /) -> WorkflowFunction[None, Out]: ...


def make_function(
    body: Any, *, name: str | None = None, version: str = "1", cancel_timeout: Seconds | None = None, **unknown: Any
) -> WorkflowFunction[Any, Any]:
    """See :func:`workflow`."""
    where = f"@workflow {getattr(body, '__qualname__', repr(body))}"
    refuse_unknown(where, unknown, ("name", "version", "cancel_timeout"))
    if not inspect.iscoroutinefunction(body) or not isinstance(body, types.FunctionType):
        raise DefinitionError(f"{where}: a workflow is an async function: async def order(ctx, order): ...")
    name = body.__name__ if name is None else name
    check_name(name, where=where, what="the workflow's name")
    if not isinstance(version, str):
        raise DefinitionError(f"{where}: version must be a string, not {version!r}: write version='{version}'")
    check_name(version, where=where, what="the version", reserved="")
    given = _parameters(body, where)
    limit = None if cancel_timeout is None else checked_seconds(cancel_timeout, f"{where}: cancel_timeout")
    made = Workflow(
        name=name,
        version=version,
        input=_schema(body, given[0].name, where) if given else Schema.of_input(Any),
        place=f"{body.__code__.co_filename}:{body.__code__.co_firstlineno}",
        body=body,
        output=_output(body, where),
        takes_input=bool(given),
        cleans_up=limit is not None or cleans_up(body),
        cancel_timeout=CANCEL_TIMEOUT if limit is None else limit,
    )
    return WorkflowFunction(body, made)


def _parameters(body: types.FunctionType, where: str) -> list[inspect.Parameter]:
    """Those after the context."""
    parameters = list(inspect.signature(body).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others = [p for p in parameters if p not in positional and p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    required = [p for p in positional if p.default is p.empty]
    if not positional or len(required) > 2 or others:
        raise DefinitionError(f"{where}: it is called with a context and the input: async def order(ctx, order)")
    return positional[1:2]


def _schema(body: types.FunctionType, parameter: str, where: str) -> Schema:
    try:
        return Schema.of_input(annotation_of(body, parameter))
    except DefinitionError as error:
        raise DefinitionError(f"{where}: the input {parameter!r}: {error}") from error


def _output(body: types.FunctionType, where: str) -> Schema:
    try:
        annotation = return_annotation(body)
        return ANY if annotation is Any else Schema(annotation)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: the result: {error}") from error


_MARKS: Final = frozenset({"on_cancel", "Canceled"})


def cleans_up(function: types.FunctionType) -> bool:
    """Whether the source of a body, or of a function that it names, mentions what a clean-up needs.

    Read from the compiled code: a run whose body has none can be canceled by anyone at once, without a worker.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [function]
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        code = found.__code__ if isinstance(found, types.FunctionType) else found
        if _MARKS & _words(code):
            return True
        waiting += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        if isinstance(found, types.FunctionType):
            waiting += _named(found)
    return False


def _words(code: types.CodeType) -> set[str]:
    keywords = {word for const in code.co_consts if isinstance(const, tuple) for word in const if isinstance(word, str)}
    return {*code.co_names, *code.co_freevars, *keywords}


def _named(function: types.FunctionType) -> list[types.FunctionType]:
    """The functions of the same module that it may call."""
    names = {*function.__code__.co_names}
    names |= {n for c in function.__code__.co_consts if isinstance(c, types.CodeType) for n in c.co_names}
    closed = []
    for cell in function.__closure__ or ():
        try:
            closed.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    found = [function.__globals__.get(name) for name in names] + closed
    return [f for f in found if isinstance(f, types.FunctionType) and f.__module__ == function.__module__]
