"""Fills a database before something is measured on it:

    python -m benchmarks.prepare large|backlog --dsn DSN --size full|quick

`large`: runs that have ended, and runs that are parked, each a copy of one that was executed.
`backlog`: runs that wait for their first step, with a lower priority than what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from typing import Any, Final

import psycopg
from psycopg import sql

from benchmarks.cases import Size
from benchmarks.systems._durable import A_CALL, until_waiting
from benchmarks.systems.durable import KIND
from durable import Start

FINISHED: Final[dict[Size, int]] = {"full": 1_000_000, "quick": 20_000}
PARKED: Final[dict[Size, int]] = {"full": 100_000, "quick": 2_000}
WAITING: Final[dict[Size, int]] = {"full": 50_000, "quick": 1_000}

# Times of the ids, in milliseconds since the epoch: long ago, so that new runs come after them.
FINISHED_AT: Final = 0x018000000000
PARKED_AT: Final = 0x018800000000

Connection = psycopg.Connection[Any]


async def large(dsn: str, size: Size) -> None:
    async with KIND.app(dsn) as app, app.worker():
        finished = await app.start(KIND.steps(1), {"steps": 1})
        await finished.result()
        parked = await app.start(KIND.waiting, {})
        await until_waiting(app, parked)
    with psycopg.connect(dsn, autocommit=True) as connection:
        copy(connection, finished.id, FINISHED[size], FINISHED_AT)
        copy(connection, parked.id, PARKED[size], PARKED_AT)
        connection.execute("vacuum analyze")


def copy(connection: Connection, run: uuid.UUID, count: int, first: int) -> None:
    """So many runs like this one, with all that belongs to them. `first`: the time of their ids."""
    new = sql.SQL(
        "(lpad(to_hex({first}::bigint + n), 12, '0') || '70008000' || lpad(to_hex(n::bigint), 12, '0'))::uuid"
    ).format(first=sql.Literal(first))
    _copy_rows(connection, "runs", "id", ("id", "root_id"), run, count, new)
    for table in _belonging(connection):
        _copy_rows(connection, table, "run_id", ("run_id",), run, count, new)


def _belonging(connection: Connection) -> list[str]:
    found = connection.execute(
        """
        select c.relname from pg_attribute a join pg_class c on c.oid = a.attrelid
        where c.relnamespace = 'durable'::regnamespace and c.relkind = 'r' and c.relpersistence = 'p'
          and a.attname = 'run_id' and not a.attisdropped
        order by 1
        """
    )
    return [name for (name,) in found]


def _copy_rows(
    connection: Connection,
    table: str,
    key: str,
    renamed: tuple[str, ...],
    run: uuid.UUID,
    count: int,
    new: sql.Composed,
) -> None:
    """Copies of a run's rows in one table, the `renamed` columns with a new id, all times a second apart."""
    columns = connection.execute(
        """
        select column_name, data_type = 'timestamp with time zone' from information_schema.columns
        where table_schema = 'durable' and table_name = %s and is_identity = 'NO' and is_generated = 'NEVER'
        """,
        [table],
    ).fetchall()

    def copied(name: str, is_time: bool) -> sql.Composable:
        if name in renamed:
            return new
        old = sql.SQL("t.{}").format(sql.Identifier(name))
        return sql.SQL("{} - ({} - n) * interval '1 s'").format(old, sql.Literal(count)) if is_time else old

    connection.execute(
        sql.SQL(
            "insert into durable.{table} ({names}) "
            "select {values} from durable.{table} t, generate_series(1, {count}) n where t.{key} = {run}"
        ).format(
            table=sql.Identifier(table),
            names=sql.SQL(", ").join(sql.Identifier(name) for name, _ in columns),
            values=sql.SQL(", ").join(copied(name, is_time) for name, is_time in columns),
            count=sql.Literal(count),
            key=sql.Identifier(key),
            run=sql.Literal(run),
        )
    )


async def backlog(dsn: str, size: Size) -> None:
    async with KIND.app(dsn) as app:
        for _ in range(0, WAITING[size], A_CALL):
            await app.start_many(KIND.steps(1), [Start({"steps": 1}, priority=-100)] * A_CALL)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("vacuum analyze")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", choices=("large", "backlog"))
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--size", choices=("full", "quick"), required=True)
    given = parser.parse_args()
    asyncio.run((large if given.kept == "large" else backlog)(given.dsn, given.size))
    print(json.dumps({"kept": given.kept}))


if __name__ == "__main__":
    main()
