"""How answers look: tables of rich, or one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import sys
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from durable.cli.problems import printable
from durable.snapshots import ErrorInfo, HistoryEvent, RunSnapshot, StepSnapshot

if TYPE_CHECKING:
    from rich.table import Table

COLOURS: Final = {
    "completed": "green",
    "failed": "red",
    "canceled": "yellow",
    "paused": "yellow",
    "compensating": "magenta",
    "running": "cyan",
}
LONGEST: Final = 200
"""Characters of a payload in a table."""


# ---------------------------------------------------------------- JSON


def plain(value: Any) -> Any:
    """A snapshot, an event or a result as what JSON knows."""
    match value:
        case RunSnapshot():
            return {**_fields(value), "state": value.derived}
        case Enum():
            return value.value
        case None | bool() | int() | float() | str():
            return value
        case uuid.UUID():
            return str(value)
        case datetime() | date():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Mapping():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, fallback=str)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def as_json(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(plain(value), ensure_ascii=False)


def print_json(value: Any) -> None:
    """One line on standard output, in UTF-8 whatever the locale is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(as_json(value).encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


# ---------------------------------------------------------------- tables


def show_runs(runs: Iterable[RunSnapshot]) -> None:
    table = _table("run", "workflow", "status", "step", "key", "since")
    for run in runs:
        table.add_row(str(run.id), _name(run), _state(run), _progress(run), _text(run.key or ""), _time(run.created_at))
    _print(table if table.row_count else "no runs")


def show_run(run: RunSnapshot) -> None:
    """Facts, steps, children."""
    facts = _table(None, None)
    for name, value in _facts(run):
        facts.add_row(name, value)
    _print(facts)
    if run.steps:
        steps = _table("step", "kind", "status", "attempt", "took", "result")
        for depth, step in _walk(run.steps):
            steps.add_row(
                "  " * depth + printable(step.step_id),
                step.kind,
                _coloured(step.status),
                str(step.attempt),
                _took(step.started_at, step.finished_at),
                _error(step.error) if step.error and step.status != "completed" else _payload(step.result),
            )
        _print(steps)
    if run.children:
        _print("children")
        show_runs(run.children)


def show_change(run: RunSnapshot) -> None:
    """A line of a run that is watched: when it was seen, and how it stood."""
    from rich.text import Text

    _print(
        Text("  ").join(
            [Text(_time(datetime.now(UTC))), Text(str(run.id)), _state(run), Text(f"step {_progress(run)}")]
        )
    )


def show_history(events: Iterable[HistoryEvent]) -> None:
    table = _table("when", "what", "step", "attempt", "")
    for event in events:
        more = [_error(event.error)] if event.error else []
        more += [_payload(event.payload)] if event.payload is not None else []
        more += [_payload(event.data)] if event.data else []
        more += [f"again at {_time(event.next_attempt_at)}"] if event.next_attempt_at else []
        attempt = "" if event.attempt is None else str(event.attempt)
        step = printable(event.step or "")
        table.add_row(_time(event.at, exact=True), event.kind, step, attempt, "; ".join(more))
    _print(table)


def _facts(run: RunSnapshot) -> Iterable[tuple[str, Any]]:
    yield "run", str(run.id)
    yield "workflow", _name(run)
    yield "status", _state(run)
    yield "step", _progress(run)
    if run.key:
        yield "key", _text(run.key)
    if run.tags:
        yield "tags", _payload(dict(run.tags))
    if run.parent_id:
        yield "parent", f"{run.parent_id}, step {printable(run.parent_step or '')}"
    if run.forked_from:
        yield "forked from", str(run.forked_from)
    if run.predecessor:
        yield "went on from", str(run.predecessor)
    if run.successor:
        yield "goes on as", str(run.successor)
    yield "input", _payload(run.input)
    yield "created", _time(run.created_at)
    if run.started_at:
        yield "started", _time(run.started_at)
    if run.finished_at:
        yield "ended", f"{_time(run.finished_at)} ({_took(run.started_at or run.created_at, run.finished_at)})"
    if run.deadline and not run.ended:
        yield "deadline", _time(run.deadline)
    if run.error:
        at = f" (step {printable(run.error.step)})" if run.error.step else ""
        yield "error", _error(run.error) + at
    if run.reason:
        yield "reason", _text(run.reason)
    if run.not_undone:
        yield "not undone", _text(", ".join(run.not_undone))


def _walk(steps: Iterable[StepSnapshot], depth: int = 0) -> Iterable[tuple[int, StepSnapshot]]:
    for step in steps:
        yield depth, step
        yield from _walk(step.children, depth + 1)


def _name(run: RunSnapshot) -> str:
    return _text(f"{run.workflow} {run.version}")


def _state(run: RunSnapshot) -> Any:
    about = f" {printable(run.waiting_name)}" if run.waiting_name and run.derived != run.status else ""
    return _coloured(run.derived, about if run.derived in ("waiting_for_signal", "retrying", "sleeping") else "")


def _coloured(status: str, more: str = "") -> Any:
    from rich.text import Text

    return Text(status.replace("_", " ") + more, style=COLOURS.get(status, ""))


def _progress(run: RunSnapshot) -> str:
    return str(run.cursor) if run.total_steps is None else f"{run.cursor} of {run.total_steps}"


def _time(at: datetime | None, *, exact: bool = False) -> str:
    if at is None:
        return ""
    return at.astimezone().replace(tzinfo=None).isoformat(" ", "milliseconds" if exact else "seconds")


def _took(start: datetime | None, end: datetime | None) -> str:
    if start is None or end is None:
        return ""
    seconds = (end - start).total_seconds()
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 120 else str(end - start)


def _error(error: ErrorInfo) -> str:
    return _text(str(error).replace(f"{error.type}:", f"{error.type.rpartition('.')[2]}:", 1))


def _payload(value: Any) -> str:
    return "" if value is None else _text(as_json(value))


def _text(value: str) -> str:
    clean = printable(" ".join(value.split()))
    return clean if len(clean) <= LONGEST else clean[: LONGEST - 1] + "…"


def _table(*columns: str | None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD if columns[0] else None, show_header=columns[0] is not None, pad_edge=False)
    for column in columns:
        table.add_column(column or "", overflow="fold", no_wrap=column in ("run", "when"))
    return table


def _print(what: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 200
    Console(markup=False, highlight=False, width=width).print(what)
