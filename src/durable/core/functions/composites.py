"""What operations with bodies of their own have in common: blocks, joins, races, loops.

Each drives its coroutines when it is asked for its answer. That it has ended follows from what it holds: its own entry
is derived, and shows people how it went. Only two things are read back from such an entry, since they could not be
worked out anew: who won a race, and the state that an iteration ended with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from durable.core.functions import errors
from durable.core.functions.answers import Answer, Raised
from durable.core.functions.body import Strand
from durable.core.functions.commands import Operation
from durable.core.state import Entry, EntryKind
from durable.values import JsonText

if TYPE_CHECKING:
    from durable.core.functions.context import Context

T = TypeVar("T")
Inner: TypeAlias = Callable[["Context"], Awaitable[Any]]


class Composite(Operation[T]):
    """What has coroutines within it."""

    def strands(self) -> list[Strand]:
        """Those that are alive."""
        raise AssertionError(f"{type(self).__name__} says what is in it")

    def leaves(self) -> Iterator[Operation[Any]]:
        for strand in self.strands():
            yield from strand.leaves()

    def close(self) -> None:
        for strand in self.strands():
            strand.close()

    def conclude(
        self, outer: Strand, ended: Answer, shown: JsonText | None = None, extra: Mapping[str, Any] | None = None
    ) -> Answer:
        """It has ended: `outer` is past it, and its entry is derived."""
        entry = derived_entry(self.key, self.kind, ended, outer.time, self.parent, shown, extra)
        begun = self.body.frame.get(self.key)
        self.body.derive(replace(entry, attempt=begun.attempts + 1) if begun is not None else entry)
        return ended


def derived_entry(
    key: str,
    kind: EntryKind,
    ended: Answer,
    time: datetime | None,
    parent: str | None,
    shown: JsonText | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Entry:
    if isinstance(ended, Raised):
        failure = errors.failure(ended.error)
        return Entry(key, kind, "failed", error=failure, finished_at=time, parent=parent, extra=extra)
    text = errors.display(ended.value) if shown is None else shown
    return Entry(key, kind, "completed", text, finished_at=time, parent=parent, extra=extra)


def passes(ended: Answer | None) -> bool:
    """Whether it goes through everything that surrounds it: a rollback, a cancel, the end of the run."""
    return isinstance(ended, Raised) and not isinstance(ended.error, Exception)
