"""What people type: JSON, durations, tags."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

from durable.cli.problems import UsageError

UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")


def json_value(given: str | None, what: str) -> Any:
    """A JSON value: as it stands, from a file (``@order.json``), or from standard input (``-``). None if absent."""
    if given is None:
        return None
    text, where = _text(given, what)
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        hint = "" if where or text[:1] in '{["' else f"; a string needs quotes: '{json.dumps(text[:40])}'"
        at = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{what}{where} is not JSON: {error.msg} at {at}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}{where} is not JSON that can be stored: {error}") from None


def _text(given: str, what: str) -> tuple[str, str]:
    if given == "-":
        return sys.stdin.read(), ", from standard input,"
    if not given.startswith("@"):
        return given, ""
    try:
        return Path(given[1:]).read_text(encoding="utf-8"), f", from {given[1:]},"
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}: cannot read {given[1:]}: {getattr(error, 'strerror', None) or error}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def duration(given: str | None, what: str) -> timedelta | None:
    """``30d``, ``1h30m``, ``500ms``, or plain seconds."""
    if given is None:
        return None
    text = given.strip().replace(" ", "")
    try:
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return timedelta(seconds=float(text))
        if _PART.sub("", text) == "" and text:
            return timedelta(seconds=sum(float(number) * UNITS[unit] for number, unit in _PART.findall(text)))
    except OverflowError:
        pass
    raise UsageError(
        f"{what} is {given!r}: write seconds, or a number with one of {', '.join(UNITS)}, as in 30d or 1h30m"
    )


def tags(given: Iterable[str]) -> dict[str, Any]:
    """``tenant=acme`` is a string, ``attempt:=3`` any JSON scalar."""
    read: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        if not separator or not name.rstrip(":"):
            raise UsageError(f"--tag {one!r}: write NAME=VALUE, or NAME:=JSON for a number or true")
        if name.endswith(":"):
            read[name[:-1]] = json_value(value, f"--tag {one!r}")
        else:
            read[name] = value
    return read
