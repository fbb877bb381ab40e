"""Payloads: Python values at the borders of the engine, JSON text inside it.

A :class:`Schema` is the declared type of such a border. It stores only what comes back as it was: a value that would
return as something else (a tuple as a list, ``{1: ...}`` as ``{"1": ...}``, a model as a dict) is refused where it is
made, not discovered where it is used. Declare a type, and pydantic brings the value back as that type.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from pydantic import AwareDatetime, BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from durable.define.annotations import describe, return_annotation
from durable.define.retry import LONGEST
from durable.errors import DefinitionError, PayloadError
from durable.values import JsonText

MAX_DEPTH: Final = 200
"""How deeply lists and dicts may be nested."""

LAST_YEAR: Final = 9000
"""The last year to which a run may sleep: Python and PostgreSQL can write it in every time zone."""

_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1
_PLAIN = (Any, object)


class Schema:
    """The declared type of a payload.

    - `annotation`: any type that pydantic understands; Any: plain JSON values only.
    - `loose`: dump whatever pydantic can serialise, without asking that it comes back the same; for values whose type
      somebody else declares (a signal's sender, a child's input).
    - `prepare`: applied to a value before it is dumped.
    - `coerce`: a value that is not of the type but is plain JSON that matches it is taken too, as in ``start("order",
      {"id": 1})`` for a pydantic model.

    Raises DefinitionError if pydantic can't handle the annotation.
    """

    __slots__ = ("_adapter", "_as_it_is", "annotation", "coerce", "loose", "prepare")

    def __init__(
        self,
        annotation: Any = Any,
        *,
        loose: bool = False,
        prepare: Callable[[Any], Any] | None = None,
        coerce: bool = False,
    ) -> None:
        self.annotation, self.loose, self.prepare, self.coerce = annotation, loose, prepare, coerce
        self._adapter = None if annotation in _PLAIN else _adapter(annotation)
        self._as_it_is = next((kind for declared, kind in _PLAIN_TYPES if annotation == declared), None)

    def __repr__(self) -> str:
        return f"Schema({describe(self.annotation)}{', loose=True' if self.loose else ''})"

    @classmethod
    def of_return(cls, fn: Callable[..., Any]) -> Schema:
        """The schema of what `fn` returns, by its annotation; without one, or under TYPE_CHECKING only: ANY.

        Raises DefinitionError if the annotation can't be resolved, or is no type that can be stored.
        """
        annotation = return_annotation(fn)
        if annotation in _PLAIN:
            return ANY
        try:
            return cls(annotation)
        except DefinitionError as error:
            name = getattr(fn, "__qualname__", repr(fn))
            raise DefinitionError(f"the return type of {name}: {error}") from error

    @classmethod
    def of_input(cls, annotation: Any) -> Schema:
        """The schema of a workflow's input: takes values of the type, and plain JSON that matches it."""
        return ANY if annotation in _PLAIN else cls(annotation, coerce=True)

    def dump(self, value: Any) -> JsonText:
        """`value` as JSON text. Raises PayloadError, which says where in the value and why, if it can't be stored."""
        if self.prepare is not None:
            value = self.prepare(value)
        if self.loose:
            return _loose_text(value)
        if self._adapter is None:
            return _plain_text(value)
        if type(value) is self._as_it_is and (text := _text_that_fits(value)) is not None:
            return text
        try:
            return self._typed_text(value)
        except PayloadError:
            if not self.coerce or not isinstance(value, dict | list | str | int | float):
                raise
        return self._typed_text(self.load(_plain_text(value)))

    def load(self, text: JsonText) -> Any:
        """The value that `text` stands for. Raises PayloadError if it is no JSON or does not match the type."""
        try:
            if self._adapter is None or self.loose:
                return _DECODER.decode(text)
            return self._adapter.validate_json(text)
        except ValidationError as error:
            raise PayloadError(f"does not match {describe(self.annotation)}: {_problems(error)}") from error
        except json.JSONDecodeError as error:
            raise PayloadError(f"is not JSON: {error}") from error
        except RecursionError as error:
            raise PayloadError(f"is nested too deeply: at most {MAX_DEPTH} levels") from error
        except Exception as error:  # validators are the user's code
            raise PayloadError(f"can't be read as {describe(self.annotation)}: {_told(error)}") from error

    def _typed_text(self, value: Any) -> JsonText:
        assert self._adapter is not None
        text = _plain_text(_jsonable(self._adapter, value))
        try:
            back = self.load(text)
        except PayloadError as error:
            raise PayloadError(f"{_named(value)} {error.why}", path=error.path) from error
        different = _difference(value, back, "")
        if different is not None and not self._stable(value, back, text):
            path, why = different
            raise PayloadError(f"{why} (declared: {describe(self.annotation)})", path=path)
        return text

    def _stable(self, value: Any, back: Any, text: JsonText) -> bool:
        """For objects that can't be compared: the same type, made of the same text."""
        if type(value) is not type(back) or isinstance(value, (*_JSON_TYPES, tuple, set, frozenset, BaseModel)):
            return False
        if dataclasses.is_dataclass(value):
            return False
        assert self._adapter is not None
        return _plain_text(_jsonable(self._adapter, back)) == text


