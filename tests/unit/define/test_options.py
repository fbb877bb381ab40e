"""@step and branch(): where options are looked up, and which one wins."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from durable.define.options import UNSET, branch, make_work, options_of, step
from durable.define.retry import Retry
from durable.errors import DefinitionError


def undo(ctx: Any) -> None: ...


def plain(ctx: Any) -> None: ...


@step(retry=7, compensate=undo, timeout=5, at_most_once=True)
def decorated(ctx: Any) -> int:
    return 1


def test_step_returns_the_function_itself() -> None:
    def inner(ctx: Any) -> None: ...

    assert step(retry=2)(inner) is inner
    assert step(inner) is inner
    assert options_of(inner).retry == Retry(max_attempts=2)
    assert options_of(plain).retry is UNSET


def test_the_call_wins_over_step_and_step_over_the_defaults() -> None:
    work = make_work(decorated, where="w")
    assert (work.retry.max_attempts, work.timeout, work.at_most_once) == (7, 5, True)
    assert work.compensate is not None
    assert work.compensate.handler is undo
    call, node = branch(decorated, retry=1, timeout=None).options, branch(plain, retry=9, transactional=False).options
    work = make_work(decorated, where="w", options=call, defaults=node)
    assert (work.retry.max_attempts, work.timeout, work.transactional) == (1, None, False)
    assert make_work(plain, where="w", defaults=node).retry.max_attempts == 9
    assert make_work(decorated, where="w", options=branch(plain, compensate=None).options).compensate is None
    assert make_work(decorated, where="w", options=branch(plain, retry=None).options).retry == Retry()


def test_step_serves_async_functions_methods_partials_and_callable_objects() -> None:
    @step(retry=4)
    async def asynchronous(ctx: Any) -> int:
        return 1

    class Handlers:
        @step(retry=4)
        def method(self, ctx: Any) -> int:
            return 1

        @step(retry=4)
        def __call__(self, ctx: Any) -> int:
            return 1

    class Plain:
        def __call__(self, more: int, ctx: Any) -> int:
            return 1

    attached = step(retry=4)(Plain())
    for handler in (asynchronous, Handlers().method, Handlers(), functools.partial(attached, 1)):
        work = make_work(handler, where="w")
        assert work.retry.max_attempts == 4
        assert work.result.annotation is int


def test_stacked_decorators_add_up_the_outer_winning() -> None:
    @step(retry=2)
    @step(retry=3, timeout=4)
    def handler(ctx: Any) -> None: ...

    assert (options_of(handler).retry, options_of(handler).timeout) == (Retry(max_attempts=2), 4)


def test_a_compensator_has_options_of_its_own_and_its_value_is_dropped() -> None:
    @step(retry=8, timeout=2)
    def careful(ctx: Any) -> object:
        return object()

    undo_work = make_work(plain, where="w", options=branch(plain, compensate=careful).options).compensate
    assert undo_work is not None
    assert (undo_work.retry.max_attempts, undo_work.timeout, undo_work.compensate) == (8, 2, None)
    assert undo_work.result.dump(object()) == "null"


def test_mistakes() -> None:
    with pytest.raises(DefinitionError, match=r"@step: unknown option 'retires'.*'retry'"):
        step(retires=3)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="by name"):
        step(3)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="must be a function"):
        step(retry=3)(3)  # type: ignore[type-var]
    with pytest.raises(DefinitionError, match="takes no attributes"):
        step(retry=3)(len)
    with pytest.raises(DefinitionError, match="@step: timeout"):
        step(timeout=-1)
    with pytest.raises(DefinitionError, match=r"branch.*unknown option"):
        branch(plain, retires=3)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match=r"branch.*must be a function"):
        branch(3)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="compensate= of its own"):
        step(compensate=decorated)
    with pytest.raises(DefinitionError, match="exclude each other"):
        make_work(decorated, where="w", options=branch(plain, transactional=True).options)
