"""Statements as they are kept: with the schema's name in place, and with numbered parameters for a flush."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

_PARAMETER: Final = re.compile(rb"%\((\w+)\)s|%%")


class Statement(bytes):
    """A statement with ``%(name)s`` for its parameters, as psycopg takes it.

    - `numbered`: the same as the server takes it, with ``$1``; `names`: whose values these are, in their order.
    """

    numbered: bytes
    names: tuple[str, ...]
    pick: Callable[[Mapping[str, Any]], Sequence[Any]]  # their values, in that order

    @classmethod
    def of(cls, text: str) -> Statement:
        """`text` with its parameters found."""
        query = cls(text.encode())
        names: dict[bytes, int] = {}

        def number(found: re.Match[bytes]) -> bytes:
            return b"%" if found[1] is None else b"$%d" % names.setdefault(found[1], len(names) + 1)

        query.numbered = _PARAMETER.sub(number, query)
        query.names = tuple(name.decode() for name in names)
        query.pick = _picker(query.names)
        return query


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: [values[name] for name in names]


class statement:  # noqa: N801 - reads like a keyword
    """A statement with ``{schema}`` in it; as an attribute of Statements with the schema's name in place."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()

    def __set_name__(self, owner: type[Statements], name: str) -> None:
        self.name = name

    def __get__(self, bound: Statements, owner: type[Statements]) -> Statement:
        made = bound.statement(self.text)
        bound.__dict__[self.name] = made  # found there before this is asked again
        return made


class Statements:
    """Statements for one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = f'"{schema}"'

    def statement(self, text: str) -> Statement:
        """`text` for this schema."""
        return Statement.of(text.replace("{schema}", self.schema))
