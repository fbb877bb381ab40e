"""No page, sweep or fetch looks at all runs: told by EXPLAIN ANALYZE in a database with many of them.

Two things are held for every statement: no sequential scan of ``runs``, and no index walked in its stead (what a
statement looks at is bounded by what it is after, not by how many runs there are).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest

from durable.store.db import Store
from durable.store.read import page_query
from durable.store.read import statements as read_statements
from durable.store.sweep import FIRST
from durable.store.sweep import statements as sweep_statements

MANY: Final = 50_000
PARENT: Final = uuid.UUID(int=9_000)
NOW: Final = datetime.now(UTC)

# Of 50,000 runs nearly all have ended or wait; every 25th can run, 40 are claimed, 50 are due, 20 want a definition.
FILL: Final = f"""
insert into durable.runs (
  id, workflow, version, status, input, input_hash, queue, key, tags, parent_id, root_id, waiting_for, waiting_name,
  wake_at, claim_worker, claim_token, created_at, started_at, finished_at
)
select
  lpad(to_hex(i), 32, '0')::uuid, 'flow-' || i % 20, (i % 3)::text, status, '{{}}', '', 'shop',
  case when i % 2 = 0 then 'key-' || i end,
  case when i % 2 = 1 then jsonb_build_object('tenant', i % 500, 'region', i % 4) else '{{}}' end,
  case when i % 10 = 5 then lpad(to_hex(i / 100 * 100), 32, '0')::uuid end,
  case when i % 10 = 5 then lpad(to_hex(i / 100 * 100), 32, '0')::uuid else lpad(to_hex(i), 32, '0')::uuid end,
  waiting_for, case when waiting_for = 'definition' then 'gone@' || i % 2 end,
  case when waiting_for in ('sleep', 'retry') then now() + (i - 50000 / 1000) * interval '1 s' end,
  case when claimed then i end, case when claimed then gen_random_uuid() end,
  now() - ({MANY} - i) * interval '1 minute',
  case when status <> 'pending' then now() - ({MANY} - i) * interval '1 minute' end,
  case when status in ('completed', 'failed', 'canceled') then now() - ({MANY} - i) * interval '1 minute' end
from (
  select i, i % 25 = 2 and i % 1250 = 2 as claimed,
    case when i % 25 = 0 then 'pending' when i % 25 = 2 then 'running' when i % 25 in (3, 4, 8, 9) then 'suspended'
         when i % 250 = 7 then 'failed' when i % 250 = 11 then 'canceled' else 'completed' end as status,
    case when i % 2500 = 3 then 'definition' when i % 25 = 3 then 'signal' when i % 25 = 4 then 'sleep'
         when i % 25 = 8 then 'retry' when i % 25 = 9 then 'child' end as waiting_for
  from generate_series(1, {MANY}) i
) made;
update durable.runs set wake_at = now() - interval '1 s'
where waiting_for = 'sleep' and id < lpad(to_hex(1250), 32, '0')::uuid;
insert into durable.inbox (run_id, kind, name, state, sent_at)
select id, 'signal', 'go', 'taken', now() from durable.runs where workflow in ('flow-1', 'flow-2');
insert into durable.inbox (run_id, kind, name, state, sent_at)
select id, 'signal', 'go', 'new', now() - interval '1 minute' from durable.runs where waiting_for = 'signal' limit 30;
insert into durable.workers (queue, host, pid, started_at) select 'shop', 'here', i, now() from generate_series(1, 8) i;
select durable.enqueue('durable.advance', id, revision, queue, 0)
from durable.runs where status in ('pending', 'running') and claim_token is null;
select durable.enqueue('durable.advance', gen_random_uuid(), 7, 'shop', 0) from generate_series(1, 20000);
update durable.procrastinate_jobs set status = 'doing' where id % 200 = 0;
analyze
"""


@pytest.fixture(scope="module")
def filled(module_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(module_dsn, autocommit=True, prepare_threshold=None) as connection:
        connection.execute(FILL)
        yield connection


def explain(connection: psycopg.Connection[Any], query: bytes, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of the plan that was run; what it did is rolled back."""
    with connection.transaction(force_rollback=True):
        found = connection.execute(b"explain (analyze, format json) " + query, values).fetchone()
    assert found is not None
    nodes, todo = [], [found[0][0]["Plan"]]
    while todo:
        node = todo.pop()
        todo += node.get("Plans", [])
        nodes.append(node)
    return nodes


def looked_at(nodes: list[dict[str, Any]], table: str = "runs") -> float:
    """How many rows of the table the statement read, whether it took them or not."""
    total: float = 0
    of_table = [node for node in nodes if node.get("Relation Name") == table and "Scan" in node["Node Type"]]
    for node in of_table:
        assert node["Node Type"] != "Seq Scan", json.dumps(node, indent=1)
    removed = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
    for node in of_table:
        total += node["Actual Loops"] * (node["Actual Rows"] + sum(node.get(name, 0) for name in removed))
    return total


