"""What a function's annotations say of what it returns."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import re
import sys
import types
from collections import abc
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Never, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from durable.errors import DefinitionError
from durable.values import Suspend

_MISSING = object()
_AWAITABLES = (abc.Awaitable, abc.Coroutine)


def describe(annotation: Any) -> str:
    """A short name of a type for messages: ``dict[str, Order]``, not ``dict[str, shop.models.Order]``."""
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return re.sub(r"\b(?:\w+\.)+(?:<locals>\.)?(\w+)", r"\1", repr(annotation))


def return_annotation(fn: Callable[..., Any]) -> Any:
    """The type of what `fn` returns (once awaited, and without ``Suspend``); Any if it does not say.

    Looks through partials, bound methods and callable objects. Names are looked up where the function was defined,
    then in its closure, then in the calling functions of the same module, so that types local to a function are found.
    A name that is imported under TYPE_CHECKING only does not exist now: Any. Raises DefinitionError for any other
    annotation that can't be resolved.
    """
    function = underlying(fn)
    if not inspect.isfunction(function):
        return Any
    raw = _raw(function, "return")
    if raw is _MISSING:
        return Any
    return _stored(_resolved(raw, function))


def annotation_of(fn: Callable[..., Any], parameter: str) -> Any:
    """The declared type of a parameter; Any if there is none. Names are looked up as for `return_annotation`."""
    function = underlying(fn)
    raw = _raw(function, parameter)
    return Any if raw is _MISSING else _resolved(raw, function)


def underlying(fn: Any) -> Any:
    """The function behind partials, a bound method, a callable object; `fn` itself if there is none."""
    if inspect.isfunction(fn):  # as nearly all are
        return fn
    *_, innermost = layers(fn)
    return innermost


def layers(fn: Any) -> Iterator[Any]:
    """`fn`, and what it calls in its turn: through partials, bound methods, callable objects, ``lru_cache``."""
    while fn is not None:
        yield fn
        fn = _within(fn)


def _within(fn: Any) -> Any:
    if isinstance(fn, type) or inspect.isfunction(fn):
        return None
    if isinstance(fn, functools.partial):
        return fn.func
    if inspect.ismethod(fn):
        return fn.__func__
    if hasattr(fn, "__wrapped__"):
        return fn.__wrapped__
    call = getattr(type(fn), "__call__", None)  # noqa: B004  # the method itself is wanted, not whether it is there
    return call if inspect.isfunction(call) or isinstance(call, functools.partial) else None


def _raw(function: types.FunctionType, name: str) -> Any:
    try:
        return function.__annotations__.get(name, _MISSING)
    except NameError as error:  # Python 3.14 evaluates annotations when they are read
        return _unresolved(function, error, f"its annotation of {name!r}")


def _resolved(raw: Any, function: types.FunctionType) -> Any:
    holder = types.SimpleNamespace(__annotations__={"return": raw})
    inner = inspect.unwrap(function)
    inner = inner if inspect.isfunction(inner) else function
    try:
        with contextlib.suppress(NameError):
            return get_type_hints(holder, inner.__globals__, _closure(inner), include_extras=True)["return"]
        return get_type_hints(holder, inner.__globals__, _frames(inner), include_extras=True)["return"]
    except NameError as error:
        return _unresolved(inner, error, repr(raw))
    except Exception as error:
        raise DefinitionError(f"the annotation {raw!r} of {_name(function)} is no type: {error}") from error


def _closure(function: types.FunctionType) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return names


def _frames(function: types.FunctionType) -> dict[str, Any]:
    """The closure, and the local names of the running functions of the same module, the inner ones winning."""
    found: list[dict[str, Any]] = []
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is function.__globals__:
            found.append(dict(frame.f_locals))
        frame = frame.f_back
    names: dict[str, Any] = {}
    for local in reversed(found):
        names |= local
    return names | _closure(function)


def _unresolved(function: types.FunctionType, error: NameError, raw: str) -> Any:
    if _only_for_checkers(error.name or "", function):
        return Any
    raise DefinitionError(
        f"the annotation {raw} of {_name(function)} can't be resolved ({error}): "
        "import the name, or define it at the top level of the module, before the workflow"
    ) from error


def _only_for_checkers(name: str, function: types.FunctionType) -> bool:
    """Whether the module binds `name` in an ``if TYPE_CHECKING:`` block. Looked up in the source that Python keeps."""
    try:
        tree = ast.parse("".join(linecache.getlines(function.__code__.co_filename, function.__globals__)))
    except SyntaxError:
        return False
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    lines = (line for block in blocks if "TYPE_CHECKING" in ast.unparse(block.test) for line in block.body)
    return any(name in _bound(line) for line in lines)


def _bound(line: ast.stmt) -> set[str]:
    match line:
        case ast.Import() | ast.ImportFrom():
            return {(alias.asname or alias.name).split(".")[0] for alias in line.names}
        case ast.ClassDef():
            return {line.name}
        case ast.Assign() | ast.AnnAssign():
            return {node.id for node in ast.walk(line) if isinstance(node, ast.Name)}
    return set()


def _stored(annotation: Any) -> Any:
    """What of a resolved return type is stored: the awaited value, without Suspend."""
    origin = get_origin(annotation)
    if origin in _AWAITABLES and get_args(annotation):
        return _stored(get_args(annotation)[-1])
    if annotation in (NoReturn, Never, Suspend, Any, object) or isinstance(annotation, TypeVar):
        return Any
    if origin is Union or origin is types.UnionType:
        rest = tuple(arg for arg in get_args(annotation) if arg is not Suspend)
        return Any if Any in rest or not rest else Union[rest]  # noqa: UP007  # made from a tuple
    if origin is Annotated and _stored(get_args(annotation)[0]) is Any:
        return Any
    return annotation


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
