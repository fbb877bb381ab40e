"""An exception as the journal keeps it. Nothing here raises, whatever the exception's own methods do."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from durable.core.state import Failure

MESSAGE_LIMIT: Final = 10_000
TRACEBACK_LIMIT: Final = 20_000


def failure_of(error: BaseException, kind: str, step: str | None = None, attempts: int = 1) -> Failure:
    """`error` as the journal keeps it: any text in it is storable, and of a sane length."""
    return Failure(
        type=_type_name(error),
        message=_message(error),
        kind=kind,
        step=step,
        attempts=attempts,
        traceback=_traceback(error),
        details=_details(error),
    )


def _type_name(error: BaseException) -> str:
    cls = type(error)
    return _safe(f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins."), 500)


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as wrong:
        text = f"<the message can't be printed: {type(wrong).__name__} in __str__>"
    return _safe(text, MESSAGE_LIMIT)


def brief(error: BaseException) -> dict[str, str]:
    return {"type": _type_name(error), "message": _message(error)}


def _details(error: BaseException) -> Mapping[str, Any] | None:
    details: dict[str, Any] = {}
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list | tuple) and notes:
        details["notes"] = [_safe(note, MESSAGE_LIMIT) for note in notes[:20] if isinstance(note, str)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        details["cause"] = brief(cause)
    return details or None


def _traceback(error: BaseException) -> str | None:
    """Formatted from the first frame that is the user's."""
    try:
        lines = traceback.format_exception(type(error), error, _users_frames(error.__traceback__), limit=-50)
        text = "".join(lines)
    except BaseException as wrong:
        text = f"<the traceback can't be printed: {type(wrong).__name__}>"
    return _safe(text, TRACEBACK_LIMIT, tail=True)


_OURS: Final = tuple(str(Path(__file__).parent.parent / room) for room in ("core", "define", "engine"))


def _users_frames(trace: TracebackType | None) -> TracebackType | None:
    first = trace
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    return first or trace


def _safe(text: str, limit: int, *, tail: bool = False) -> str:
    """Text that PostgreSQL and JSON take: no NUL, no lone surrogate, at most about `limit` characters."""
    if len(text) > limit:
        cut = f"{len(text) - limit:,} characters cut"
        text = f"[{cut}] ...{text[-limit:]}" if tail else f"{text[:limit]}... [{cut}]"
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