LAST: Final = uuid.UUID(int=25_000)
PAGES: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "newest": ({}, 120),
    "status": ({"status": "completed"}, 120),
    "rare status": ({"status": "canceled"}, 120),
    "no run in that status": ({"status": "compensating"}, 120),
    "statuses": ({"status": ["pending", "failed", "canceled"]}, 250),
    "retrying": ({"status": "retrying"}, 120),
    "sleeping": ({"status": "sleeping"}, 120),
    "waiting for a signal": ({"status": "waiting_for_signal"}, 120),
    "waiting for a child": ({"status": "waiting_for_child"}, 120),
    "waiting for a definition": ({"status": "waiting_for_definition"}, 120),
    "derived and not": ({"status": ["retrying", "sleeping", "failed"]}, 250),
    "workflow": ({"workflow": "flow-3"}, 120),
    "no such workflow": ({"workflow": "none"}, 120),
    "workflow and version": ({"workflow": "flow-3", "version": "1"}, 400),
    "workflow and status": ({"workflow": "flow-3", "status": "suspended"}, 2_500),
    "workflow and derived status": ({"workflow": "flow-3", "status": "retrying"}, 2_500),
    "workflow, version, status": ({"workflow": "flow-3", "version": "1", "status": "completed"}, 2_500),
    "tag": ({"tags": {"tenant": 17}}, 500),
    "tags": ({"tags": {"tenant": 17, "region": 1}}, 500),
    "no such tag": ({"tags": {"tenant": "none"}}, 120),
    "frequent tag": ({"tags": {"region": 1}}, 500),
    "tag and status": ({"tags": {"tenant": 17}, "status": "completed"}, 500),
    "tag and workflow": ({"tags": {"tenant": 17}, "workflow": "flow-17"}, 500),
    "parent": ({"parent": PARENT}, 120),
    "parent and status": ({"parent": PARENT, "status": "completed"}, 120),
    "key": ({"key": "key-4002"}, 120),
    "no such key": ({"key": "none"}, 120),
    "workflow and key": ({"workflow": "flow-2", "key": "key-4002"}, 120),
    "started after": ({"started_after": NOW - timedelta(hours=1)}, 200),
    "started after, long ago": ({"started_after": NOW - timedelta(days=30)}, 200),
    "started after the last": ({"started_after": NOW + timedelta(hours=1)}, 120),
    "started after, status": ({"started_after": NOW - timedelta(hours=1), "status": "completed"}, 200),
    "started after, workflow": ({"started_after": NOW - timedelta(hours=5), "workflow": "flow-3"}, 500),
}


@pytest.mark.parametrize("again", [False, True], ids=["first page", "later page"])
@pytest.mark.parametrize("name", PAGES)
def test_no_page_looks_at_all_runs(filled: psycopg.Connection[Any], name: str, again: bool) -> None:
    filters, most = PAGES[name]
    query, values = page_query("durable", **filters, limit=50)
    if again:
        row = filled.execute(query, values).fetchone()
        columns = [column.name for column in filled.execute(query, values).description or ()]
        if row is None:
            return  # no run, no later page
        found = dict(zip(columns, row, strict=True))
        filters = filters | {"after": (found["created_at"], found["id"])}
        query, values = page_query("durable", **filters, limit=50)
    assert looked_at(explain(filled, query, values)) <= most


LOOK: Final[dict[str, Any]] = {
    "worker": 1,
    "queue": "shop",
    "queue_worker": 1,
    "executing": [LAST],
    "jobs": [],
    "names": ["gone@1", "gone@"],
    "kinds": ["status"],
    "after": FIRST,
    "limit": 100,
}
SWEEPS: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "look": (LOOK, 450),
    "claims_of": ({"ids": [1, 2]}, 100),
    "forget": ({"ids": [1, 2]}, 100),
    "enqueue_due": ({"limit": 20}, 120),
    "next_wake": ({"since": NOW}, 5),
    "unread": ({"limit": 20}, 100),
    "settle": ({"limit": 20}, 100),
    "ring": ({"id": LAST}, 5),
    "orphans": ({"after": FIRST, "limit": 100}, 300),
    "adopt": ({"id": LAST, "revision": 0}, 5),
    "known": ({"names": ["gone@1", "gone@"], "limit": 10}, 30),
    "enqueue_known": ({"names": ["gone@1", "gone@"], "limit": 10}, 30),
    "purge": ({"older_than": timedelta(days=20), "limit": 10}, 1_000),
}


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", SWEEPS)
def test_no_sweep_looks_at_all_runs(filled: psycopg.Connection[Any], name: str, plans: str) -> None:
    values, most = SWEEPS[name]
    filled.execute(f"set plan_cache_mode = {plans}".encode())
    query: bytes = getattr(sweep_statements("durable"), name)
    nodes = explain(filled, query, values | {"schema": "durable"})
    assert looked_at(nodes) <= most
    looked_at(nodes, "inbox")
    assert looked_at(nodes, "procrastinate_jobs") <= most


