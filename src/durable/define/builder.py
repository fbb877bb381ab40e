"""The builder: a workflow as a flat list of nodes, each checked as it is added."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Generic, Literal, Never, Self, TypeAlias, TypeVar, overload

from durable.define.nodes import (
    RAISE,
    ChildWorkflow,
    Loop,
    Node,
    Parallel,
    Route,
    Sleep,
    Step,
    WaitForSignal,
    Work,
    Workflow,
)
from durable.define.options import (
    OPTION_NAMES,
    UNSET,
    Branch,
    Handler,
    Options,
    Seconds,
    Unset,
    check_handler,
    checked_bool,
    checked_seconds,
    make_options,
    make_work,
    refuse_unknown,
)
from durable.define.payload import ANY, DURATION, LAST_YEAR, LOOSE, Schema
from durable.define.retry import Retry
from durable.errors import DefinitionError, DuplicateStepName, PayloadError

In = TypeVar("In")
T = TypeVar("T")
Branches: TypeAlias = Mapping[str, Handler | Branch]

MAX_NAME = 200
MAX_ITERATIONS = 1_000
"""How often a loop runs at most that says nothing else."""
_RESERVED = "/#[]:"  # they separate the parts of a journal key


@overload
def define(
    name: str, *, version: str = "1", input: type[In], result: Handler | None = None, **unknown: Never
) -> Builder[In]: ...
@overload
def define(
    name: str, *, version: str = "1", input: Any = Any, result: Handler | None = None, **unknown: Never
) -> Builder[Any]: ...
def define(
    name: str,
    *,
    version: str = "1",
    input: Any = Any,  # noqa: A002  # the name that users expect
    result: Handler | None = None,
    **unknown: Any,
) -> Builder[Any]:
    """Begin a workflow: a flat list of nodes, added by the methods of the Builder that this returns.

    - `name`: 1 to 200 characters without ``/ # [ ] :`` and control characters.
    - `version`: several versions of one name may exist side by side; a run keeps the one that it started with.
    - `input`: the type of what a run is started with; pydantic brings it back as that type.
    - `result`: a function of the context that gives the run's result. Default: ``{node: result}`` of all nodes.

    Raises DefinitionError.
    """
    where = f"workflow {name!r}"
    check_name(name, where="define()", what="the workflow's name")
    refuse_unknown(where, unknown, ("version", "input", "result"))
    if not isinstance(version, str):
        raise DefinitionError(f"{where}: version must be a string, not {version!r}: write version='{version}'")
    check_name(version, where=where, what="the version", reserved="")
    try:
        schema = Schema.of_input(input)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: input: {error}") from error
    work = None if result is None else make_work(result, where=f"{where}, result")
    return Builder(Workflow(name=name, version=version, nodes=(), input=schema, result=work, place=_caller()))


class Builder(Generic[In]):
    """A workflow in the making, and as it is so far: use it wherever a Workflow is wanted.

    Every method checks its arguments at once, adds one node, and returns the builder for chaining. Mistakes are
    DefinitionErrors that name the workflow and the node. `In` is the type of the input.
    """

    def __init__(self, empty: Workflow) -> None:
        self._empty = empty
        self._nodes: dict[str, Node] = {}
        self._workflow: Workflow | None = None

    @property
    def name(self) -> str:
        return self._empty.name

    @property
    def version(self) -> str:
        return self._empty.version

    @property
    def input(self) -> Schema:
        """The schema of the input."""
        return self._empty.input

    @property
    def place(self) -> str:
        """``file:line`` of the ``define()`` call."""
        return self._empty.place

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes so far, in order: a copy."""
        return tuple(self._nodes.values())

    @property
    def workflow(self) -> Workflow:
        """The frozen definition as it is now. Raises DefinitionError if it has no nodes."""
        if self._workflow is None:
            if not self._nodes:
                raise DefinitionError("it has no nodes: add one, as in .step('name', handler)", workflow=self.name)
            empty = self._empty
            self._workflow = Workflow(empty.name, empty.version, self.nodes, empty.input, empty.result, empty.place)
        return self._workflow

    def __repr__(self) -> str:
        return f"<workflow {self.name!r} version {self.version!r}: {', '.join(self._nodes) or 'no nodes yet'}>"

    def step(
        self,
        name: str,
        handler: Handler,
        *,
        retry: Retry | int | Unset | None = UNSET,
        compensate: Handler | Unset | None = UNSET,
        timeout: Seconds | Unset | None = UNSET,
        transactional: bool | Unset | None = UNSET,
        at_most_once: bool | Unset = UNSET,
        **unknown: Never,
    ) -> Self:
        """Run `handler(ctx)`, sync or async; what it returns is ``ctx.results[name]``.

        - `retry`: a :class:`Retry`, or the number of attempts. Default: 3 attempts, exponential from 1 s.
        - `compensate`: ``fn(ctx)`` that undoes the step (``ctx.output`` is what it returned) when the run is rolled
          back; may carry ``@step`` options of its own.
        - `timeout`: seconds (or a timedelta) that one attempt may take. Default: no limit.
        - `transactional`: True: the step keeps the run's transaction to its end (limit 30 s); False: never in it; None:
          it holds it while it is short.
        - `at_most_once`: an attempt whose worker died is never run again (StepInterrupted).
        """
        where = self._open(name)
        options = make_options(where=where, retry=retry, compensate=compensate, timeout=timeout,
                               transactional=transactional, at_most_once=at_most_once, **unknown)  # fmt: skip
        return self._add(Step(name, make_work(handler, where=where, options=options)))

    def parallel(
        self,
        name: str,
        branches: Branches,
        *,
        retry: Retry | int | Unset | None = UNSET,
        compensate: Handler | Unset | None = UNSET,
        timeout: Seconds | Unset | None = UNSET,
        transactional: bool | Unset | None = UNSET,
        at_most_once: bool | Unset = UNSET,
        **unknown: Never,
    ) -> Self:
        """Run all `branches` (``{name: handler or branch(...)}``) concurrently; the result is ``{branch: result}``.

        The options, as in :meth:`step`, are the defaults of the branches: ``branch(...)`` and ``@step`` win over them.
        """
        where = self._open(name)
        defaults = make_options(where=where, retry=retry, compensate=compensate, timeout=timeout,
                                transactional=transactional, at_most_once=at_most_once, **unknown)  # fmt: skip
        return self._add(Parallel(name, _branches(branches, where, defaults)))

    def route(
        self,
        name: str,
        selector: Handler,
        branches: Branches,
        *,
        retry: Retry | int | Unset | None = UNSET,
        compensate: Handler | Unset | None = UNSET,
        timeout: Seconds | Unset | None = UNSET,
        transactional: bool | Unset | None = UNSET,
        at_most_once: bool | Unset = UNSET,
        **unknown: Never,
    ) -> Self:
        """Ask `selector(ctx)` for the name of a branch, once, and run it; the result is ``{"branch": ..., "value":
        ...}``. A name that `branches` does not have is an UnknownBranch.

        The options, as in :meth:`step`, are the defaults of the branches, not the selector's.
        """
        where = self._open(name)
        defaults = make_options(where=where, retry=retry, compensate=compensate, timeout=timeout,
                                transactional=transactional, at_most_once=at_most_once, **unknown)  # fmt: skip
        check_handler(selector, where=where, what="the selector")
        chosen = make_work(selector, where=f"{where}, selector")
        return self._add(Route(name, chosen, _branches(branches, where, defaults)))

    def loop(
        self,
        name: str,
        handler: Handler,
        *,
        until: Callable[[Any, int], Any] | None = None,
        while_: Callable[[Any, int], Any] | None = None,
        map_input: Handler | None = None,
        feedback: Callable[[Any], Any] | None = None,
        max_iterations: int | None = None,
        keep: Literal["all", "last"] = "all",
        retry: Retry | int | Unset | None = UNSET,
        compensate: Handler | Unset | None = UNSET,
        timeout: Seconds | Unset | None = UNSET,
        transactional: bool | Unset | None = UNSET,
        at_most_once: bool | Unset = UNSET,
        **unknown: Never,
    ) -> Self:
        """Run `handler(ctx)` again and again, with ``ctx.item`` and ``ctx.iteration`` (from 0).

        - `until(result, iteration)` ends the loop after an iteration, `while_(ctx, iteration)` before one; not both.
        - `map_input(ctx)` gives the first item (default: the run's input), `feedback(result)` the next (default: the
          result).
        - `max_iterations`: without a condition the count, 0: nothing runs; with one, needing an iteration more is
          LoopLimitExceeded. Default: 1,000.
        - `keep`: the result is the list of ``all`` results, or the ``last`` one.
        - the other options as in :meth:`step`.
        """
        where = self._open(name)
        known = ("until", "while_", "map_input", "feedback", "max_iterations", "keep", *OPTION_NAMES)
        refuse_unknown(where, unknown, known)
        options = make_options(where=where, retry=retry, compensate=compensate, timeout=timeout,
                               transactional=transactional, at_most_once=at_most_once)  # fmt: skip
        work = make_work(handler, where=where, options=options)
        _check_loop_functions(where, until=until, while_=while_, map_input=map_input, feedback=feedback)
        if keep not in ("all", "last"):
            raise DefinitionError(f"{where}: keep must be 'all' or 'last', not {keep!r}")
        limit = _checked_limit(max_iterations, where)
        return self._add(Loop(name, work, until, while_, map_input, feedback, limit, keep))

    def sleep(self, name: str, duration: Seconds | datetime | Handler, **unknown: Never) -> Self:
        """Park the run for seconds, for a timedelta, or until an aware datetime; or for what `duration(ctx)` says.

        A negative literal is an error; a computed one means now.
        """
        where = self._open(name)
        refuse_unknown(where, unknown, ())
        if isinstance(duration, datetime):
            if duration.utcoffset() is None:
                raise DefinitionError(f"{where}: {duration!r} has no time zone: use datetime(..., tzinfo=UTC)")
            if duration.year > LAST_YEAR:
                raise DefinitionError(f"{where}: {duration!r} is too far away: at most the year {LAST_YEAR}")
            return self._add(Sleep(name, duration))
        if isinstance(duration, int | float | timedelta):
            return self._add(Sleep(name, timedelta(seconds=checked_seconds(duration, f"{where}: the duration"))))
        if not callable(duration):
            raise DefinitionError(
                f"{where}: the duration must be seconds, a timedelta, an aware datetime or a function of the context, "
                f"not {duration!r}"
            )
        return self._add(Sleep(name, make_work(duration, where=f"{where}, duration", result=DURATION)))

    def wait_for_signal(
        self,
        name: str,
        signal: str | Handler,
        *,
        type: Any = None,  # noqa: A002  # the name that users expect
        timeout: Seconds | None = None,
        on_timeout: Any = RAISE,
        **unknown: Never,
    ) -> Self:
        """Park the run until a signal comes; its payload is the result. One that came before is taken at once.

        - `signal`: its name, or a function of the context that gives it.
        - `type`: the payload's type. Default: any JSON value.
        - `timeout`: seconds or a timedelta; then the node fails with SignalTimeout. Default: none.
        - `on_timeout`: a value that the node yields instead of failing.
        """
        where = self._open(name)
        refuse_unknown(where, unknown, ("type", "timeout", "on_timeout"))
        named: str | Work
        if isinstance(signal, str):
            named = check_name(signal, where=where, what="the signal's name", reserved="")
        elif callable(signal):
            named = make_work(signal, where=f"{where}, signal", result=Schema(str))
        else:
            raise DefinitionError(f"{where}: the signal must be a name or a function of the context, not {signal!r}")
        payload = _schema(type, where)
        limit = None if timeout is None else timedelta(seconds=checked_seconds(timeout, f"{where}: timeout"))
        if on_timeout is not RAISE:
            if limit is None:
                raise DefinitionError(f"{where}: on_timeout without timeout is never used: give timeout=")
            on_timeout = _literal(on_timeout, payload, where)
        return self._add(WaitForSignal(name, named, payload, limit, on_timeout))

    def child_workflow(
        self,
        name: str,
        workflow: str | Builder[Any] | Workflow | Handler,
        *,
        version: str | None = None,
        map_input: Handler | None = None,
        compensate: bool = False,
        **unknown: Never,
    ) -> Self:
        """Start a run of another workflow and wait for its end; its result is the result.

        - `workflow`: a name, a workflow of either kind (in its version), or a function of the context that gives one.
        - `version`: default: the one defined last.
        - `map_input(ctx)` gives the child's input. Default: the run's own input.
        - `compensate`: whether a completed child is rolled back, through its own journal, when this run is.
        """
        where = self._open(name)
        refuse_unknown(where, unknown, ("version", "map_input", "compensate"))
        target: str | Work
        if isinstance(named := _child(workflow), tuple):
            target, own_version = named
        elif isinstance(workflow, str):
            target, own_version = check_name(workflow, where=where, what="the child workflow's name"), None
        else:
            assert not isinstance(workflow, Builder | Workflow)
            check_handler(workflow, where=where, what="the child workflow (a name, a Workflow or a function)")
            target, own_version = make_work(workflow, where=where, result=_CHILD), None
        if version is not None:
            own_version = check_name(version, where=where, what="the child's version", reserved="")
        given = None if map_input is None else make_work(map_input, where=f"{where}, map_input", result=LOOSE)
        checked_bool(compensate, f"{where}: compensate")
        return self._add(ChildWorkflow(name, target, own_version, given, compensate))

    def _open(self, name: str) -> str:
        """Check the name of a new node; how messages about it begin."""
        check_name(name, where=f"workflow {self.name!r}", what="the node's name")
        if name in self._nodes:
            raise DuplicateStepName(name, workflow=self.name, kind=self._nodes[name].kind)
        return f"workflow {self.name!r}, node {name!r}"

    def _add(self, node: Node) -> Self:
        self._nodes[node.name] = node
        self._workflow = None
        return self


