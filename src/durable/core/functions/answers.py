"""What a coroutine of a body is sent, and what it comes to."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, TypeAlias

from durable.core.frozen import value
from durable.core.state import Failure


@value(frozen=True, slots=True)
class Returned:
    """It returned this; or is to be sent it."""

    value: Any


@value(frozen=True, slots=True)
class Raised:
    """It raised this; or this is to be raised in it."""

    error: BaseException


Answer: TypeAlias = Returned | Raised


class Diverged(Exception):
    """Journal and code disagree. Never raised into a body: it ends the drive, and the run is parked for a person."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


class Stuck(BaseException):
    """Raised from outside in a body that runs on without awaiting anything."""


class Guarding(Protocol):
    """What surrounds every stretch of user code. `touched`: ``file:line`` of where it reached for an event loop."""

    touched: str | None

    def __enter__(self) -> object: ...
    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None, /) -> None: ...


class Unguarded:
    """Nothing is in its way."""

    touched: str | None = None

    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None, /) -> None: ...
