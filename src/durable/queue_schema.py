"""procrastinate's own tables in our schema: its SQL from the installed package, never a copy of it.

The package has a schema for new databases and migration files for old ones, but keeps no record of what it did: ours is
the table ``queue_schema``. After either, its functions are made to work on any connection and at any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from procrastinate.schema import SchemaManager

Version = tuple[int, ...]

# The fetch is O(backlog) until the planner has statistics; with these off it takes the indexes at once: about 1 ms.
NOT_FOR_FETCH: Final = ("enable_seqscan", "enable_hashjoin", "enable_mergejoin", "enable_bitmapscan", "enable_sort")


def install(execute: Callable[[sa.TextClause], object], schema: str) -> None:
    """Into a new schema, which is the search_path and has its ``queue_schema``: called by the first migration.

    `execute` is ``op.execute``: this works offline too.
    """
    execute(_text(SchemaManager.get_schema()))
    execute(_harden(schema))
    execute(_record(schema, installed()))


def upgrade(connection: sa.Connection, schema: str) -> list[str]:
    """Bring the tables to the installed version, in the caller's transaction; returns the files that were run."""
    files = pending(recorded(connection, schema))
    if files:
        connection.execute(sa.text(f'set local search_path to "{schema}"'))
        for file in files:
            connection.execute(_text(file.read_text(encoding="utf-8")))
        connection.execute(_harden(schema))
        connection.execute(_record(schema, installed()))
    return [file.name for file in files]


def installed() -> str:
    return installed_version("procrastinate")


def recorded(connection: sa.Connection, schema: str) -> str | None:
    """The newest version that was applied here."""
    versions = connection.scalars(sa.text(f'select version from "{schema}".queue_schema')).all()
    return max(versions, key=parse, default=None)


def pending(applied: str | None) -> list[Path]:
    """The installed package's migration files that a database at that version still needs."""
    return newer(Path(SchemaManager.get_migrations_path()).glob("*.sql"), applied) if applied else []


def newer(files: Iterable[Path], applied: str) -> list[Path]:
    """Those after a version, in order: ``xx.yy.zz_NN_pre_…`` before ``xx.yy.zz_NN_post_…``, by their numbers."""
    known = parse(applied)
    return sorted((file for file in files if parse(file.name.split("_")[0]) > known), key=lambda file: file.name)


def parse(version: str) -> Version:
    """``3.10.0`` and ``03.10.00`` are the same; what follows the numbers (``rc1``) does not count."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def _text(script: str) -> sa.TextClause:
    return sa.text(script.strip().removesuffix(";").replace(":", r"\:"))


def _record(schema: str, version: str) -> sa.TextClause:
    return _text(
        f"insert into \"{schema}\".queue_schema (version, applied_at) values ('{version}', clock_timestamp()) "
        "on conflict do nothing"
    )


def _harden(schema: str) -> sa.TextClause:
    """Its triggers fire on users' connections, whose search_path is another; its fetch gets a fixed plan; and the rows
    and notifications that it makes of a job's life it makes for others' jobs only: of ours the runs' tables tell, and
    ``wake_workers`` announces them."""
    off = (f"      execute format('alter routine %s set {name} = off', f.routine);" for name in NOT_FOR_FETCH)
    pinned = "\n".join(off)
    return _text(f"""
do $harden$
declare
  f record;
  t record;
begin
  for f in
    select p.oid::regprocedure as routine, p.proname as name
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname = '{schema}' and p.proname like 'procrastinate\\_%'
  loop
    execute format('alter routine %s set search_path = %I, pg_temp', f.routine, '{schema}');
    if f.name like 'procrastinate\\_fetch\\_job%' then
{pinned}
    end if;
  end loop;
  for t in
    select tgname as name, pg_get_triggerdef(oid) as made from pg_trigger
    where tgrelid = '{schema}.procrastinate_jobs'::regclass and tgname ~ 'events|job_inserted'
      and pg_get_triggerdef(oid) not like '%!~~ ''durable.%'
  loop
    execute format('drop trigger %I on {schema}.procrastinate_jobs', t.name);
    execute regexp_replace(
      case when t.made like '% WHEN (%' then t.made else replace(t.made, ' EXECUTE ', ' WHEN (true) EXECUTE ') end,
      ' WHEN (.*) EXECUTE ', ' WHEN ((\\1) and new.task_name not like ''durable.%'') EXECUTE '
    );
  end loop;
end $harden$
""")
