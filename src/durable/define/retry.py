"""When a failed attempt is repeated, and after what delay. Pure: the chance for the jitter comes in as an argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from durable.errors import DefinitionError, NonRetryable, StepTimeout

Backoff: TypeAlias = Literal["exponential", "linear", "constant"] | Sequence[float] | Callable[[int], float]
"""A policy by name; the seconds one by one (the last repeats); or a function of the failed attempt's number."""

LONGEST: Final = 1000 * 365.0 * 24 * 60 * 60
"""Seconds in a thousand years: no time that a workflow is given may be longer, so that all dates can be written."""

_NAMES = ("exponential", "linear", "constant")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a step is tried, and how long to wait between attempts.

    - `max_attempts`: attempts in all, the first included; None: for ever.
    - `backoff`: ``exponential`` waits ``initial * factor ** (n - 1)`` seconds after the nth failed attempt, ``linear``
      ``initial * n``, neither longer than `maximum`; ``constant`` waits `initial`. A sequence gives the seconds one by
      one, its last repeats; a function is called with n and answers seconds, which are taken as they are.
    - `jitter`: multiplies a delay (but not a function's) by something between 0.5 and 1.
    - `retry_on`, `give_up_on`: exception classes; `give_up_on` wins. ``NonRetryable`` is never retried.
    - `retry_on_timeout`: whether an attempt that hit the step's timeout is repeated.
    - `on_exhausted`: ``fail`` the run, or ``pause`` it for a person to look at.

    Raises DefinitionError for values that make no sense.
    """

    max_attempts: int | None = 3
    backoff: Backoff = "exponential"
    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 60.0
    jitter: bool = True
    retry_on: tuple[type[Exception], ...] = (Exception,)
    give_up_on: tuple[type[Exception], ...] = ()
    retry_on_timeout: bool = False
    on_exhausted: Literal["fail", "pause"] = "fail"

    def __post_init__(self) -> None:
        _check_attempts(self.max_attempts)
        object.__setattr__(self, "backoff", _checked_backoff(self.backoff))
        for name in ("initial", "maximum"):
            _check_seconds(f"Retry({name}=...)", getattr(self, name))
        _check_number("Retry(factor=...)", self.factor)
        if self.factor == 0:
            raise DefinitionError("Retry(factor=0) makes no sense: backoff='constant' waits the same time each time")
        for name in ("jitter", "retry_on_timeout"):
            if not isinstance(getattr(self, name), bool):
                raise DefinitionError(f"Retry({name}={getattr(self, name)!r}): must be True or False")
        for name in ("retry_on", "give_up_on"):
            object.__setattr__(self, name, _checked_classes(name, getattr(self, name)))
        if self.on_exhausted not in ("fail", "pause"):
            raise DefinitionError(f"Retry(on_exhausted={self.on_exhausted!r}): must be 'fail' or 'pause'")

    @classmethod
    def coerce(cls, value: Retry | int | None) -> Retry:
        """What a user may write for ``retry=``: a Retry, ``5`` for ``Retry(max_attempts=5)``, None for the default."""
        if isinstance(value, Retry):
            return value
        if value is None:
            return cls()
        if type(value) is int:
            return cls(max_attempts=value)
        raise DefinitionError(f"retry={value!r}: must be a Retry, a number of attempts (1: no retry), or None")

    def exhausted(self, attempts: int) -> bool:
        """Whether `attempts` failed attempts are all that it grants."""
        return self.max_attempts is not None and attempts >= self.max_attempts

    def takes(self, error: BaseException) -> bool:
        """Whether this kind of error may be retried at all."""
        if isinstance(error, NonRetryable) or not isinstance(error, Exception) or isinstance(error, self.give_up_on):
            return False
        if isinstance(error, StepTimeout):
            return self.retry_on_timeout
        return isinstance(error, self.retry_on)

    def custom_delay(self, failed_attempt: int) -> float | None:
        """Seconds that the user's own backoff function answers for this attempt; None if there is no function.

        Calls user code. Raises DefinitionError if the answer is no number of seconds.
        """
        if not callable(self.backoff):
            return None
        answer: Any = self.backoff(failed_attempt)
        _check_seconds(f"the backoff function's answer for attempt {failed_attempt}", answer)
        return float(answer)

    def delay(self, failed_attempt: int, chance: float) -> float:
        """Seconds to wait after the nth attempt (1-based) failed; `chance` in [0, 1) decides the jitter."""
        custom = self.custom_delay(failed_attempt)
        if custom is not None:
            return custom
        plain = self._plain_delay(max(failed_attempt, 1))
        return plain * (0.5 + chance / 2) if self.jitter else plain

    def _plain_delay(self, n: int) -> float:
        match self.backoff:
            case "constant":
                return float(self.initial)
            case "linear":
                return float(min(self.maximum, self.initial * n))
            case "exponential":
                return float(min(self.maximum, self.initial * _power(self.factor, n - 1)))
            case tuple() as seconds:
                return float(seconds[min(n, len(seconds)) - 1])
        raise AssertionError(self.backoff)  # a function: custom_delay has answered


def _power(factor: float, exponent: int) -> float:
    try:
        return math.pow(factor, exponent)
    except OverflowError:
        return math.inf if factor > 1 else 0.0


def _check_attempts(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise DefinitionError(f"Retry(max_attempts={value!r}): must be a whole number, or None for no limit")
    if value < 1:
        raise DefinitionError(f"Retry(max_attempts={value}): must be at least 1, the first attempt")


def _check_seconds(what: str, value: Any) -> None:
    _check_number(what, value)
    if value > LONGEST:
        raise DefinitionError(f"{what}: {value!r} seconds are more than a thousand years")


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DefinitionError(f"{what}: must be a number, not {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite or value < 0:
        raise DefinitionError(f"{what}: must be finite and not negative, not {value!r}")


def _checked_backoff(value: Any) -> Backoff:
    if isinstance(value, str):
        if value in _NAMES:
            return value  # type: ignore[return-value]  # a str that is one of the literals
    elif callable(value):
        return value  # type: ignore[no-any-return]
    elif isinstance(value, Sequence) and len(value) > 0:
        for seconds in value:
            _check_seconds("Retry(backoff=[...])", seconds)
        return tuple(value)
    raise DefinitionError(
        f"Retry(backoff={value!r}): must be one of {', '.join(map(repr, _NAMES))}, "
        "a sequence of seconds (not empty), or a function of the failed attempt's number"
    )


def _checked_classes(name: str, value: Any) -> tuple[type[Exception], ...]:
    classes = (value,) if isinstance(value, type) else value
    if not isinstance(classes, tuple | list | set | frozenset):
        raise DefinitionError(f"Retry({name}={value!r}): must be exception classes")
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, Exception)):
            raise DefinitionError(f"Retry({name}=...): {cls!r} is not a subclass of Exception")
    return tuple(classes)
