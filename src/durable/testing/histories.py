"""A run's history, for asserts.

    assert_history(t.history(run), [
        "created", "started",
        "attempt_started charge", "attempt_failed charge", "suspended",
        ...,
        "completed",
    ])
    assert t.history(run).steps == ["charge", "ship"]
    assert t.history(run).count("attempt_failed", step="charge") == 2

The message of one that fails shows what happened instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import ndiff
from types import EllipsisType
from typing import TypeAlias, overload

from durable.snapshots import HistoryEvent

Expected: TypeAlias = Sequence[str | EllipsisType]
"""Lines of a history; ``...`` stands for any number of them, none included."""


class History(Sequence[HistoryEvent]):
    """What happened to a run, in order."""

    def __init__(self, events: Iterable[HistoryEvent]) -> None:
        self._events = tuple(events)

    @property
    def lines(self) -> list[str]:
        """An event a line: its kind, then the step that it is about, or the name of a received message."""
        return [_line(event) for event in self]

    @property
    def steps(self) -> list[str]:
        """The steps, in the order in which they succeeded."""
        return [event.step for event in self if event.kind == "attempt_succeeded" and event.step is not None]

    def of(self, *kinds: str, step: str | None = None) -> History:
        """The events of these kinds (none: of all), of one step if it is given."""
        return History(e for e in self if (not kinds or e.kind in kinds) and step in (None, e.step))

    def count(self, kind: str, step: str | None = None) -> int:
        """How often it came to this; to this step, if it is given."""
        return len(self.of(kind, step=step))

    @overload
    def __getitem__(self, place: int) -> HistoryEvent: ...
    @overload
    def __getitem__(self, place: slice) -> History: ...
    def __getitem__(self, place: int | slice) -> HistoryEvent | History:
        return History(self._events[place]) if isinstance(place, slice) else self._events[place]

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return "\n".join(["<history", *(f"  {line}" for line in self.lines), ">"])


def assert_history(events: Iterable[HistoryEvent], expected: Expected) -> None:
    """Fail unless the history has these lines, as :attr:`History.lines` gives them, with nothing beside them but where
    ``...`` stands. The message shows the difference."""
    __tracebackhide__ = True
    lines = History(events).lines
    if ... in expected:
        _assert_parts(lines, expected)
    elif lines != list(expected):
        wanted = [line for line in expected if isinstance(line, str)]
        difference = _indented(ndiff(wanted, lines))
        raise AssertionError(f"the history is another one (-: expected, +: what happened)\n{difference}")


def _assert_parts(lines: list[str], expected: Expected) -> None:
    __tracebackhide__ = True
    first, *middle, last = _parts(expected)
    place = len(first)
    if lines[:place] != first:
        raise AssertionError(_missing("at its beginning", first, lines[:place], lines))
    for part in middle:
        found = next((i for i in range(place, len(lines) - len(part) + 1) if lines[i : i + len(part)] == part), None)
        if found is None:
            raise AssertionError(_missing(f"after line {place}", part, lines[place:], lines))
        place = found + len(part)
    end = max(place, len(lines) - len(last))
    if lines[end:] != last:
        raise AssertionError(_missing("at its end", last, lines[end:], lines))


def _parts(expected: Expected) -> list[list[str]]:
    """What stands before, between and after the ``...``."""
    parts: list[list[str]] = [[]]
    for line in expected:
        if isinstance(line, EllipsisType):
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


def _missing(where: str, part: list[str], instead: list[str], lines: list[str]) -> str:
    found = f"the history does not have this {where}:\n{_indented(part)}\nbut:\n{_indented(instead) or '  nothing'}"
    return f"{found}\nall of it:\n{_indented(f'{number:3} {line}' for number, line in enumerate(lines, 1))}"


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line.rstrip()}" for line in lines if not line.startswith("?"))


def _line(event: HistoryEvent) -> str:
    about = event.step
    if about is None and event.kind == "message_received":
        about = (event.data or {}).get("name")
    return event.kind if about is None else f"{event.kind} {about}"
