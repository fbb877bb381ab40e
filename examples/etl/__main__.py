"""Load a file, and look whether each row is there exactly once. Run it from the root of the repository:

python -m examples.etl                  # all of rules.csv, on the embedded PostgreSQL: a minute or two
python -m examples.etl some.csv

The same file again is the same run: nothing is loaded twice. Kill it in the middle and begin anew: it goes on.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import psycopg
from examples.etl.etl import TABLES, load_file, load_row

from durable import AsyncDurable, RunFailed

app = AsyncDurable(workflows=[load_file, load_row])


async def main(path: Path) -> int:
    """Returns the exit code."""
    async with app:
        await app.migrate()
        with psycopg.connect(app.store.dsn) as connection:
            connection.execute(TABLES)
        async with app.worker():
            run = await app.start(load_file, str(path), key=path.name)
            print(f"run {run.id}", flush=True)
            try:
                report = await run.result()
            except RunFailed as failed:  # too many bad rows
                print(failed)
                return 1
        with psycopg.connect(app.store.dsn) as connection:
            rows, distinct = counted(connection, path.name)
    for line, reason in report.rejected.items():
        print(f"line {line}: {reason}")
    print(f"{report.lines} lines: {report.loaded} loaded, {len(report.rejected)} rejected; the table has {rows} rows")
    return 0 if rows == distinct == report.loaded else 1


def counted(connection: psycopg.Connection[Any], file: str) -> tuple[int, int]:
    """The rows of a file in the table, and how many different lines they are of."""
    query = "select count(*), count(distinct line) from etl.rules where file = %s"
    row = connection.execute(query, [file]).fetchone()
    assert row is not None
    return row[0], row[1]


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("rules.csv")
    sys.exit(asyncio.run(main(Path(given).resolve())))