_JSON_TYPES = (str, int, float, bool, type(None), list, dict)
_PLAIN_TYPES: Final[tuple[tuple[Any, type], ...]] = (
    *((kind, kind) for kind in _JSON_TYPES), (None, type(None)), (dict[str, Any], dict), (list[Any], list),
)  # fmt: skip
"""Declared types that say no more of a value of that type than plain JSON does: there is nothing to be checked."""


@lru_cache(maxsize=1024)
def _cached_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    if isinstance(annotation, str):
        raise DefinitionError(f"{annotation!r} is a string: give the type itself")
    try:
        try:
            return _cached_adapter(annotation)
        except TypeError:  # unhashable, as Annotated[..., {...}] is; or no type at all, which this tells anew
            return TypeAdapter(annotation)
    except Exception as error:  # pydantic's, or that of a __get_pydantic_core_schema__
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DefinitionError(
            f"{describe(annotation)} is no type that can be stored: use plain JSON types, dataclasses, TypedDicts or "
            f"pydantic models ({why})"
        ) from error


# ---------------------------------------------------------------- plain JSON: the fast way


def _plain_text(value: Any) -> JsonText:
    """JSON text of a value that consists of plain JSON types only."""
    text = _text_that_fits(value)
    return _slow_text(value) if text is None else text


def _text_that_fits(value: Any) -> JsonText | None:
    """JSON text of a value that comes back from it as it was; None if there is anything about it that may not."""
    if value is None:
        return "null"
    try:
        if _fits(value, MAX_DEPTH):
            text = _ENCODER.encode(value)
            if "\\u0000" not in text and (text.isascii() or text.encode("utf-8")):
                return text
    except (ValueError, RecursionError):
        pass  # NaN, a lone surrogate, a stack that is nearly full: found again, with its place, by _slow_text
    return None


def _slow_text(value: Any) -> JsonText:
    """As _plain_text, for a value that looks wrong: says what is wrong in it, where."""
    try:
        for path, why in _faults(value, "", MAX_DEPTH):
            raise PayloadError(why, path=path)
        return _ENCODER.encode(value)
    except RecursionError as error:
        raise PayloadError(f"is nested too deeply: at most {MAX_DEPTH} levels") from error


def _fits(value: Any, room: int) -> bool:
    """Whether `value` is made of plain JSON types, whole numbers within 64 bits, and nests at most `room` levels."""
    kind = type(value)
    if kind is str or kind is bool or kind is float or value is None:
        return True
    if kind is int:
        return _MIN_INT <= value <= _MAX_INT  # type: ignore[no-any-return]
    if room == 0:
        return False
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                return False
            if type(item) is not str and not _fits(item, room - 1):
                return False
        return True
    if kind is list:
        return all(type(item) is str or _fits(item, room - 1) for item in value)
    return False


def _faults(value: Any, path: str, room: int) -> Iterator[tuple[str, str]]:
    """(path, why) of each thing in `value` that plain JSON can't hold."""
    match value:
        case None | bool():
            return
        case str():
            yield from _string_faults(value, path)
        case int():
            if not _MIN_INT <= value <= _MAX_INT:
                yield path, "the whole number does not fit into 64 bits: store it as a string"
        case float():
            if not math.isfinite(value):
                yield path, f"{value!r} is no JSON number: store None or a string"
        case dict() | list() if room == 0:
            yield path[:80] + "...", f"is nested too deeply: at most {MAX_DEPTH} levels (or it contains itself)"
        case dict():
            yield from _dict_faults(value, path, room)
        case list():
            for index, item in enumerate(value):
                yield from _faults(item, f"{path}[{index}]", room - 1)
        case _:
            yield path, _unstorable(value)


def _dict_faults(value: dict[Any, Any], path: str, room: int) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if not isinstance(key, str):
            yield path, f"the key {key!r} would come back as a string: use string keys, or declare the type"
            continue
        for _, why in _string_faults(key, path):
            yield path, f"the key {key!a}: {why}"
        yield from _faults(item, f"{path}.{key}", room - 1)


