"""The steps of a body: a function, its arguments and its options, made into a :class:`Work` of one argument.

What depends on the function and its options alone is worked out once and kept: a body says the same step again at each
replay.
"""

from __future__ import annotations

import inspect
import re
import sys
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
    return prepared.bound(fn, args)


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
    takes: range  # so many arguments
    kind: type[Bound]
    undo: _Prepared | None = None

    def bound(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Work:
        """The work, with these arguments. `fn` equals the function that it was prepared for."""
        work, undo = self.work, self.undo.bound(self.undo.fn, args) if self.undo is not None else None
        handler = self.kind(fn, args, self.takes_context)
        return Work(handler, work.retry, work.timeout, undo, work.transactional, work.at_most_once, work.result)

    def check(self, args: tuple[Any, ...]) -> None:
        """Raises TypeError for arguments that it does not take."""
        if self.signature is not None and len(args) not in self.takes:
            self.signature.bind(*((None,) if self.takes_context else ()), *args)


def _handler(ctx: Any) -> None:
    """In place of the bound function while options are checked."""


def _prepared(fn: Callable[..., Any], options: Options, where: str) -> _Prepared:
    try:
        return _remembered(fn, options)
    except DefinitionError:  # to be told with its place
        return _prepare(fn, options, where)
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
    signature, given_context = _signature(fn), takes_context(fn)
    return _Prepared(fn, work, given_context, signature, _arguments(signature, given_context), kind, undo)


def _prepare_undo(fn: Any, where: str) -> _Prepared:
    where = f"{where}, compensator {name_of(fn)}"
    check_callable(fn, where=where, what="the compensator")
    work = make_work(_handler, where=where, options=replace(options_of(fn), compensate=UNSET), result=NOTHING)
    return _Prepared(fn, work, takes_context(fn), None, range(0), AsyncUndoing if is_async(fn) else Undoing)


@lru_cache(maxsize=4096)
def _remembered(fn: Callable[..., Any], options: Options) -> _Prepared:
    return _prepare(fn, options, "")  # where it is said matters to errors alone, and those are not remembered


def _arguments(signature: inspect.Signature | None, given_context: bool) -> range:
    """How many positional arguments a function takes, besides its context; none where that is not all it needs."""
    parameters = list(signature.parameters.values()) if signature is not None else []
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return range(0)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least, most = sum(p.default is p.empty for p in positional), len(positional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        most = sys.maxsize - 1
    return range(max(0, least - given_context), most - given_context + 1)


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