# 100,000 runs: half have ended, the others wait for all that there is to wait for, but for what could be done now.
PARKED: Final = """
insert into durable.runs (
  id, workflow, version, status, input, input_hash, queue, root_id, waiting_for, waiting_name, wake_at, created_at,
  started_at, finished_at
)
select
  id, 'flow', '1', case when waiting_for is null then 'completed' else 'suspended' end, '{}', '', 'shop', id,
  waiting_for, case waiting_for when 'definition' then 'unknown@1' when 'signal' then 'go' end,
  case when waiting_for in ('sleep', 'retry', 'signal') then now() + i * interval '1 minute' end, now(), now(),
  case when waiting_for is null then now() end
from (
  select gen_random_uuid() as id, i,
    case when i % 2 = 0 then (array['signal', 'sleep', 'retry', 'child', 'definition'])[i / 2 % 5 + 1] end
    as waiting_for
  from generate_series(1, 100000) i
) made;
insert into durable.inbox (run_id, kind, name, state, sent_at)
select id, 'signal', 'go', case when status = 'completed' then 'taken' else 'seen' end, now() from durable.runs;
"""


def test_a_look_reads_next_to_nothing_of_what_is_parked(dsn: str) -> None:
    look = sweep_statements("durable").look
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
        connection.execute(PARKED)
        for told in ("nothing is known of the tables", "analyzed"):
            nodes = explain(connection, look, LOOK | {"schema": "durable"})
            assert looked_at(nodes) <= 2, told
            assert looked_at(nodes, "inbox") <= 2, told
            row = connection.execute(look, LOOK | {"schema": "durable"}).fetchone()
            assert row is not None
            assert not any(row[2:]), f"it found something to do, {told}: {row}"
            connection.execute("analyze")


def test_a_look_does_not_read_the_backlog_of_another_queue(dsn: str) -> None:
    look = sweep_statements("durable").look
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
        for queue in ("another", "shop"):
            connection.execute(
                "select durable.enqueue('durable.advance', gen_random_uuid(), 7, %s, 0) from generate_series(1, 10000)",
                [queue],
            )
            for _ in ("nothing is known of the tables", "analyzed"):
                nodes = explain(connection, look, LOOK | {"schema": "durable"})
                assert looked_at(nodes, "procrastinate_jobs") <= 2
                connection.execute("analyze")


READS: Final[dict[str, tuple[dict[str, Any], int]]] = {
    "run": ({"id": LAST}, 1),
    "status": ({"id": LAST}, 1),
    "outcome": ({"id": LAST}, 1),
    "answer": ({"id": LAST, "message": "m-1"}, 3),
    "revision": ({"id": LAST}, 1),
    "children": ({"ids": [PARENT], "limit": 100}, 20),
}


@pytest.mark.parametrize("name", READS)
def test_no_read_of_one_run_looks_at_others(filled: psycopg.Connection[Any], name: str) -> None:
    values, most = READS[name]
    query: bytes = getattr(read_statements("durable"), name)
    nodes = explain(filled, query, values)
    assert looked_at(nodes) <= most
    assert looked_at(nodes, "inbox") <= most


def test_the_backlog_is_not_read_to_find_the_jobs_of_the_dead(filled: psycopg.Connection[Any]) -> None:
    sql = sweep_statements("durable")
    for query, values in (
        (sql.doing_of, {"ids": [1]}),
        (sql.own_doing, {"worker": 1}),
        (sql.orphans, SWEEPS["orphans"][0]),
    ):
        nodes = explain(filled, query, values | {"schema": "durable"})
        assert looked_at(nodes, "procrastinate_jobs") <= 300


def test_the_fetch_reads_no_runs_and_not_the_backlog(filled: psycopg.Connection[Any], module_dsn: str) -> None:
    definition = filled.execute("select prosrc from pg_proc where proname = 'procrastinate_fetch_job_v2'").fetchone()
    assert definition is not None
    assert "runs" not in definition[0]
    settings = filled.execute("select proconfig from pg_proc where proname = 'procrastinate_fetch_job_v2'").fetchone()
    assert settings is not None
    assert "enable_seqscan=off" in settings[0]
    assert Store(module_dsn).schema == "durable"
