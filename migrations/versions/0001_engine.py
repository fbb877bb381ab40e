"""The engine: its tables, its functions, and procrastinate's queue beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import op

from durable import queue_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# No schema in any name: the search_path is the configured one. Why a column or an index is there says store/tables.py.
TABLES: Final = """
create table runs (
  id uuid not null,
  workflow text not null,
  version text not null,
  status text default 'pending' not null,
  revision bigint default '0' not null,
  current_step integer default 0 not null,
  input json not null,
  input_hash text not null,
  queue text not null,
  priority integer default 0 not null,
  key text,
  tags jsonb default '{}' not null,
  parent_id uuid,
  parent_step text,
  root_id uuid not null,
  frame jsonb default '{}' not null,
  waiting_for text,
  waiting_name text,
  wake_at timestamptz,
  deadline timestamptz,
  claim_worker integer,
  claim_token uuid,
  pausing boolean default false not null,
  ending jsonb,
  undo_cursor bigint,
  retries integer default 0 not null,
  cleanup boolean default false not null,
  seed uuid,
  forked_from uuid,
  chain uuid,
  predecessor uuid,
  successor uuid,
  error json,
  reason text,
  created_at timestamptz not null,
  started_at timestamptz,
  finished_at timestamptz,
  constraint runs_pkey primary key (id)
) with (fillfactor = 80);

create unique index runs_workflow_key_key on runs (key, workflow) where successor is null and key is not null;
create index runs_created_at_id_idx on runs (created_at desc, id desc);
create index runs_status_created_at_idx on runs (status, created_at desc, id desc);
create index runs_workflow_created_at_idx on runs (workflow, created_at desc, id desc);
create index runs_parent_id_idx on runs (parent_id, created_at desc, id desc) where parent_id is not null;
create index runs_root_id_idx on runs (root_id) where root_id <> id;
create index runs_tags_idx on runs using gin (tags) where tags <> '{}';
create index runs_wake_at_idx on runs (wake_at) where wake_at is not null;
create index runs_claim_worker_idx on runs (claim_worker) where claim_worker is not null;
create index runs_waiting_idx on runs (waiting_for, created_at desc, id desc) where waiting_for is not null;
create index runs_runnable_idx on runs (id)
  where status in ('pending', 'running', 'compensating') and waiting_for is null;
create index runs_definition_idx on runs (waiting_name) where waiting_for = 'definition';
create index runs_started_at_idx on runs (started_at) where started_at is not null;
create index runs_finished_at_idx on runs (finished_at) where finished_at is not null;

create table journal (
  run_id uuid not null,
  step_id text not null,
  seq bigint not null,
  kind text not null,
  status text not null,
  result json,
  error json,
  attempt integer default 1 not null,
  parent text,
  extra jsonb,
  started_at timestamptz,
  finished_at timestamptz not null,
  constraint journal_pkey primary key (run_id, step_id)
);

create table inbox (
  run_id uuid not null,
  seq bigint generated always as identity,
  message_id text,
  kind text not null,
  name text,
  body json,
  state text default 'new' not null,
  taken_by text,
  wants_reply boolean default false not null,
  reply json,
  sent_at timestamptz not null,
  taken_at timestamptz,
  replied_at timestamptz,
  constraint inbox_pkey primary key (run_id, seq),
  constraint inbox_run_id_message_id_key unique (run_id, message_id),
  constraint inbox_kind_check check (kind in ('signal', 'cancel', 'pause', 'resume', 'rollback', 'child')),
  constraint inbox_state_check check (state in ('new', 'seen', 'taken'))
);

create index inbox_new_idx on inbox (sent_at) where state = 'new';
create index inbox_untaken_idx on inbox (run_id, seq) where state <> 'taken';

create table attempts (
  run_id uuid not null,
  seq bigint generated always as identity,
  step_id text not null,
  attempt integer not null,
  kind text not null,
  error json,
  started_at timestamptz,
  finished_at timestamptz not null,
  next_attempt_at timestamptz,
  constraint attempts_pkey primary key (run_id, seq),
  constraint attempts_kind_check check (kind in ('failed', 'interrupted'))
);

