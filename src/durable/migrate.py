"""Bring a database to the schema that this code needs, or say what is missing.

Everything happens in one transaction under an advisory lock: our schema, Alembic's revisions (their version table lies
in our schema, beside which an app may have its own), then procrastinate's own migration files. Any number of processes
may do it at once. The migrations are ``migrations/`` of the repository, shipped in the wheel as ``durable/migrations``.

Alembic takes half a second to import: start-up, which finds nothing to do, does without.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psycopg
import sqlalchemy as sa

from durable import queue_schema
from durable.config import normalise, shown
from durable.errors import ConfigurationError, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

HEAD: Final = "0001"  # the revision that this code needs; a test compares it to migrations/
DEFAULT_SCHEMA: Final = "durable"
SCHEMA_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,30}")

_alembic = threading.Lock()  # alembic.command keeps its context in globals


def upgrade(dsn: str, schema: str = DEFAULT_SCHEMA, *, source: str = "the DSN") -> None:
    """Bring the database to HEAD. Does nothing if it is there, and refuses one that is newer than this code."""
    from alembic import command

    with _transaction(dsn, schema, source) as connection:
        prepare(connection, schema)
        _missing(connection, schema)  # refuses
        with _alembic:
            command.upgrade(_config(schema, connection), "head")
        queue_schema.upgrade(connection, schema)


def check(dsn: str, schema: str = DEFAULT_SCHEMA, *, source: str = "the DSN") -> list[str]:
    """What `upgrade` would do, a line each; empty if nothing. Changes nothing."""
    with _transaction(dsn, schema, source) as connection:
        return _missing(connection, schema)


def ensure(dsn: str, schema: str = DEFAULT_SCHEMA, *, auto_migrate: bool = False, source: str = "the DSN") -> None:
    """At start-up: the database is what this code needs, or is made so, or SchemaMismatch says what to do."""
    with _transaction(dsn, schema, source) as connection:
        revision = current(connection, schema)
        if revision == HEAD and not queue_schema.pending(queue_schema.recorded(connection, schema)):
            return
        missing = _missing(connection, schema)
    if auto_migrate:
        upgrade(dsn, schema, source=source)
        return
    has = f"has revision {revision}" if revision else f'has no tables of durable in its schema "{schema}"'
    message = (
        f"the database ({shown(normalise(dsn, source))}, from {source}) {has}, this code needs revision {HEAD}; "
        f"missing: {', '.join(missing)}. Run `durable migrate`"
    )
    raise SchemaMismatch(message, found=revision, needed=HEAD)


def current(connection: sa.Connection, schema: str = DEFAULT_SCHEMA) -> str | None:
    """The revision that the database has; None if it has none."""
    table = f'"{valid(schema)}".alembic_version'
    if connection.scalar(sa.text("select to_regclass(:table)"), {"table": table}) is None:
        return None
    return connection.execute(sa.text(f"select version_num from {table}")).scalar()


def sql(schema: str = DEFAULT_SCHEMA) -> str:
    """A script that makes everything on an empty database, for people who let nobody migrate but a person."""
    from alembic import command

    valid(schema)
    script = io.StringIO()
    with _alembic:
        config = _config(schema)
        config.output_buffer = script
        command.upgrade(config, "head", sql=True)
    return script.getvalue()


def prepare(connection: sa.Connection, schema: str) -> None:
    """The frame of every migration, also of those that Alembic's own command line runs: lock, schema, search_path."""
    valid(schema)
    connection.execute(
        sa.text("select pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"durable:migrate:{schema}"}
    )
    # `create schema if not exists` asks for the right to create even if there is nothing to do.
    if not connection.scalar(sa.text("select 1 from pg_namespace where nspname = :name"), {"name": schema}):
        connection.execute(sa.text(f'create schema "{schema}"'))
    connection.execute(sa.text(f'set local search_path to "{schema}"'))


def engine(dsn: str, source: str = "the DSN") -> sa.Engine:
    """SQLAlchemy on a libpq DSN as it is, without a pool: nothing is translated, nothing gets lost."""
    plain = normalise(dsn, source)
    return sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(plain), poolclass=sa.NullPool)


def valid(schema: str) -> str:
    if not SCHEMA_NAME.fullmatch(schema):
        raise ConfigurationError(
            f"{schema!r} cannot be the name of durable's schema: small letters, digits and _, up to 31, "
            "the first one no digit"
        )
    return schema


def scripts() -> Path:
    """The folder of the migrations: in an installed wheel inside the package, in the repository beside it."""
    here = Path(__file__).resolve().parent
    packaged = here / "migrations"
    return packaged if packaged.is_dir() else here.parents[1] / "migrations"


def _missing(connection: sa.Connection, schema: str) -> list[str]:
    from alembic.script import ScriptDirectory

    known = [script.revision for script in ScriptDirectory(str(scripts())).walk_revisions()][::-1]
    revision = current(connection, schema)
    if revision is None:
        return [f"revision {name}" for name in known]
    if revision not in known:
        message = (
            f'the database has revision {revision} in its schema "{schema}", which this version of durable does not '
            f"know: it needs {HEAD}. Upgrade the package; `durable migrate` of an old one cannot help"
        )
        raise SchemaMismatch(message, found=revision, needed=HEAD)
    missing = [f"revision {name}" for name in known[known.index(revision) + 1 :]]
    files = queue_schema.pending(queue_schema.recorded(connection, schema))
    return missing + [f"procrastinate's {file.name}" for file in files]


@contextmanager
def _transaction(dsn: str, schema: str, source: str) -> Iterator[sa.Connection]:
    valid(schema)
    try:
        connection = engine(dsn, source).connect()
    except sa.exc.OperationalError as error:
        raise ConfigurationError(
            f"cannot connect to the database ({shown(normalise(dsn, source))}, from {source}): {error.orig}"
        ) from error.orig
    try:
        with connection, connection.begin():
            yield connection
    except sa.exc.ProgrammingError as error:
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        raise ConfigurationError(
            f"the database ({shown(normalise(dsn, source))}, from {source}) forbids this role to: {error.orig}; "
            f'an owner of its schema "{schema}" can, or somebody who may create it'
        ) from error.orig


def _config(schema: str, connection: sa.Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(schema=schema, connection=connection)
    return config
