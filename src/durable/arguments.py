"""What app code hands to the operations, checked before anything is done: a mistake costs no round trip."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, TypeAlias, TypeVar, get_args

from durable.config import Embedded, normalise
from durable.define.builder import check_name
from durable.define.payload import ANY, LOOSE
from durable.define.retry import LONGEST
from durable.errors import ConfigurationError, DefinitionError, PayloadError, RunNotFound
from durable.migrate import valid
from durable.queue import MAX_PRIORITY, valid_queue
from durable.values import JsonText

RunId: TypeAlias = uuid.UUID | str
Seconds: TypeAlias = float | timedelta
N = TypeVar("N", bound=float)
Tag: TypeAlias = str | int | float | bool | None

MAX_KEY: Final = 500
MAX_KEY_BYTES: Final = 1_500  # with a workflow's name beside it, what an index of PostgreSQL can hold
MAX_TAGS: Final = 50
MAX_TAG: Final = 500


def run_id(given: object) -> uuid.UUID:
    """The id of a run. Raises RunNotFound for what can't be one."""
    if isinstance(given, uuid.UUID):
        return given
    try:
        return uuid.UUID(given)  # type: ignore[arg-type]  # whatever it is, we are about to know
    except (ValueError, AttributeError, TypeError):
        raise RunNotFound(given) from None


def new_id(given: RunId) -> uuid.UUID:
    """The id for a new run. Raises PayloadError if it is no UUID."""
    try:
        return run_id(given)
    except RunNotFound:
        raise PayloadError(f"{given!r} is no UUID: leave it out, or use key= for an id of your own",
                           where="the id") from None  # fmt: skip


def key(given: str | None) -> str | None:
    """A business key: 1 to 500 characters."""
    return None if given is None else _text(given, "the key")


def message_id(given: str | uuid.UUID | None) -> str | None:
    """What makes a message the same: 1 to 500 characters, or a UUID."""
    if isinstance(given, uuid.UUID):
        return str(given)
    return None if given is None else _text(given, "the message's id")


def name(given: str, what: str) -> str:
    """The name of a signal, or of a wait."""
    try:
        return check_name(given, where=what, what="the name", reserved="")
    except DefinitionError as error:
        raise PayloadError(str(error).removeprefix(f"{what}: "), where=what) from None


def tags(given: object) -> dict[str, Tag]:
    """Tags: up to 50 names with strings, numbers, bools or None. Raises PayloadError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise PayloadError(f"must be a mapping of names to values, not {given!r}", where="the tags")
    if len(given) > MAX_TAGS:
        raise PayloadError(f"there are {len(given)}: at most {MAX_TAGS}", where="the tags")
    for tag, value in given.items():
        _text(tag, "a tag's name")
        if not isinstance(value, str | int | float | bool | None):
            raise PayloadError(
                f"{value!r} must be a string, a number, a bool or None", where="the tags", path=f".{tag}"
            )
        if isinstance(value, str) and len(value) > MAX_TAG:
            raise PayloadError(f"{len(value)} characters: at most {MAX_TAG}", where="the tags", path=f".{tag}")
    try:
        plain: dict[str, Tag] = json.loads(ANY.dump(dict(given)))
    except PayloadError as error:
        raise error.at("the tags") from None
    return plain


def priority(given: object) -> int:
    """Raises ConfigurationError unless it is a whole number that the queue can order by."""
    if isinstance(given, bool) or not isinstance(given, int) or abs(given) > MAX_PRIORITY:
        raise ConfigurationError(
            f"priority={given!r} must be a whole number from -{MAX_PRIORITY:,} to {MAX_PRIORITY:,}"
        )
    return given


def span(given: object, what: str) -> timedelta | None:
    """Seconds or a timedelta, not negative. Raises ConfigurationError."""
    if given is None:
        return None
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= LONGEST:
        raise ConfigurationError(f"{what}={given!r} must be seconds or a timedelta, from 0 to a thousand years")
    return timedelta(seconds=seconds)


def payload(value: Any, what: str) -> JsonText:
    """The JSON text of a value whose type somebody else declares. Raises PayloadError."""
    try:
        return LOOSE.dump(value)
    except PayloadError as error:
        raise error.at(what) from error.__cause__


def reason(given: object) -> str | None:
    """Why a run is canceled."""
    if given is None:
        return None
    if not isinstance(given, str):
        raise PayloadError(f"must be a string, not {given!r}", where="the reason")
    payload(given, "the reason")
    return given


# ---------------------------------------------------------------- the app's own


def dsn(given: object) -> str | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise ConfigurationError("dsn= must be a URL like postgresql://user@host/database, or None")
    return normalise(given, "the dsn argument")


def queue(given: object) -> str:
    if not isinstance(given, str):
        raise ConfigurationError(f"queue={given!r} must be a string")
    return valid_queue(given)


def schema(given: object) -> str:
    if not isinstance(given, str):
        raise ConfigurationError(f"schema={given!r} must be a string")
    return valid(given)


def embedded(given: str) -> Embedded:
    if given not in get_args(Embedded):
        raise ConfigurationError(f"embedded={given!r} must be one of {', '.join(get_args(Embedded))}")
    return given  # type: ignore[return-value]  # it is one of them


def at_least(given: N, least: int, what: str, *, whole: bool = True) -> N:
    """A number of an option. Raises ConfigurationError."""
    number = isinstance(given, int if whole else int | float) and not isinstance(given, bool)
    if not number or not least <= given < math.inf:
        raise ConfigurationError(f"{what}={given!r} must be a {'whole ' if whole else ''}number of at least {least}")
    return given


def codec(given: Any) -> Any:
    if given is not None and not (
        callable(getattr(given, "encode", None)) and callable(getattr(given, "decode", None))
    ):
        raise ConfigurationError(f"codec={given!r} must have encode(bytes) -> bytes and decode(bytes) -> bytes")
    return given


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise PayloadError(f"must be a string, not {given!r}", where=what)
    if not given:
        raise PayloadError("is empty", where=what)
    if len(given) > MAX_KEY:
        raise PayloadError(f"{given[:20]!a}... has {len(given)} characters: at most {MAX_KEY}", where=what)
    try:
        ANY.dump(given)
    except PayloadError as error:
        raise error.at(what) from None
    if len(given.encode()) > MAX_KEY_BYTES:
        raise PayloadError(f"{given[:20]!a}... is longer than {MAX_KEY_BYTES:,} bytes", where=what)
    return given
