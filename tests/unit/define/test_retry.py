"""Retry: what it accepts, how long it waits, which errors it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.define.retry import Retry
from durable.errors import DefinitionError, NonRetryable, StepTimeout

chances = st.floats(0, 1, exclude_max=True)


@pytest.mark.behaviour("SD-05")
def test_the_default_is_three_attempts_exponential_from_one_second_capped_at_sixty() -> None:
    retry = Retry()
    assert (retry.max_attempts, retry.backoff, retry.initial, retry.factor, retry.maximum, retry.jitter) == (
        3, "exponential", 1.0, 2.0, 60.0, True,
    )  # fmt: skip
    plain = Retry(jitter=False)
    assert [plain.delay(n, 0.5) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.behaviour("SD-06")
def test_attempts_and_backoff_are_kept() -> None:
    retry = Retry(max_attempts=7, backoff="linear", initial=3, jitter=False)
    assert (retry.max_attempts, retry.backoff) == (7, "linear")
    assert [retry.delay(n, 0) for n in (1, 2, 3, 100)] == [3, 6, 9, 60]


def test_constant_sequence_and_function() -> None:
    assert [Retry(backoff="constant", initial=300, jitter=False).delay(n, 0) for n in (1, 9)] == [300, 300]
    assert [Retry(backoff=[1, 5, 30], jitter=False).delay(n, 0) for n in (1, 2, 3, 4, 99)] == [1, 5, 30, 30, 30]
    assert [Retry(backoff=lambda n: n * 10).delay(n, 0.0) for n in (1, 2)] == [10, 20]


def test_a_backoff_sequence_is_copied() -> None:
    seconds = [1.0]
    retry = Retry(backoff=seconds)
    seconds.append(-5)
    assert retry.backoff == (1.0,)
    hash(retry)


@given(n=st.integers(1, 10**30), chance=chances, factor=st.floats(0.1, 1e6), initial=st.floats(0, 1e6))
def test_no_delay_overflows_or_leaves_its_bounds(n: int, chance: float, factor: float, initial: float) -> None:
    for backoff in ("exponential", "linear"):
        delay = Retry(backoff=backoff, factor=factor, initial=initial, maximum=50).delay(n, chance)
        assert 0 <= delay <= 50


@given(n=st.integers(1, 50), chance=chances)
def test_jitter_multiplies_by_half_to_one(n: int, chance: float) -> None:
    plain, jittered = Retry(jitter=False).delay(n, chance), Retry().delay(n, chance)
    assert plain / 2 <= jittered <= plain
    assert jittered == pytest.approx(plain * (0.5 + chance / 2))


def test_exponential_delays_never_shrink() -> None:
    delays = [Retry(jitter=False, maximum=1e9).delay(n, 0) for n in range(1, 2000)]
    assert delays == sorted(delays)
    assert delays[-1] == 1e9


def test_coerce() -> None:
    own = Retry(max_attempts=9)
    assert Retry.coerce(own) is own
    assert Retry.coerce(5) == Retry(max_attempts=5)
    assert Retry.coerce(None) == Retry()


@pytest.mark.parametrize("value", [True, "5", 2.0, 0, -1])
def test_coerce_refuses(value: Any) -> None:
    with pytest.raises(DefinitionError):
        Retry.coerce(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"initial": -1},
        {"initial": math.nan},
        {"initial": "1"},
        {"initial": True},
        {"maximum": math.inf},
        {"maximum": -0.1},
        {"maximum": 1e30},
        {"factor": 0},
        {"factor": -2},
        {"factor": 10**400},
        {"backoff": "quadratic"},
        {"backoff": []},
        {"backoff": [1, -1]},
        {"backoff": 5},
        {"jitter": 1},
        {"retry_on_timeout": None},
        {"retry_on": (ValueError, "x")},
        {"retry_on": (KeyboardInterrupt,)},
        {"give_up_on": int},
        {"give_up_on": None},
        {"on_exhausted": "stop"},
    ],
)
def test_nonsense_is_refused_with_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match=next(iter(wrong))):
        Retry(**wrong)


@pytest.mark.parametrize("answer", [-1, math.nan, math.inf, "1", None, True])
def test_a_backoff_functions_answer_is_checked(answer: Any) -> None:
    with pytest.raises(DefinitionError, match="attempt 2"):
        Retry(backoff=lambda n: answer).delay(2, 0)


def test_which_errors_it_takes() -> None:
    class Declined(Exception): ...

    class Stolen(Declined): ...

    assert Retry().takes(ValueError())
    assert Retry().takes(TimeoutError())
    assert not Retry().takes(NonRetryable("no"))
    assert not Retry().takes(KeyboardInterrupt())
    assert not Retry(retry_on=(NonRetryable,)).takes(NonRetryable("no"))
    chosen = Retry(retry_on=Declined, give_up_on=[Stolen])  # type: ignore[arg-type]  # lenient for users without mypy
    assert chosen.takes(Declined())
    assert not chosen.takes(Stolen())
    assert not chosen.takes(ValueError())


def test_a_step_timeout_is_final_unless_asked_for() -> None:
    timeout = StepTimeout("charge", timeout=3)
    assert not Retry().takes(timeout)
    assert Retry(retry_on_timeout=True).takes(timeout)
    assert Retry(retry_on_timeout=True, retry_on=(ValueError,)).takes(timeout)
    assert not Retry(retry_on_timeout=True, give_up_on=(StepTimeout,)).takes(timeout)


def test_exhausted() -> None:
    assert [Retry(max_attempts=2).exhausted(n) for n in (0, 1, 2, 3)] == [False, False, True, True]
    assert not Retry(max_attempts=None).exhausted(10**9)
