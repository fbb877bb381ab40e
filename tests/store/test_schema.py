"""What the migration built is what the code says: tables, statuses, moves, names."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from durable import migrate
from durable.core.state import EntryKind, MessageKind
from durable.queue import ADVANCE, COMPENSATE, RING
from durable.store.tables import metadata
from durable.values import MOVES, Status, WaitingFor

CATALOG = """
select 'column', c.relname, a.attname,
  format('%%s %%s %%s %%s', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
         pg_get_expr(d.adbin, d.adrelid))
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
where c.relnamespace = %(s)s::text::regnamespace and c.relkind = 'r'
union all
select 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid)
from pg_constraint k join pg_class c on c.oid = k.conrelid
where c.relnamespace = %(s)s::text::regnamespace
union all
select 'index', tablename, indexname, replace(indexdef, schemaname || '.', '')
from pg_indexes where schemaname = %(s)s::text
union all
select 'table', relname, relpersistence::text, coalesce(array['fillfactor=80'] <@ reloptions, false)::text
from pg_class where relnamespace = %(s)s::text::regnamespace and relkind = 'r'
"""


def catalog(connection: psycopg.Connection[Any], schema: str) -> set[tuple[Any, ...]]:
    rows = connection.execute(CATALOG.encode(), {"s": schema}).fetchall()
    return {row for row in rows if not row[1].startswith(("procrastinate_", "alembic_"))}


def test_migrated_equals_metadata(dsn: str) -> None:
    made = sa.MetaData(schema="made", naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(made, schema="made")._prefixes = table._prefixes
    engine = migrate.engine(dsn)
    with engine.begin() as connection:
        connection.execute(sa.text("create schema made"))
        made.create_all(connection, tables=[table for table in made.sorted_tables if table.name != "clock"])
    with psycopg.connect(dsn) as plain:
        assert {row for row in catalog(plain, "durable") if row[1] != "clock"} == catalog(plain, "made")


def test_alembic_has_nothing_to_do(dsn: str) -> None:
    from alembic import command

    with migrate._transaction(dsn, "durable", "the test") as connection:
        migrate.prepare(connection, "durable")
        command.check(migrate._config("durable", connection))


def test_downgrade_leaves_nothing(dsn: str) -> None:
    from alembic import command

    with migrate._transaction(dsn, "durable", "the test") as connection:
        migrate.prepare(connection, "durable")
        command.downgrade(migrate._config("durable", connection), "base")
    with psycopg.connect(dsn) as plain:
        left = plain.execute(
            "select relname from pg_class where relnamespace = 'durable'::regnamespace and relkind in ('r', 'S', 'v') "
            "union all select proname from pg_proc where pronamespace = 'durable'::regnamespace "
            "union all select typname from pg_type where typnamespace = 'durable'::regnamespace and typtype = 'e'"
        ).fetchall()
    assert left == [("alembic_version",)]


def test_the_script_makes_the_same(empty_dsn: str) -> None:
    script = migrate.sql("durable")
    with psycopg.connect(empty_dsn, autocommit=True) as plain:
        plain.execute(script.encode())
        by_script = catalog(plain, "durable")
        migrate.upgrade(empty_dsn, "other")
        assert by_script == catalog(plain, "other")
        assert plain.execute("select count(*) from durable.clock").fetchone() == (1,)


@pytest.fixture(scope="module")
def plain(module_dsn: str) -> Any:
    with psycopg.connect(module_dsn, autocommit=True) as connection:
        yield connection


def put(plain: psycopg.Connection[Any], status: Status) -> str:
    ended = status.ended
    waiting = "'sleep'" if status is Status.SUSPENDED else "null"
    ending = "'{}'" if status is Status.COMPENSATING else "null"
    row = plain.execute(
        f"insert into durable.runs (id, workflow, version, status, input, input_hash, queue, root_id, created_at, "
        f"finished_at, waiting_for, ending) values (gen_random_uuid(), 'w', '1', '{status}', '1', 'h', 'q', "
        f"gen_random_uuid(), now(), {'now()' if ended else 'null'}, {waiting}, {ending}) returning id".encode()
    ).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize("before", Status)
@pytest.mark.parametrize("after", Status)
def test_the_database_knows_the_moves(plain: psycopg.Connection[Any], before: Status, after: Status) -> None:
    run = put(plain, before)
    update = (
        "update durable.runs set status = %(status)s, finished_at = case when %(ended)s then now() end, waiting_for = "
        "case when %(status)s = 'suspended' then 'sleep' end, ending = case when %(status)s = 'compensating' then "
        "'{}'::jsonb end where id = %(id)s"
    )
    values = {"status": after.value, "ended": after.ended, "id": run}
    if before is after or after in MOVES[before]:
        plain.execute(update, values)
        return
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        plain.execute(update, values)
    assert caught.value.diag.constraint_name == "runs_legal_move"
    assert f"from {before} to {after}" in str(caught.value)


LISTS = [
    ("check_run", "runs_status_check", Status),
    ("check_run", "runs_waiting_for_check", WaitingFor),
    ("check_entry", "journal_kind_check", EntryKind),
]


@pytest.mark.parametrize(("function", "check", "values"), LISTS)
def test_the_checks_know_the_values(plain: psycopg.Connection[Any], function: str, check: str, values: Any) -> None:
    body = plain.execute("select prosrc from pg_proc where oid = %s::regproc", [f"durable.{function}"]).fetchone()
    assert body is not None
    listed = body[0].split(f"then '{check}'")[0].rsplit("not in (", 1)[1]
    assert set(re.findall(r"'(\w+)'", listed)) == {value.value for value in values}


def test_the_inbox_knows_its_kinds(plain: psycopg.Connection[Any]) -> None:
    query = "select pg_get_constraintdef(oid) from pg_constraint where conname = 'inbox_kind_check'"
    definition = plain.execute(query).fetchone()
    assert definition is not None
    assert set(re.findall(r"'(\w+)'", definition[0])) == {kind.value for kind in MessageKind}


BROKEN_RUNS = [
    ("status = 'odd'", "status"),
    ("waiting_for = 'odd'", "waiting_for"),
    ("finished_at = now()", "finished"),
    ("status = 'completed'", "finished"),
    ("status = 'suspended'", "suspended_says_why"),
    ("status = 'completed', finished_at = now(), wake_at = now()", "ended_waits_not"),
    ("status = 'completed', finished_at = now(), waiting_for = 'sleep'", "ended_waits_not"),
    ("claim_worker = 1", "claim"),
    ("claim_token = gen_random_uuid()", "claim"),
    (
        "status = 'suspended', waiting_for = 'sleep', claim_worker = 1, claim_token = gen_random_uuid()",
        "claimed_is_active",
    ),
    ("status = 'compensating'", "ending"),
    ("tags = '[]'", "tags"),
]


@pytest.mark.parametrize(("change", "check"), BROKEN_RUNS)
def test_a_run_that_breaks_an_invariant_is_refused(plain: psycopg.Connection[Any], change: str, check: str) -> None:
    run = put(plain, Status.RUNNING)
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        plain.execute(f"update durable.runs set {change} where id = %s".encode(), [run])
    assert caught.value.diag.constraint_name == f"runs_{check}_check"


def test_a_new_run_is_checked_as_well(plain: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        plain.execute(
            "insert into durable.runs (id, workflow, version, input, input_hash, queue, root_id, created_at, tags) "
            "values (gen_random_uuid(), 'w', '1', '1', 'h', 'q', gen_random_uuid(), now(), '1')"
        )
    assert caught.value.diag.constraint_name == "runs_tags_check"


@pytest.mark.parametrize(
    ("kind", "status", "check"),
    [("odd", "completed", "kind"), ("step", "odd", "status"), ("step", "failed", "failed_says_why")],
)
def test_an_entry_that_breaks_an_invariant_is_refused(
    plain: psycopg.Connection[Any], kind: str, status: str, check: str
) -> None:
    put_entry = (
        "insert into durable.journal (run_id, step_id, seq, kind, status, finished_at) "
        "values (gen_random_uuid(), 'a', 1, %s, %s, now())"
    )
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        plain.execute(put_entry, [kind, status])
    assert caught.value.diag.constraint_name == f"journal_{check}_check"


def test_the_tasks_are_what_the_queue_calls_them(plain: psycopg.Connection[Any]) -> None:
    for task, revision in ((ADVANCE, 1), (COMPENSATE, 1), (RING, None)):
        plain.execute("select durable.enqueue(%s, gen_random_uuid(), %s, 'q', 0)", [task, revision])
    for task, revision in (("durable.other", 1), (ADVANCE, None), (RING, 1)):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            plain.execute("select durable.enqueue(%s, gen_random_uuid(), %s, 'q', 0)", [task, revision])


def test_the_clock_has_one_row_and_moves_the_engines_time(plain: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        plain.execute("insert into durable.clock default values")
    with plain.transaction(force_rollback=True):
        plain.execute("update durable.clock set ahead = '3 days'")
        row = plain.execute("select durable.engine_now() - clock_timestamp() > '71 hours'").fetchone()
        assert row == (True,)
    with plain.transaction():
        row = plain.execute("select durable.engine_now() < durable.engine_now()").fetchone()  # moves in a transaction
        assert row == (True,)
