"""The steps of a body: a function, its arguments and its options, made into a :class:`Work` of one argument.

What depends on the function and its options alone is worked out once and kept: a body says the same step again at each
replay.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, get_origin

from durable.define.annotations import annotation_of, underlying
from durable.define.nodes import Work
from durable.define.options import (
    UNSET,
    Options,
    check_callable,
    is_async,
    make_work,
    name_of,
    options_of,
)
from durable.define.payload import NOTHING, Schema
from durable.errors import DefinitionError

_CONTEXT: Final = re.compile(r"(?:\w+\.)*StepContext\b")


@dataclass(frozen=True, slots=True)
class Bound:
    """A step's function with its arguments, as a handler of one argument, the context."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    takes_context: bool

    def __call__(self, ctx: Any) -> Any:
        return self.fn(ctx, *self.args) if self.takes_context else self.fn(*self.args)


class AsyncBound(Bound):
    """The same for an async function: an async handler, run on the event loop."""

    async def __call__(self, ctx: Any) -> Any:
        return await (self.fn(ctx, *self.args) if self.takes_context else self.fn(*self.args))


class Undoing(Bound):
    """A compensator: it is given what the step returned, and then the step's arguments."""

    def __call__(self, ctx: Any) -> Any:
        given = (ctx.output, *self.args)
        return self.fn(ctx, *given) if self.takes_context else self.fn(*given)


class AsyncUndoing(Undoing):
    """The same for an async function."""

    async def __call__(self, ctx: Any) -> Any:
        given = (ctx.output, *self.args)
        return await (self.fn(ctx, *given) if self.takes_context else self.fn(*given))


def step_work(fn: Callable[..., Any], args: tuple[Any, ...], options: Options, where: str) -> Work:
    """How `fn(*args)` is run, and undone. Raises DefinitionError for what can't be a step, TypeError for arguments that
    it does not take."""
    prepared = _prepared(fn, options, where)
    prepared.check(args)
    work = replace(prepared.work, handler=prepared.bound(args))
    if prepared.undo is None:
        return work
    return replace(work, compensate=replace(prepared.undo.work, handler=prepared.undo.bound(args)))


def default_name(fn: Callable[..., Any]) -> str | None:
    """What a step is called unless it is given a name; None for what has none of its own (a lambda)."""
    function = underlying(fn)
    name = getattr(function, "__name__", None)
    if isinstance(fn, type) or not isinstance(name, str) or name == "<lambda>":
        return fn.__name__ if isinstance(fn, type) else None
    if name == "__call__":
        return type(fn).__name__
    return name


@dataclass(frozen=True, slots=True)
class _Prepared:
    fn: Callable[..., Any]
    work: Work
    takes_context: bool
    signature: inspect.Signature | None
    kind: type[Bound]
    undo: _Prepared | None = None

    def bound(self, args: tuple[Any, ...]) -> Bound:
        return self.kind(self.fn, args, self.takes_context)

    def check(self, args: tuple[Any, ...]) -> None:
        if self.signature is not None:
            self.signature.bind(*((None,) if self.takes_context else ()), *args)


def _handler(ctx: Any) -> None:
    """In place of the bound function while options are checked."""


def _prepared(fn: Callable[..., Any], options: Options, where: str) -> _Prepared:
    try:
        return _remembered(fn, options, where)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _prepare(fn, options, where)


def _prepare(fn: Callable[..., Any], options: Options, where: str) -> _Prepared:
    check_callable(fn, where=where, what="a step")
    function = underlying(fn)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DefinitionError(f"{where}: {name_of(fn)} is a generator: return a value instead of yielding")
    chosen = options.over(options_of(fn))
    undo = None if chosen.compensate in (UNSET, None) else _prepare_undo(chosen.compensate, where)
    try:
        result = Schema.of_return(fn)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: {error}") from error
    work = make_work(_handler, where=where, options=replace(chosen, compensate=UNSET), result=result)
    kind = AsyncBound if is_async(fn) else Bound
    return _Prepared(fn, work, takes_context(fn), _signature(fn), kind, undo)


def _prepare_undo(fn: Any, where: str) -> _Prepared:
    where = f"{where}, compensator {name_of(fn)}"
    check_callable(fn, where=where, what="the compensator")
    work = make_work(_handler, where=where, options=replace(options_of(fn), compensate=UNSET), result=NOTHING)
    return _Prepared(fn, work, takes_context(fn), None, AsyncUndoing if is_async(fn) else Undoing)


_remembered = lru_cache(maxsize=4096)(_prepare)


def takes_context(fn: Callable[..., Any]) -> bool:
    """Whether the first parameter is declared as a StepContext."""
    signature = _signature(fn)
    first = next(iter(signature.parameters.values()), None) if signature is not None else None
    if first is None or first.annotation is first.empty:
        return False
    declared: Any = first.annotation
    if isinstance(declared, str):
        if _CONTEXT.match(declared):
            return True
        declared = annotation_of(fn, first.name)  # perhaps under another name
    return getattr(get_origin(declared) or declared, "__name__", None) == "StepContext"


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (ValueError, TypeError):  # some builtins have none
        return None