def _string_faults(value: str, path: str) -> Iterator[tuple[str, str]]:
    if "\0" in value:
        yield path, "the string contains \\u0000, which PostgreSQL can't store"
    try:
        str.encode(value, "utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        yield path, f"the string contains a lone surrogate (\\u{code:04x}), which is no text: decode it properly"


def _unstorable(value: Any) -> str:
    cure = "declare the type (a return annotation, input=, type=), or turn it into plain JSON"
    match value:
        case tuple():
            return f"a {type(value).__name__} would come back as a list: return a list, or {cure}"
        case set() | frozenset():
            return f"a {type(value).__name__} would come back as a list: sort it into a list, or {cure}"
        case bytes() | bytearray() | memoryview():
            return "bytes are no JSON: encode them (base64), or declare the type"
    return f"{_named(value)} can't be stored without a declared type: {cure}"


def _refuse_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON number", name, 0)


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


# ---------------------------------------------------------------- declared and loose values


def _jsonable(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.dump_python(value, mode="json", round_trip=True, warnings="none")
    except Exception as error:  # pydantic's, or a serializer's of the user
        raise PayloadError(f"{_named(value)} can't be turned into JSON: {_told(error)}") from error


def _loose_text(value: Any) -> JsonText:
    try:
        return _plain_text(value)
    except PayloadError as error:
        fault = error
    try:
        jsonable = to_jsonable_python(value, inf_nan_mode="constants", by_alias=True)
        python = _ANYTHING.dump_python(value, mode="python", warnings="none")
    except Exception as error:
        if type(error) in (ValueError, UnicodeEncodeError, RecursionError):  # depth, half a pair: we know where it is
            raise fault from error
        raise PayloadError(f"{_named(value)} can't be turned into JSON: {_told(error)}") from error
    text = _plain_text(jsonable)
    if _hides_nan(python):
        raise PayloadError("it contains NaN or Infinity, which are no JSON numbers: store None or a string")
    return text


_ANYTHING: Final = TypeAdapter[Any](Any)


def _hides_nan(value: Any) -> bool:
    """Whether there is a NaN in it: pydantic dumps some as null."""
    match value:
        case float():
            return not math.isfinite(value)
        case dict():
            return any(map(_hides_nan, value.values()))
        case list() | tuple() | set() | frozenset():
            return any(map(_hides_nan, value))
    return False


def _difference(value: Any, back: Any, path: str) -> tuple[str, str] | None:
    """Where `back` is not what `value` was, and how; None if it is the same."""
    if _equal(value, back):
        return None
    if type(value) is not type(back):
        return path, f"{_named(value)} would come back as {_named(back)}"
    parts = _parts(value), _parts(back)
    if parts[0] is None or parts[1] is None:
        return path, f"{_named(value)} would come back as another value: its type must define __eq__ or use plain types"
    for key in sorted(parts[0].keys() | parts[1].keys()):
        if key not in parts[0] or key not in parts[1]:
            return path + key, "would be lost or added"
        found = _difference(parts[0][key], parts[1][key], path + key)
        if found is not None:
            return found
    return None


def _equal(value: Any, back: Any) -> bool:
    try:
        return bool(value == back)
    except Exception:  # a comparison of the user's, or one without a truth value
        return False


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of a container by their path; None for anything else."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        parts = {f".{name}": getattr(value, name, None) for name, field in fields.items() if not field.exclude}
        return parts | {f".{name}": item for name, item in (value.model_extra or {}).items()}
    if dataclasses.is_dataclass(value):
        return {f".{f.name}": getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {f".{key}" if isinstance(key, str) else f"[{key!r}]": item for key, item in value.items()}
    if isinstance(value, list | tuple):
        return {f"[{index}]": item for index, item in enumerate(value)}
    return None


def _named(value: Any) -> str:
    """``a Decimal``: what a value is, without its contents, which may be secret."""
    name = type(value).__name__
    if value is None:
        return "None"
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _told(error: BaseException) -> str:
    try:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    except Exception:  # an exception with an unprintable message
        return type(error).__name__


def _problems(error: ValidationError) -> str:
    """The first few problems of a failed validation, without the values."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, p['loc'])) + ': ' if p['loc'] else ''}{p['msg']}" for p in problems[:3]]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(told) + more


def _duration(value: Any) -> Any:
    if isinstance(value, bool):
        raise PayloadError("a bool is no duration: return seconds, a timedelta or an aware datetime")
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, int | float) and abs(seconds) > LONGEST:
        raise PayloadError(f"{value!r} is more than a thousand years, or no number")
    if isinstance(value, datetime) and value.year > LAST_YEAR:
        raise PayloadError(f"{value!r} is too far away: at most the year {LAST_YEAR}")
    return value


def canonical_hash(text: JsonText) -> str:
    """The SHA-256, in hex, of a JSON document with its keys sorted: the same for texts that mean the same.

    Raises PayloadError if it is no JSON.
    """
    value = ANY.load(text)
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


ANY: Final = Schema(Any)
"""Plain JSON values, which come back as they were."""
LOOSE: Final = Schema(Any, loose=True)
"""Anything that can be turned into JSON; whoever reads it says what it is."""
NOTHING: Final = Schema(Any, prepare=lambda _: None)
"""Whatever it is, it is dropped: a compensator's return value."""
DURATION: Final = Schema(float | timedelta | AwareDatetime, prepare=_duration)
"""What the function of a sleep returns."""
