"""The steps of a body: which arguments a function takes, and where a mistake is said to be."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from durable import StepContext
from durable.define.options import UNSET, Options, make_options
from durable.define.steps import default_name, step_work
from durable.errors import DefinitionError


def none() -> None: ...
def one(a: int) -> None: ...
def some(a: int, b: int = 2) -> None: ...
def many(a: int, *rest: int) -> None: ...
def named(a: int, *, b: int = 2) -> None: ...
def wants_name(a: int, *, b: int) -> None: ...
def positional(a: int, /, b: int = 1, **more: int) -> None: ...
def context(ctx: StepContext[Any], a: int) -> None: ...
def context_alone(ctx: StepContext[Any]) -> None: ...
def context_of_many(*ctx: StepContext[Any]) -> None: ...
def context_by_name(*, ctx: StepContext[Any]) -> None: ...
def context_or_none(ctx: StepContext[Any] | None = None, a: int = 1) -> None: ...


class Made:
    def __init__(self, a: int) -> None: ...
    def method(self, a: int, b: int = 1) -> None: ...
    def __call__(self, a: int) -> None: ...


FUNCTIONS: list[Callable[..., Any]] = [
    none, one, some, many, named, wants_name, positional, context, context_alone, context_of_many, context_by_name,
    context_or_none, Made, Made(1), Made(1).method, functools.partial(some, 1), functools.partial(some, b=1),
    functools.partial(some, a=1), functools.partial(many, 1), len, lambda a, b=1: None,
]  # fmt: skip


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: getattr(fn, "__qualname__", repr(fn))[:40])
@pytest.mark.parametrize("count", range(5))
def test_the_arguments_are_those_that_the_function_takes(fn: Callable[..., Any], count: int) -> None:
    signature, args = inspect.signature(fn), tuple(range(count))
    given = (None, *args) if getattr(fn, "__name__", "").startswith("context") else args
    assert _refusal(lambda: step_work(fn, args, Options(), "here")) == _refusal(lambda: signature.bind(*given))


def _refusal(call: Callable[[], object]) -> str | None:
    """What a call says of its arguments; None if it takes them."""
    try:
        call()
    except TypeError as error:
        return str(error)
    return None


def test_they_are_what_it_is_called_with() -> None:
    assert step_work(some, (3, 4), Options(), "here").handler.args == (3, 4)  # type: ignore[attr-defined]


def test_a_mistake_is_told_with_its_place_each_time() -> None:
    def yields() -> Iterator[int]:
        yield 1

    for where in ("first", "first", "second"):
        with pytest.raises(DefinitionError, match=f"^{where}: .*yields is a generator"):
            step_work(yields, (), Options(), where)


def test_one_function_has_the_same_work_wherever_it_is_called() -> None:
    first, second = step_work(one, (1,), Options(), "here"), step_work(one, (2,), Options(), "there")
    assert first.result is second.result
    assert (first.handler.args, second.handler.args) == ((1,), (2,))  # type: ignore[attr-defined]


def test_of_functions_that_are_equal_the_given_one_is_called() -> None:
    @dataclass(frozen=True)
    class Adder:
        by: int
        told: list[int] = field(default_factory=list, compare=False)

        def __call__(self, a: int) -> int:
            return a + self.by

    first, second = Adder(1), Adder(1)
    assert first == second
    for fn in (first, second):
        assert step_work(fn, (1,), Options(), "here").handler.fn is fn  # type: ignore[attr-defined]


def test_a_compensator_is_bound_to_the_same_arguments() -> None:
    options = make_options(where="here", compensate=some, retry=5)
    work = step_work(one, (1,), options, "here")
    assert work.compensate is not None
    assert work.compensate.handler.args == (1,)  # type: ignore[attr-defined]
    assert work.retry.max_attempts == 5
    assert step_work(one, (1,), Options(), "here").compensate is None


def test_no_options_are_equal_to_none_given() -> None:
    assert make_options(where="here", retry=UNSET) == Options()
    with pytest.raises(DefinitionError, match="here: unknown option 'retries'"):
        make_options(where="here", retries=1)


def test_default_names() -> None:
    assert [default_name(fn) for fn in (one, Made, Made(1), Made(1).method)] == ["one", "Made", "Made", "method"]
    assert default_name(lambda: None) is None
