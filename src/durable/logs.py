"""Logging through the standard library: what every record carries, and two ways to write it down.

A record that is made inside a run has the attributes ``run``, ``workflow``, ``step`` and ``attempt``, as far as those
are known: from ``extra=``, as ``ctx.logger`` and the engine give them, or else from the :func:`inside` around it, which
reaches the loggers of libraries too. :class:`RunFilter` adds the latter; both formatters show them.

An app with a logging set-up of its own takes the filter and a formatter from here::

    handler.addFilter(durable.logs.RunFilter())
    handler.setFormatter(durable.logs.JsonFormatter())
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import IO, Any, Final, Literal, get_args

from durable.errors import ConfigurationError

LogFormat = Literal["text", "json"]

FACTS: Final = ("run", "workflow", "step", "attempt")
"""What a record says of the run in which it was made."""

LEVELS: Final = ("debug", "info", "warning", "error", "critical")

CHATTY: Final = ("alembic", "asyncio", "procrastinate", "psycopg", "psycopg.pool")
"""Libraries whose idea of what is worth an INFO is another one: a line a job, a line a plugin."""

_inside: ContextVar[Mapping[str, Any]] = ContextVar("durable_inside", default=MappingProxyType({}))  # frozen
_STANDARD: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})


@contextmanager
def inside(**facts: Any) -> Iterator[None]:
    """Whatever is logged in this block, by whichever logger, is of this run."""
    token = _inside.set({**_inside.get(), **facts})
    try:
        yield
    finally:
        _inside.reset(token)


def go_inside(**facts: Any) -> None:
    """The same for what is left of the current task."""
    _inside.set({**_inside.get(), **facts})


def here() -> Mapping[str, Any]:
    """What is known of the run inside which this is called: some of FACTS."""
    return _inside.get()


class RunFilter(logging.Filter):
    """Lets everything pass, and puts on it the run that it was made in."""

    def filter(self, record: logging.LogRecord) -> bool:
        for fact, value in _inside.get().items():
            if fact not in record.__dict__:
                setattr(record, fact, value)
        return True


class TextFormatter(logging.Formatter):
    """``2026-05-01 12:00:00.123 INFO [018f… order pay] charged``, in local time; what a handler put into ``extra=``
    follows as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")[:23]
        known = [str(record.__dict__[fact]) for fact in FACTS[:3] if record.__dict__.get(fact) is not None]
        if (attempt := record.__dict__.get("attempt")) not in (None, 1):
            known.append(f"attempt {attempt}")
        where = f" [{' '.join(known)}]" if known else ""
        more = "".join(f" {name}={value!r}" for name, value in _extra(record).items())
        return f"{time} {record.levelname}{where} {record.getMessage()}{more}{self._traceback(record)}"

    def _traceback(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "".join(f"\n{part}" for part in parts)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; run, workflow, step and attempt where they apply;
    then whatever was given as ``extra=``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({fact: record.__dict__[fact] for fact in FACTS if record.__dict__.get(fact) is not None})
        line.update(_extra(record))
        if record.exc_info and record.exc_info[0]:
            line["error"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


def configure(format: LogFormat = "text", level: str = "info", *, stream: IO[str] | None = None) -> None:  # noqa: A002
    """Make this process's logging durable's: everything to `stream` (standard error). What the command line does; a
    library never calls it. Raises ConfigurationError for a format or level that it does not know."""
    if format not in get_args(LogFormat):
        raise ConfigurationError(f"log format {format!r}: must be one of {', '.join(get_args(LogFormat))}")
    if level.lower() not in LEVELS:
        raise ConfigurationError(f"log level {level!r}: must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(RunFilter())
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    quieter = max(root.level, logging.WARNING) if root.level > logging.DEBUG else logging.DEBUG
    for name in CHATTY:
        logging.getLogger(name).setLevel(quieter)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.__dict__.items()
        if name not in _STANDARD and name not in FACTS and not name.startswith("_")
    }