def check_name(name: Any, *, where: str, what: str, reserved: str = _RESERVED) -> str:
    """`name` if it is 1 to 200 characters without reserved and control characters. Raises DefinitionError."""
    if not isinstance(name, str):
        raise DefinitionError(f"{where}: {what} must be a string, not {name!r}")
    if not name.strip():
        raise DefinitionError(f"{where}: {what} is empty")
    if len(name) > MAX_NAME:
        raise DefinitionError(f"{where}: {what} {name[:20]!a}... has {len(name)} characters: at most {MAX_NAME}")
    if name.isprintable() and set(reserved).isdisjoint(name):  # as nearly all are
        return str.__str__(name)
    for character in name:
        if character in reserved or unicodedata.category(character) in ("Cc", "Cs"):
            kind = "a character that separates journal keys" if character in reserved else "no printable character"
            raise DefinitionError(f"{where}: {what} {name!a} contains {character!a}, {kind}")
    return str.__str__(name)  # of a StrEnum's member its value


def _branches(branches: Any, where: str, defaults: Options) -> Mapping[str, Work]:
    if not isinstance(branches, Mapping):
        raise DefinitionError(f"{where}: the branches must be a mapping of names to handlers, not {branches!r}")
    if not branches:
        raise DefinitionError(f"{where}: it has no branches: give at least one, as in {{'name': handler}}")
    works = {}
    for given, value in branches.items():
        key = check_name(given, where=where, what="the branch's name")
        handler, options = (value.handler, value.options) if isinstance(value, Branch) else (value, Options())
        works[key] = make_work(handler, where=f"{where}, branch {key!r}", options=options, defaults=defaults)
    return MappingProxyType(works)


