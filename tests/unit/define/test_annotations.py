"""Return annotations: through wrappers, with names that are local, missing, or for type checkers only."""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional, TypeVar

import pytest
from pydantic import BaseModel

from durable.define.annotations import describe, return_annotation
from durable.define.payload import ANY, Schema
from durable.errors import DefinitionError
from durable.values import Suspend

if TYPE_CHECKING:
    from somewhere import Elsewhere  # type: ignore[import-not-found]

T = TypeVar("T")


class Findings(BaseModel):
    found: int


def declared(ctx: Any) -> Findings: ...


async def asynchronous(ctx: Elsewhere) -> Findings: ...


def unannotated(ctx):  # type: ignore[no-untyped-def]
    ...


def nothing(ctx: Any) -> None: ...


def may_suspend(ctx: Any) -> Findings | Suspend: ...


def old_style(ctx: Any) -> Optional[Findings] | Suspend: ...  # noqa: UP045


def suspends(ctx: Any) -> Suspend: ...


def never(ctx: Any) -> NoReturn: ...


def anything(ctx: Any) -> Any: ...


def whatever(ctx: Any) -> object: ...


def any_or_suspend(ctx: Any) -> Any | Suspend: ...


def generic(ctx: T) -> T: ...


def awaitable(ctx: Any) -> Awaitable[Findings]: ...


def coroutine(ctx: Any) -> Coroutine[Any, Any, Findings | Suspend]: ...


def annotated(ctx: Any) -> Annotated[int, "meters"]: ...


def elsewhere(ctx: Any) -> Elsewhere: ...


def elsewhere_inside(ctx: Any) -> dict[str, Elsewhere]: ...


def missing(ctx: Any) -> Missing: ...  # type: ignore[name-defined]  # noqa: F821


def broken(ctx: Any) -> 5 + None: ...  # type: ignore[valid-type]


class Caller:
    def __call__(self, ctx: Any) -> Findings: ...

    def method(self, ctx: Any) -> Findings: ...

    @classmethod
    def of(cls, ctx: Any) -> Findings: ...


def decorator(fn: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(fn)
    def wrapper(*args: Any) -> T:
        return fn(*args)

    return wrapper


@pytest.mark.parametrize(
    ("function", "annotation"),
    [
        (declared, Findings),
        (asynchronous, Findings),
        (unannotated, Any),
        (nothing, type(None)),
        (may_suspend, Findings),
        (old_style, Findings | None),
        (suspends, Any),
        (never, Any),
        (anything, Any),
        (whatever, Any),
        (any_or_suspend, Any),
        (generic, Any),
        (awaitable, Findings),
        (coroutine, Findings),
        (annotated, Annotated[int, "meters"]),
        (elsewhere, Any),
        (elsewhere_inside, Any),
        (Caller(), Findings),
        (Caller().method, Findings),
        (Caller.of, Findings),
        (functools.partial(declared), Findings),
        (functools.partial(functools.partial(Caller())), Findings),
        (decorator(declared), Findings),
        (functools.lru_cache(declared), Findings),
        (len, Any),
        (dict, Any),
        (lambda ctx: 1, Any),
    ],
)
def test_what_a_function_returns(function: Callable[..., Any], annotation: Any) -> None:
    assert return_annotation(function) == annotation
    schema = Schema.of_return(function)
    assert schema is ANY if annotation is Any else schema.annotation == annotation


def test_types_that_are_local_to_a_function_are_found() -> None:
    class Local(BaseModel):
        x: int

    def uses(ctx: Any) -> list[Local]: ...

    assert return_annotation(uses) == list[Local]


def made() -> Callable[..., Any]:
    class Inner(BaseModel):
        x: int

    def uses(ctx: Any) -> Inner:
        return Inner(x=1)

    return uses


def test_types_in_the_closure_of_a_function_that_has_returned_are_found() -> None:
    assert return_annotation(made()).__name__ == "Inner"


@pytest.mark.parametrize(("function", "why"), [(missing, "Missing.*can't be resolved"), (broken, "no type")])
def test_annotations_that_cannot_be_resolved_name_the_function(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(DefinitionError, match=f"test_annotations.{function.__name__}") as caught:
        Schema.of_return(function)
    caught.match(why)


def test_a_type_that_cannot_be_stored_names_the_function() -> None:
    class Opaque: ...

    def opaque(ctx: Any) -> Opaque: ...

    with pytest.raises(DefinitionError, match="opaque: Opaque is no type that can be stored"):
        Schema.of_return(opaque)


def test_describe() -> None:
    assert [describe(a) for a in (Any, int, None, Findings, dict[str, Findings], Findings | None, Path)] == [
        "Any", "int", "None", "Findings", "dict[str, Findings]", "Findings | None", "Path",
    ]  # fmt: skip
