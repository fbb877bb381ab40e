"""How a handler is run: the ``@step`` decorator, ``branch()``, and the checks that turn a function into a Work.

The most specific option wins: the one at the call (or in ``branch()``), then the handler's own ``@step``, then the
node's defaults for its branches, then the library's.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import Enum
from types import FunctionType
from typing import Any, Final, Never, TypeAlias, TypeVar, overload

from durable.define.annotations import layers, underlying
from durable.define.nodes import Work
from durable.define.payload import NOTHING, Schema
from durable.define.retry import LONGEST, Retry
from durable.errors import DefinitionError

Handler: TypeAlias = Callable[[Any], Any]
"""A function of one positional argument, the context; sync or async."""
Seconds: TypeAlias = float | timedelta
H = TypeVar("H", bound=Callable[..., Any])

TRANSACTIONAL_TIMEOUT: Final = 30.0
"""Seconds that an attempt of a ``transactional=True`` step may take unless it says otherwise."""

_ATTRIBUTE = "__durable_step__"


class Unset(Enum):
    """The value of an option that was not given; None is a value of its own."""

    UNSET = "unset"

    __hash__ = object.__hash__  # options are looked up by their values at each step of a body; an enum's own is slow

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a handler as they were given, checked."""

    retry: Retry | Unset = UNSET
    compensate: Callable[..., Any] | Unset | None = UNSET
    timeout: float | Unset | None = UNSET  # seconds
    transactional: bool | Unset | None = UNSET
    at_most_once: bool | Unset = UNSET

    def over(self, weaker: Options) -> Options:
        """These options; where one was not given, that of `weaker`."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Options(**{name: getattr(weaker, name) if value is UNSET else value for name, value in pairs})


OPTION_NAMES: Final = tuple(f.name for f in fields(Options))
NO_OPTIONS: Final = Options()


@dataclass(frozen=True, slots=True)
class Branch:
    """A handler of a parallel's or a route's branch, with options of its own. Made by :func:`branch`."""

    handler: Handler
    options: Options


@overload
def step(handler: H, /) -> H: ...
@overload
def step(
    *,
    retry: Retry | int | Unset | None = UNSET,
    compensate: Callable[..., Any] | Unset | None = UNSET,
    timeout: Seconds | Unset | None = UNSET,
    transactional: bool | Unset | None = UNSET,
    at_most_once: bool | Unset = UNSET,
    **unknown: Never,
) -> Callable[[H], H]: ...
def step(handler: Any = UNSET, /, **options: Any) -> Any:
    """Attach options to a handler where it is defined; options at the call win. Returns the handler itself.

    - `retry`: a :class:`Retry`, or the number of attempts. Default: 3 attempts, exponential from 1 s.
    - `compensate`: undoes the step when the run is rolled back; may carry ``@step`` options of its own. Of a builder's
      step a function of the context, of a body's step ``compensate([ctx,] output, *args)``.
    - `timeout`: seconds (or a timedelta) that one attempt may take. Default: no limit.
    - `transactional`: True: the step keeps the run's transaction to its end (limit 30 s); False: never in it; None: it
      holds it while it is short.
    - `at_most_once`: an attempt whose worker died is never run again (StepInterrupted); nor is one that raised, unless
      `retry` is given.

    Raises DefinitionError for values that make no sense.
    """
    if handler is UNSET:
        checked = make_options(where="@step", **options)
        return lambda decorated: _attach(decorated, checked)
    if not callable(handler):
        raise DefinitionError(f"@step({handler!r}): options are given by name, as in @step(retry=5)")
    return _attach(handler, Options())


def _attach(handler: H, options: Options) -> H:
    check_callable(handler, where="@step", what="what it decorates")
    try:
        setattr(handler, _ATTRIBUTE, options.over(options_of(handler)))
    except AttributeError as error:
        raise DefinitionError(f"@step: {name_of(handler)} takes no attributes: decorate a function") from error
    return handler


def branch(
    handler: Handler,
    *,
    retry: Retry | int | Unset | None = UNSET,
    compensate: Handler | Unset | None = UNSET,
    timeout: Seconds | Unset | None = UNSET,
    transactional: bool | Unset | None = UNSET,
    at_most_once: bool | Unset = UNSET,
    **unknown: Never,
) -> Branch:
    """A branch of ``.parallel`` or ``.route`` with options of its own (see :func:`step`); they win over all others.

    Raises DefinitionError for a handler that is not callable, and for values that make no sense.
    """
    where = "branch()"
    check_handler(handler, where=where)
    options = make_options(where=where, retry=retry, compensate=compensate, timeout=timeout,
                           transactional=transactional, at_most_once=at_most_once, **unknown)  # fmt: skip
    return Branch(handler, options)


def make_options(*, where: str, **given: Any) -> Options:
    """Check options as a user gave them. Raises DefinitionError, which says `where`."""
    if unknown := [name for name in given if name not in _CHECKS]:
        refuse_unknown(where, unknown, OPTION_NAMES)
    checked = {name: _CHECKS[name](value, where) for name, value in given.items() if value is not UNSET}
    return Options(**checked) if checked else NO_OPTIONS


def refuse_unknown(where: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise DefinitionError if there are unknown options: names them and the known ones."""
    names, known = list(unknown), list(known)
    if not names:
        return
    close = difflib.get_close_matches(names[0], known, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    many = "unknown options" if len(names) > 1 else "unknown option"
    raise DefinitionError(f"{where}: {many} {', '.join(map(repr, names))}{hint}; known: {', '.join(known)}")


def options_of(handler: Any) -> Options:
    """The options that ``@step`` attached to a handler, looked up through partials and callable objects."""
    for layer in layers(handler):
        found = getattr(layer, _ATTRIBUTE, None)
        if isinstance(found, Options):
            return found
    return Options()


def make_work(
    handler: Handler,
    *,
    where: str,
    options: Options | None = None,
    defaults: Options | None = None,
    result: Schema | None = None,
) -> Work:
    """Turn a user's function into a Work: `options` win over its ``@step``, and that over `defaults`.

    `where` ("workflow 'milestone', node 'build'") begins each message; `result` replaces the schema of the handler's
    return annotation. Raises DefinitionError.
    """
    check_handler(handler, where=where)
    chosen = (options or Options()).over(options_of(handler)).over(defaults or Options())
    if chosen.transactional is True and chosen.at_most_once is True:
        raise DefinitionError(
            f"{where}: transactional=True and at_most_once=True exclude each other: a transactional step is exactly "
            "once for what it writes through ctx.connection()"
        )
    transactional = _given(chosen.transactional, None)
    timeout = _given(chosen.timeout, None)
    once = _given(chosen.at_most_once, False)
    return Work(
        handler=handler,
        retry=_given(chosen.retry, None) or Retry(max_attempts=1 if once else 3),
        timeout=TRANSACTIONAL_TIMEOUT if transactional and timeout is None else timeout,
        compensate=_undo(_given(chosen.compensate, None), where),
        transactional=transactional,
        at_most_once=once,
        result=result if result is not None else _result_of(handler, where),
    )


def _undo(compensate: Handler | None, where: str) -> Work | None:
    """How a compensator is run: with its own ``@step`` options, its return value dropped."""
    if compensate is None:
        return None
    return make_work(compensate, where=f"{where}, compensator {name_of(compensate)}", result=NOTHING)


def _given(value: Any, default: Any) -> Any:
    return default if value is UNSET else value


def _result_of(handler: Handler, where: str) -> Schema:
    try:
        return Schema.of_return(handler)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: {error}") from error


# ---------------------------------------------------------------- checks


def check_callable(value: Any, *, where: str, what: str) -> None:
    """Raise DefinitionError unless `value` can be called."""
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that it was never awaited
        raise DefinitionError(f"{where}: {what} is a coroutine: pass the function itself, without calling it")
    if not callable(value):
        raise DefinitionError(f"{where}: {what} must be a function, not {value!r}")


def check_handler(handler: Any, *, where: str, what: str = "the handler", takes: tuple[str, ...] = ("ctx",)) -> None:
    """Raise DefinitionError unless `handler` can be called with as many positional arguments as `takes` names."""
    check_callable(handler, where=where, what=what)
    if inspect.isgeneratorfunction(underlying(handler)) or inspect.isasyncgenfunction(underlying(handler)):
        raise DefinitionError(f"{where}: {what} {name_of(handler)} is a generator: return a value instead of yielding")
    try:
        signature = inspect.signature(handler)
    except (ValueError, TypeError):  # some builtins have none
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        count = "one positional argument" if len(takes) == 1 else f"{len(takes)} positional arguments"
        raise DefinitionError(
            f"{where}: {what} {name_of(handler)}{signature} must take {count} ({', '.join(takes)}): {error}; "
            "functools.partial or a lambda can bind the others"
        ) from None


def name_of(handler: Any) -> str:
    """What to call a function in a message."""
    function = underlying(handler)
    name = getattr(function, "__qualname__", None)
    with contextlib.suppress(Exception):
        return str(name).replace("<locals>.", "") if name else repr(handler)
    return type(handler).__name__


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives a coroutine: async functions, partials and methods of them, async ``__call__``."""
    if isinstance(fn, FunctionType) and fn.__code__.co_flags & inspect.CO_COROUTINE:
        return True  # asked at each step
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def checked_seconds(value: Any, where: str, *, zero: bool = True) -> float:
    """`value`, seconds or a timedelta, as finite seconds that are not negative. Raises DefinitionError."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise DefinitionError(f"{where}: must be seconds or a timedelta, not {value!r}")
    if not -math.inf < seconds <= LONGEST:  # a NaN is neither
        raise DefinitionError(f"{where}: must be finite and at most a thousand years, not {value!r}")
    if seconds < 0 or (seconds == 0 and not zero):
        raise DefinitionError(f"{where}: must {'not be negative' if zero else 'be more than 0'}, not {value!r}")
    return float(seconds)


def checked_bool(value: Any, where: str) -> bool:
    """`value` if it is True or False. Raises DefinitionError."""
    if not isinstance(value, bool):
        raise DefinitionError(f"{where}: must be True or False, not {value!r}")
    return value


def _retry(value: Any, where: str) -> Retry:
    try:
        return Retry.coerce(value)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: {error}") from error


def _compensate(value: Any, where: str) -> Callable[..., Any] | None:
    if value is None:
        return None
    check_callable(value, where=where, what="the compensator")  # what it is called with, its workflow says
    if options_of(value).compensate not in (None, UNSET):
        raise DefinitionError(f"{where}: the compensator {name_of(value)} has a compensate= of its own, never used")
    return value  # type: ignore[no-any-return]


def _timeout(value: Any, where: str) -> float | None:
    return None if value is None else checked_seconds(value, f"{where}: timeout", zero=False)


def _transactional(value: Any, where: str) -> bool | None:
    return None if value is None else checked_bool(value, f"{where}: transactional")


def _at_most_once(value: Any, where: str) -> bool:
    return checked_bool(value, f"{where}: at_most_once")


_CHECKS: Final[Mapping[str, Callable[[Any, str], Any]]] = {
    "retry": _retry,
    "compensate": _compensate,
    "timeout": _timeout,
    "transactional": _transactional,
    "at_most_once": _at_most_once,
}
