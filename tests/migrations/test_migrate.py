"""The schema: built by migrations as the metadata says, by five at once, offline, and never against what it is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from procrastinate.schema import SchemaManager
from psycopg import sql
from pytest_postgresql.executors import NoopExecutor
from tests.conftest import Base

from durable import migrate, queue_schema
from durable.errors import ConfigurationError, SchemaMismatch
from durable.store.tables import metadata

TREE = Path(__file__).parents[2]


def run(dsn: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


def relations(dsn: str, schema: str = "durable", *, bodies: bool = False) -> set[object]:
    """Tables, indexes, sequences and functions; with `bodies` also what these do, but for white space."""
    body = r"md5(regexp_replace(prosrc, '\s+', ' ', 'g'))" if bodies else "''"
    return {
        row[0]
        for row in run(
            dsn,
            f"""
            select relkind::text || ' ' || relname from pg_class where relnamespace = '{schema}'::regnamespace
            union all
            select 'f ' || proname || ' ' || {body} from pg_proc where pronamespace = '{schema}'::regnamespace
            """,
        )
    }


# ---------------------------------------------------------------- what is built


def test_head_is_the_last_migration() -> None:
    assert ScriptDirectory(str(migrate.scripts())).get_heads() == [migrate.HEAD]


def test_built_by_migrations_is_what_the_metadata_says(dsn: str) -> None:
    with migrate.engine(dsn).connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: (
                    name == "durable" if kind == "schema" else not str(name).startswith("procrastinate_")
                ),
                "version_table_schema": "durable",
                "compare_server_default": True,
            },
        )
        assert compare_metadata(context, metadata) == []


def test_checks_and_keys_are_what_the_metadata_says(dsn: str, empty_dsn: str) -> None:
    """compare_metadata does not look at check constraints: build it by metadata, and compare what PostgreSQL has."""
    with migrate.engine(empty_dsn).begin() as connection:
        connection.execute(sa.text("create schema durable"))
        metadata.create_all(connection)
    ours = ", ".join(f"'durable.{table.name}'::regclass" for table in metadata.sorted_tables)
    query = (
        "select conrelid::regclass::text, conname, contype::text, pg_get_constraintdef(oid) from pg_constraint "
        f"where conrelid in ({ours}) and contype <> 'n' order by 1, 2"
    )
    assert run(dsn, query) == run(empty_dsn, query)
    query = f"select pg_get_indexdef(indexrelid) from pg_index where indrelid in ({ours}) order by 1"
    assert run(dsn, query) == run(empty_dsn, query)


def test_alembic_check_finds_nothing_to_do(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DURABLE_DATABASE_URL", dsn)
    config = Config(str(TREE / "alembic.ini"))
    command.check(config)


def test_upgrade_does_nothing_the_second_time(dsn: str) -> None:
    before = run(
        dsn, "select xmin, ctid from durable.alembic_version union all select xmin, ctid from durable.queue_schema"
    )
    migrate.upgrade(dsn)
    assert migrate.check(dsn) == []
    after = run(
        dsn, "select xmin, ctid from durable.alembic_version union all select xmin, ctid from durable.queue_schema"
    )
    assert before == after


def test_another_schema_name(empty_dsn: str, dsn: str) -> None:
    migrate.upgrade(empty_dsn, "engine_2")
    assert migrate.check(empty_dsn, "engine_2") == []
    assert relations(empty_dsn, "engine_2") == relations(dsn)
    assert run(empty_dsn, "select to_regnamespace('durable')") == [(None,)]
    migrate.upgrade(empty_dsn, "durable")  # two engines in one database
    assert migrate.check(empty_dsn, "durable") == []


@pytest.mark.parametrize("name", ["", "Durable", "1st", "a-b", 'a"b', "a" * 32, "a;drop", "é", "a\n"])
def test_schema_names_that_cannot_be(name: str) -> None:
    for call in (migrate.upgrade, migrate.check, migrate.ensure):
        with pytest.raises(ConfigurationError, match="cannot be the name of durable's schema"):
            call("postgresql://nowhere/x", name)
    with pytest.raises(ConfigurationError):
        migrate.sql(name)


def test_nothing_is_left_of_a_migration_that_fails(empty_dsn: str) -> None:
    run(empty_dsn, "create schema durable")
    run(empty_dsn, "create table durable.runs (theirs int)")
    with pytest.raises(sa.exc.ProgrammingError, match="already exists"):
        migrate.upgrade(empty_dsn)
    assert relations(empty_dsn) == {"r runs"}


def test_an_app_may_have_an_alembic_of_its_own(empty_dsn: str) -> None:
    run(empty_dsn, "create table alembic_version (version_num varchar(32) primary key)")
    run(empty_dsn, "insert into alembic_version values ('abcdef')")
    migrate.upgrade(empty_dsn)
    assert run(empty_dsn, "select version_num from public.alembic_version") == [("abcdef",)]
    assert run(empty_dsn, "select version_num from durable.alembic_version") == [(migrate.HEAD,)]


@pytest.fixture
def plain_role(empty_dsn: str) -> Iterator[str]:
    """A role without rights, and with the password x."""
    role = run(empty_dsn, "select 'plain_' || current_database()")[0][0]
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login password 'x'").format(sql.Identifier(str(role))))
        yield str(role)
        connection.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(str(role))))


def test_a_role_that_may_not_create_schemas(empty_dsn: str, plain_role: str) -> None:
    with pytest.raises(ConfigurationError, match=r'forbids this role to: permission denied .* schema "durable"'):
        migrate.upgrade(f"{empty_dsn}&user={plain_role}&password=x")


def test_a_schema_made_for_a_role_that_may_not_create_schemas(empty_dsn: str, plain_role: str) -> None:
    run(empty_dsn, f"create schema durable authorization {plain_role}")
    migrate.upgrade(f"{empty_dsn}&user={plain_role}&password=x")
    assert migrate.check(empty_dsn) == []


# ---------------------------------------------------------------- many at once


def test_five_processes_at_once_on_an_empty_database(empty_dsn: str) -> None:
    program = "import sys; from durable import migrate; sys.stdin.readline(); migrate.upgrade(sys.argv[1])"
    command_line = [sys.executable, "-W", "error", "-c", program, empty_dsn]
    processes = [subprocess.Popen(command_line, stdin=subprocess.PIPE, text=True) for _ in range(5)]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait(120) for process in processes] == [0] * 5
    assert migrate.check(empty_dsn) == []


def test_five_threads_at_once_on_an_empty_database(empty_dsn: str) -> None:
    with ThreadPoolExecutor(5) as threads:
        for done in [threads.submit(migrate.upgrade, empty_dsn) for _ in range(5)]:
            done.result()
    assert migrate.check(empty_dsn) == []


async def test_from_within_an_event_loop(empty_dsn: str) -> None:
    await asyncio.to_thread(migrate.ensure, empty_dsn, auto_migrate=True)
    migrate.ensure(empty_dsn)


# ---------------------------------------------------------------- offline


def test_the_script_makes_the_same_on_an_empty_database(dsn: str, empty_dsn: str) -> None:
    run(empty_dsn, migrate.sql())
    assert relations(empty_dsn, bodies=True) == relations(dsn, bodies=True)
    assert migrate.check(empty_dsn) == []
    assert run(empty_dsn, "show search_path") == [('"$user", public',)]


def test_the_script_for_another_schema(empty_dsn: str) -> None:
    run(empty_dsn, migrate.sql("other"))
    assert migrate.check(empty_dsn, "other") == []


# ---------------------------------------------------------------- too old, too new, not there


def test_a_database_without_the_schema(empty_dsn: str) -> None:
    assert migrate.check(empty_dsn)[0] == "revision 0001"
    with pytest.raises(
        SchemaMismatch, match=r'no tables of durable in its schema "durable".*Run `durable migrate`'
    ) as e:
        migrate.ensure(empty_dsn, source="DURABLE_DATABASE_URL")
    assert "from DURABLE_DATABASE_URL" in str(e.value)
    assert (e.value.found, e.value.needed) == (None, migrate.HEAD)
    assert run(empty_dsn, "select to_regnamespace('durable')") == [(None,)]


def test_auto_migrate(empty_dsn: str) -> None:
    migrate.ensure(empty_dsn, auto_migrate=True)
    assert migrate.check(empty_dsn) == []


def test_a_schema_that_is_too_old(dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    newer = tmp_path / "migrations"
    (newer / "versions").mkdir(parents=True)
    for file in migrate.scripts().rglob("*.*"):
        if file.is_file() and "__pycache__" not in file.parts:
            target = newer / file.relative_to(migrate.scripts())
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (newer / "versions" / "9999_next.py").write_text(
        f"from alembic import op\nrevision = '9999'\ndown_revision = '{migrate.HEAD}'\n"
        "def upgrade():\n    op.execute('create table next_thing ()')\n"
    )
    monkeypatch.setattr(migrate, "scripts", lambda: newer)
    had = migrate.HEAD
    monkeypatch.setattr(migrate, "HEAD", "9999")
    assert migrate.check(dsn) == ["revision 9999"]
    with pytest.raises(SchemaMismatch, match=f"has revision {had}, this code needs revision 9999; .*`durable migrate`"):
        migrate.ensure(dsn)
    migrate.ensure(dsn, auto_migrate=True)
    migrate.ensure(dsn)
    assert "r next_thing" in relations(dsn)


def test_a_schema_that_is_too_new(dsn: str) -> None:
    run(dsn, "update durable.alembic_version set version_num = '9999'")
    for call in (migrate.ensure, migrate.check, migrate.upgrade):
        with pytest.raises(SchemaMismatch, match=r"has revision 9999 .* does not know.*Upgrade the package"):
            call(dsn)
    with pytest.raises(SchemaMismatch):
        migrate.ensure(dsn, auto_migrate=True)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match="cannot connect to the database") as error:
        migrate.ensure("postgresql://app:s3cret@127.0.0.1:1/shop", source="DATABASE_URL")
    assert "shop on 127.0.0.1 port 1 as app, from DATABASE_URL" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_a_database_that_is_not_there(base: Base) -> None:
    with pytest.raises(ConfigurationError, match=r'database "no_such" does not exist'):
        migrate.check(base.database("no_such"))


# ---------------------------------------------------------------- the queue's tables


def test_the_applied_version_is_recorded(dsn: str) -> None:
    assert run(dsn, "select version from durable.queue_schema") == [(queue_schema.installed(),)]


def test_a_fresh_installation_has_nothing_pending(dsn: str) -> None:
    with migrate.engine(dsn).begin() as connection:
        assert queue_schema.recorded(connection, "durable") == queue_schema.installed()
        assert queue_schema.upgrade(connection, "durable") == []


def test_an_older_queue_gets_the_files_of_the_package(
    dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "03.10.00_01_pre_known.sql").write_text("broken")
    (tmp_path / "98.01.00_01_pre_more.sql").write_text(
        "create table procrastinate_more (n int); -- 100 % :not_a_parameter\n"
        "create function procrastinate_fetch_job_v9() returns int language sql as 'select 1';"
    )
    (tmp_path / "98.01.00_50_post_more.sql").write_text("insert into procrastinate_more values (1);")
    monkeypatch.setattr(SchemaManager, "get_migrations_path", staticmethod(lambda: str(tmp_path)))
    monkeypatch.setattr(queue_schema, "installed", lambda: "98.1.0")
    assert migrate.check(dsn) == [
        "procrastinate's 98.01.00_01_pre_more.sql",
        "procrastinate's 98.01.00_50_post_more.sql",
    ]
    with pytest.raises(SchemaMismatch, match=r"procrastinate's 98\.01\.00_01"):
        migrate.ensure(dsn)
    migrate.ensure(dsn, auto_migrate=True)
    migrate.ensure(dsn)
    assert run(dsn, "select n from durable.procrastinate_more") == [(1,)]
    assert run(dsn, "select version from durable.queue_schema order by applied_at desc limit 1") == [("98.1.0",)]
    settings = run(dsn, "select proconfig from pg_proc where proname = 'procrastinate_fetch_job_v9'")
    assert "search_path=durable, pg_temp" in str(settings)
    assert "enable_seqscan=off" in str(settings)


def test_its_functions_work_on_any_search_path(dsn: str) -> None:
    settings = run(
        dsn,
        "select coalesce(proconfig, '{}') from pg_proc where proname like 'procrastinate\\_%' "
        "and pronamespace = 'durable'::regnamespace",
    )
    assert len(settings) > 10
    assert all("search_path=durable, pg_temp" in str(row) for row in settings)
    run(dsn, "insert into durable.procrastinate_jobs (queue_name, task_name) values ('q', 't')")
    assert run(dsn, "select type::text from durable.procrastinate_events") == [("deferred",)]


def test_the_fetch_has_its_plan_pinned(dsn: str) -> None:
    (settings,) = run(dsn, "select proconfig from pg_proc where proname = 'procrastinate_fetch_job_v2'")[0]
    assert isinstance(settings, list)
    assert {f"{name}=off" for name in queue_schema.NOT_FOR_FETCH} <= set(settings)


def test_a_template_serves_every_test(template: NoopExecutor, dsn: str) -> None:
    """The clone is a database of its own."""
    assert run(dsn, "select current_database()") != [(template.template_dbname,)]
    assert run(dsn, "select count(*) from durable.runs") == [(0,)]
