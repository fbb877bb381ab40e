"""What operations answer to a body, and what they are told: results of tries, races and maps, policies, messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from durable.errors import ChildFailed, DefinitionError

if TYPE_CHECKING:
    from durable.core.functions.commands import Operation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TryFailure:
    """Why a try failed.

    - `kind`: ``critical``, ``timeout``, ``exhausted`` (no attempts left), ``interrupted`` (crashes), ``rollback``; of a
      block that caught something else: ``error``.
    - `source`: ``step``, ``join``, ``race`` or ``block``: what failed within it.
    - `step`: its journal key; `attempts`: how many it had; `error`: the recorded error: type, message, ...
    """

    kind: str
    source: str
    step: str | None = None
    attempts: int = 1
    error: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What ``try_step`` and ``try_block`` answer: a `value` if `ok`, else a `failure`."""

    ok: bool
    value: T | None = None
    failure: TryFailure | None = None


@dataclass(frozen=True, slots=True)
class RaceResult(Generic[T]):
    """The branch of a race that finished first, and what it yielded."""

    winner: str
    value: T


@dataclass(frozen=True, slots=True)
class All:
    """Policy of ``ctx.map``: every item must succeed."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Policy of ``ctx.map``: up to `most` items may fail: a number, or as a float the share of them (0.1: a tenth)."""

    most: int | float

    def __post_init__(self) -> None:
        most: Any = self.most
        if (
            isinstance(most, bool)
            or not isinstance(most, int | float)
            or most < 0
            or (isinstance(most, float) and most > 1)
        ):
            raise DefinitionError(f"Failures({self.most!r}): a number of items, or a share of them from 0.0 to 1.0")

    def allowed(self, items: int) -> int:
        """How many of so many items may fail."""
        return int(self.most * items) if isinstance(self.most, float) else int(self.most)


@dataclass(frozen=True, slots=True)
class First:
    """Policy of ``ctx.map``: the first `enough` successes are enough; what still runs then is canceled."""

    enough: int

    def __post_init__(self) -> None:
        enough: Any = self.enough
        if isinstance(enough, bool) or not isinstance(enough, int) or enough < 1:
            raise DefinitionError(f"First({self.enough!r}): a number of successes, at least 1")


Policy: TypeAlias = All | Failures | First


class MapResults(list[T | None], Generic[T]):
    """The results of ``ctx.map``, in the order of the items; None where an item failed or was not needed.

    `failures`: how each item failed, by its place; ``failures[7].error`` is the recorded error of its run. `finished`:
    the results of the others.
    """

    def __init__(
        self, results: Iterable[T | None], finished: Mapping[int, T], failures: Mapping[int, ChildFailed]
    ) -> None:
        super().__init__(results)
        self.finished, self.failures = dict(finished), dict(failures)


@dataclass(frozen=True, slots=True)
class Message(Generic[T]):
    """A message that ``ctx.receive`` took: its `id` (the sender's, or one that the engine gave), `name`, `body`, and
    when it was sent."""

    id: str
    name: str
    body: T
    sent_at: datetime
    _answer: Any = field(default=None, repr=False, compare=False)

    def complete(self, reply: Any = None) -> Operation[None]:
        """Answer a message that was received with ``completable=True``: ``await message.complete(reply)``. The sender's
        ``request`` returns `reply`, any plain JSON value."""
        if self._answer is None:
            raise DefinitionError(
                f"message {self.name!r} was not received with completable=True: it can't be completed"
            )
        answer: Operation[None] = self._answer(reply)
        return answer
