"""A file of rows into a table, each exactly once: one run for the file, and one for each row of it.

A row that can't be converted fails its own run, and nothing else: the file's run reports it and goes on, unless more
than a share of all rows is bad.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel
from sqlalchemy import text

from durable import Context, Failures, MapResults, NonRetryable, StepContext, workflow

TOLERATED: Final = 0.05
"""The share of the rows that may be bad."""
AT_ONCE: Final = 50
"""Rows that are under way at the same time."""

TABLES: Final = """
create schema if not exists etl;
create table if not exists etl.rules (
  file text not null, line integer not null, name text not null,
  first_year integer not null, last_year integer,
  month integer not null check (month between 1 and 12), day text not null,
  at time not null, clock text not null check (clock in ('wall', 'standard', 'universal')),
  saving interval not null check (saving between '0' and '2 hours'), letters text not null);
create table if not exists etl.rejected (file text not null, line integer not null, reason text not null);
"""
"""No unique constraint on purpose: it would hide a row that was loaded twice."""

MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
CLOCKS: Final[dict[str, Literal["standard", "universal"]]] = {"s": "standard", "u": "universal"}


class Line(BaseModel):
    """A line of the file, as it stands there."""

    file: str
    number: int
    values: dict[str, str]


class Rule(NamedTuple):
    """A row of the table."""

    name: str
    first_year: int
    last_year: int | None
    month: int
    day: str
    at: str
    clock: Literal["wall", "standard", "universal"]
    saving: str
    letters: str


class Report(BaseModel):
    """What became of a file."""

    lines: int
    loaded: int
    rejected: dict[int, str]


class BadRow(NonRetryable):
    """To try it again would be of no use."""


# ---------------------------------------------------------------- one row


@workflow
async def load_row(ctx: Context, line: Line) -> None:
    await ctx.step(load, line)


def load(ctx: StepContext[Line], line: Line) -> None:
    """Convert, and insert in the run's own transaction: the row is there exactly if the step is recorded as done."""
    try:
        rule = converted(line.values)
    except ValueError as error:
        raise BadRow(str(error)) from error
    insert = """
        insert into etl.rules values (:file, :line, :name, :first_year, :last_year, :month, :day, cast(:at as time),
        :clock, cast(:saving as interval), :letters)
    """
    ctx.connection().execute(text(insert), {"file": line.file, "line": line.number, **rule._asdict()})


def converted(row: dict[str, str]) -> Rule:
    """Raises ValueError for what the table can't hold."""
    first = int(row["from"])
    last = {"only": first, "max": None}.get(row["to"], row["to"])
    return Rule(
        name=row["name"],
        first_year=first,
        last_year=None if last is None else int(last),
        month=MONTHS.index(row["in"]) + 1,
        day=row["on"],
        at=_time(row["at"].rstrip("su")),
        clock=CLOCKS.get(row["at"][-1], "wall"),
        saving=_saving(row["save"]),
        letters=row["letters"],
    )


def _time(given: str) -> str:
    """`24:00` is a time for PostgreSQL, too: the end of the day."""
    hours, _, minutes = given.partition(":")
    if not 0 <= int(hours) * 60 + int(minutes or 0) <= 24 * 60:
        raise ValueError(f"at: {given} is no time of day")
    return f"{hours}:{minutes or '00'}"


def _saving(given: str) -> str:
    if given.startswith("-"):
        raise ValueError(f"save: {given}: a clock that is put back for the winter is nothing that the table can hold")
    hours, _, minutes = given.partition(":")
    return f"{hours} hours {minutes or 0} minutes"


# ---------------------------------------------------------------- the file


@workflow
async def load_file(ctx: Context, path: str) -> Report:
    lines = await ctx.step(read, path)
    loaded = await ctx.map("rows", load_row, lines, concurrency=AT_ONCE, policy=Failures(TOLERATED))
    rejected = reasons(lines, loaded)
    await ctx.step(report, path, rejected)
    return Report(lines=len(lines), loaded=len(loaded.finished), rejected=rejected)


def read(path: str) -> list[Line]:
    """The file is read once: what comes after works on the lines that are in the journal."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Line(file=Path(path).name, number=rows.line_num, values=row) for row in rows]


def reasons(lines: list[Line], loaded: MapResults[None]) -> dict[int, str]:
    """Why which lines were rejected."""
    return {lines[place].number: failed.error["message"] for place, failed in loaded.failures.items()}


def report(ctx: StepContext[str], path: str, rejected: dict[int, str]) -> None:
    """For a person to look at."""
    rows = [{"file": Path(path).name, "line": line, "reason": reason} for line, reason in rejected.items()]
    if rows:
        ctx.connection().execute(text("insert into etl.rejected values (:file, :line, :reason)"), rows)
