"""The schema of the database."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from durable import migrate as schemas
from durable.cli import output
from durable.cli.options import Where
from durable.cli.problems import DONE, FAILED, UsageError
from durable.config import resolve


def migrate(
    *,
    check: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    sql: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    where: Where = Where(),  # noqa: B008  # frozen
) -> int:
    """Bring the database to the schema that this version of durable needs. Any number of processes may do it at once.

    Parameters
    ----------
    check
        Change nothing; exit 1 and say what is missing if the database is not what this version needs.
    sql
        Change nothing; print the whole schema as SQL.
    """
    if check and sql:
        raise UsageError("--check and --sql exclude each other")
    schema = where.schema
    if sql:
        print(schemas.sql(schema))
        return DONE
    database = resolve(where.dsn)
    try:
        print(f"{database}, schema {schema}", file=sys.stderr)
        missing = schemas.check(database.dsn, schema, source=database.source)
        if missing and not check:
            schemas.upgrade(database.dsn, schema, source=database.source)
        return _told(where, missing, check=check)
    finally:
        database.close()


def _told(where: Where, missing: list[str], *, check: bool) -> int:
    if where.json:
        output.print_json({"revision": schemas.HEAD, "missing" if check else "applied": missing})
    elif missing:
        print("\n".join([*(f"{'missing' if check else 'applied'}: {one}" for one in missing)]))
    else:
        print(f"the database is at revision {schemas.HEAD}: nothing to do")
    return FAILED if missing and check else DONE