create table events (
  run_id uuid not null,
  seq bigint generated always as identity,
  kind text not null,
  step_id text,
  data json,
  at timestamptz not null,
  constraint events_pkey primary key (run_id, seq)
);

create table deliveries (
  run_id uuid not null,
  seq bigint generated always as identity,
  queue text not null,
  kind text not null,
  body json not null,
  attempts integer default 0 not null,
  error json,
  due timestamptz not null,
  constraint deliveries_pkey primary key (run_id, seq),
  constraint deliveries_kind_check check (kind in ('status', 'error'))
);

create index deliveries_queue_due_idx on deliveries (queue, due);

create table workers (
  id integer generated always as identity,
  queue text not null,
  host text not null,
  pid integer not null,
  queue_worker_id bigint,
  started_at timestamptz not null,
  constraint workers_pkey primary key (id)
);

create index workers_queue_worker_id_idx on workers (queue_worker_id);

create unlogged table waiters (
  run_id uuid not null,
  waiter uuid not null,
  registered_at timestamptz not null,
  constraint waiters_pkey primary key (run_id, waiter)
);

create index waiters_registered_at_idx on waiters (registered_at);

create unlogged table progress (
  run_id uuid not null,
  step_id text not null,
  body json not null,
  at timestamptz not null,
  constraint progress_pkey primary key (run_id, step_id)
);

create table clock (
  "only" boolean default true not null,
  ahead interval default '0' not null,
  constraint clock_pkey primary key ("only"),
  constraint clock_only_check check ("only")
);

insert into clock default values;

create table queue_schema (
  version text not null,
  applied_at timestamptz not null,
  constraint queue_schema_pkey primary key (version)
);
"""

# Rows of these are written and die all the time: vacuumed by how much is dead, not by which part of the table that is.
VACUUM: Final = """
alter table runs set (
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0.05
);
alter table inbox set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
alter table procrastinate_jobs set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0
);
alter table procrastinate_events set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0
);
"""

OURS: Final = (
    "runs",
    "journal",
    "inbox",
    "attempts",
    "events",
    "deliveries",
    "workers",
    "waiters",
    "progress",
    "clock",
    "queue_schema",
)

# Whatever version of procrastinate's schema it is: all that bears its name.
DROP_QUEUE: Final = """
do $drop$
declare
  o record;
begin
  for o in
    select format('table if exists %I', c.relname) as what
    from pg_class c
    where c.relnamespace = current_schema()::regnamespace and c.relkind = 'r' and c.relname like 'procrastinate\\_%'
    union all
    select format('routine if exists %s', p.oid::regprocedure)
    from pg_proc p
    where p.pronamespace = current_schema()::regnamespace and p.proname like 'procrastinate\\_%'
    union all
    select format('type if exists %I', t.typname)
    from pg_type t
    left join pg_class c on c.oid = t.typrelid
    where t.typnamespace = current_schema()::regnamespace and t.typname like 'procrastinate\\_%'
      and (t.typtype = 'e' or (t.typtype = 'c' and c.relkind = 'c'))
  loop
    execute format('drop %s cascade', o.what);
  end loop;
end $drop$
"""

FUNCTIONS: Final = (
  "engine_now", "enqueue", "wake_workers", "chain_end", "sent_before", "start_run", "start_runs", "post_message",
  "send_message", "forward_messages", "resume_wait", "step_root", "fork_run", "refuse", "check_run",
  "check_entry",
)  # fmt: skip


def upgrade() -> None:
    schema: str = op.get_context().version_table_schema or "durable"
    functions = Path(__file__).resolve().parents[1] / "functions.sql"
    op.execute(TABLES)
    queue_schema.install(op.execute, schema)
    op.execute(functions.read_text(encoding="utf-8").replace("{schema}", schema))
    op.execute(VACUUM)


def downgrade() -> None:
    """Everything goes, also all runs and jobs."""
    op.execute(f"drop table {', '.join(OURS)} cascade")
    op.execute(f"drop routine {', '.join(FUNCTIONS)}")
    op.execute(DROP_QUEUE)
