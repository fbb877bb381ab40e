"""Runs ``invariants.sql``: all that must hold of the database, in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, TypeAlias

import psycopg
from psycopg import sql

When: TypeAlias = Literal["always", "at rest"]

_HEAD: Final = re.compile(r"^-- (always|at rest): (.+)$", re.MULTILINE)


class Violated(AssertionError):
    """The database holds what it must not."""


def queries() -> list[tuple[When, str, str]]:
    """When each invariant holds, its name, and the query that finds what violates it."""
    parts = _HEAD.split(Path(__file__).with_name("invariants.sql").read_text())[1:]
    return [(when, name, query) for when, name, query in zip(parts[::3], parts[1::3], parts[2::3], strict=True)]  # type: ignore[misc]


def check(dsn: str, *, at_rest: bool = True, schema: str = "durable") -> None:
    """Raises Violated with a readable list. All queries see one moment."""
    found = violations(dsn, at_rest=at_rest, schema=schema)
    if found:
        raise Violated(f"{len(found)} violations:\n" + "\n".join(found))


def violations(dsn: str, *, at_rest: bool = True, schema: str = "durable") -> list[str]:
    """A line for each."""
    found: list[str] = []
    with psycopg.connect(dsn) as connection:
        connection.execute("set transaction isolation level repeatable read, read only")
        connection.execute(sql.SQL("set local search_path to {}").format(sql.Identifier(schema)))
        for when, name, query in queries():
            if when == "always" or at_rest:
                rows = connection.execute(query.encode()).fetchall()
                found += [f"{when}: {name}: run {run_id}: {detail}" for run_id, detail in rows]
    return found
