"""A run and its journal, as read from the database or from a file of recordings.

A file has a line of JSON for each run: the fields of its row that a replay needs, and its journal. Payloads stand in it
as JSON. Tags, keys and tracebacks are left out: a file of recordings is meant to be kept with the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from durable.core.state import Entry, Run
from durable.errors import ConfigurationError

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Recording:
    """A run's row, which says what has begun and is not over, and what the run has passed."""

    run: Run
    journal: Mapping[str, Entry]


def to_line(recording: Recording) -> str:
    """As a line of a file, without its end. What a codec made of payloads is plain in it."""
    run = replace(recording.run, key=None, tags={}, claim=None, priority=0)
    told: dict[str, Any] = {
        "format": FORMAT,
        "run": _runs().dump_python(run, mode="json", exclude_defaults=True),
        "journal": _journals().dump_python(list(recording.journal.values()), mode="json", exclude_defaults=True),
    }
    _each_payload(told, json.loads)
    for holder in (told["run"], told["run"].get("ending") or {}, *told["journal"]):
        _forget_tracebacks(holder.get("error"))
    return json.dumps(told)  # ASCII: a payload may hold halves of surrogate pairs


def from_line(line: str) -> Recording:
    """What `to_line` has made. Raises ConfigurationError."""
    try:
        told = json.loads(line)
        if told["format"] != FORMAT:
            raise ConfigurationError(f"it is of format {told['format']!r}, and this version reads {FORMAT}")
        _each_payload(told, _dumped)
        journal = _journals().validate_python(told["journal"])
        return Recording(_runs().validate_python(told["run"]), {entry.step_id: entry for entry in journal})
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"it is no recording of a run: {' '.join(str(error).split())}") from error


def read_recordings(path: Path | str) -> Iterator[Recording]:
    """The runs of a file, one after the other. Raises ConfigurationError, which names the line; OSError."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield from_line(line)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{path}:{number}: {error}") from error


def _each_payload(told: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """From JSON text to what it says, or back."""
    holders = [(told["run"], "input")]
    holders += [(entry, "result") for entry in told["journal"]]
    holders += [(begun, "resume_data") for begun in told["run"].get("frame", {}).values()]
    for holder, name in holders:
        if name in holder:
            holder[name] = change(holder[name])


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _forget_tracebacks(told: Any) -> None:
    """They say where the code lay, and a replay does not look at them."""
    if isinstance(told, dict):
        told.pop("traceback", None)
        for inner in told.values():
            _forget_tracebacks(inner)
    elif isinstance(told, list):
        for inner in told:
            _forget_tracebacks(inner)


@cache
def _runs() -> TypeAdapter[Run]:
    return TypeAdapter(Run)


@cache
def _journals() -> TypeAdapter[list[Entry]]:
    return TypeAdapter(list[Entry])
