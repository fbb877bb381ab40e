"""Alembic's environment, used three ways: with a connection handed in (`durable migrate`, `Durable`, tests), offline
(`durable migrate --sql`), and by Alembic's own command line in the repository, on the database that durable takes.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context

from durable import config as settings
from durable import migrate
from durable.store.tables import DEFAULT_SCHEMA, metadata

SCHEMA: str = context.config.attributes.get("schema") or context.get_x_argument(as_dictionary=True).get(
    "schema", DEFAULT_SCHEMA
)


def target() -> sa.MetaData:
    """The metadata as it is in the configured schema."""
    if metadata.schema == SCHEMA:
        return metadata
    moved = sa.MetaData(schema=SCHEMA, naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(moved, schema=SCHEMA)
    return moved


def include_name(name: str | None, kind: str, parents: Any) -> bool:
    """Autogenerate looks at our schema only, and there not at the queue's tables, which are procrastinate's."""
    if kind == "schema":
        return name == SCHEMA
    return not (kind == "table" and name is not None and name.startswith("procrastinate_"))


OPTIONS: dict[str, Any] = {
    "target_metadata": target(),
    "version_table_schema": SCHEMA,
    "include_schemas": True,
    "include_name": include_name,
    "compare_server_default": True,
}


def run(connection: sa.Connection) -> None:
    migrate.prepare(connection, SCHEMA)
    context.configure(connection=connection, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    # "named": the default style would double every % in the script
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS)
    with context.begin_transaction():
        context.execute(f'create schema if not exists "{SCHEMA}"')
        context.execute(f'set local search_path to "{SCHEMA}"')
        context.run_migrations()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    database = settings.resolve()
    context.config.print_stdout(str(database))
    try:
        with migrate.engine(database.dsn, database.source).begin() as connection:
            run(connection)
    finally:
        database.close()