def _check_loop_functions(where: str, *, until: Any, while_: Any, map_input: Any, feedback: Any) -> None:
    if until is not None and while_ is not None:
        raise DefinitionError(f"{where}: until and while_ exclude each other: give one condition")
    for what, function, takes in (
        ("until", until, ("result", "iteration")),
        ("while_", while_, ("ctx", "iteration")),
        ("map_input", map_input, ("ctx",)),
        ("feedback", feedback, ("result",)),
    ):
        if function is not None:
            check_handler(function, where=where, what=what, takes=takes)


def _checked_limit(value: Any, where: str) -> int:
    if value is None:
        return MAX_ITERATIONS
    if isinstance(value, bool) or not isinstance(value, int):
        raise DefinitionError(f"{where}: max_iterations must be a whole number, not {value!r}")
    if value < 0:
        raise DefinitionError(f"{where}: max_iterations must not be negative, not {value}")
    return value


def _schema(annotation: Any, where: str) -> Schema:
    if annotation is None:
        return ANY
    try:
        return Schema(annotation)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: type: {error}") from error


def _literal(value: Any, payload: Schema, where: str) -> str:
    """The text of an on_timeout: a value of the payload's type, or any plain JSON value."""
    try:
        return payload.dump(value)
    except PayloadError:  # another type than a signal's payload, as None often is
        try:
            return ANY.dump(value)
        except PayloadError as error:
            raise DefinitionError(f"{where}: on_timeout can't be stored: {error}") from error


def _child(value: Any) -> Any:
    """Name and version of a definition, of whichever kind: a function's knows its Workflow as a Builder does."""
    known = isinstance(value, Builder | Workflow) or isinstance(getattr(value, "workflow", None), Workflow)
    return (value.name, value.version) if known else value


_CHILD = Schema(str | tuple[str, str], prepare=_child)


def _caller() -> str:
    """``file:line`` of the innermost caller outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "durable":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
