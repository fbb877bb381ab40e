"""The tables, as SQLAlchemy metadata: what the migrations must have built, and the source of names and checks.

Payloads (input, result, body, error) are ``json``, not ``jsonb``: the text comes back exactly as it was written, also
floats, key order and large exponents. Everything that the engine itself looks into is ``jsonb`` or a column.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSON, JSONB

from durable.core.state import MessageKind
from durable.values import Status

DEFAULT_SCHEMA: Final = "durable"

metadata = sa.MetaData(
    schema=DEFAULT_SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    },
)


def _one_of(column: str, values: type[MessageKind]) -> str:
    return f"{column} in ({', '.join(repr(v.value) for v in values)})"


def _time(name: str, *, nullable: bool = True) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


ENDED_SQL: Final = "status in ('completed', 'failed', 'canceled')"

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("workflow", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, server_default=Status.PENDING.value),
    sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("current_step", sa.Integer, nullable=False, server_default="0"),
    sa.Column("input", JSON, nullable=False),
    sa.Column("input_hash", sa.Text, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("key", sa.Text),
    sa.Column("tags", JSONB, nullable=False, server_default="{}"),
    sa.Column("parent_id", sa.Uuid),
    sa.Column("parent_step", sa.Text),
    sa.Column("root_id", sa.Uuid, nullable=False),
    sa.Column("frame", JSONB, nullable=False, server_default="{}"),
    sa.Column("waiting_for", sa.Text),
    sa.Column("waiting_name", sa.Text),
    _time("wake_at"),
    _time("deadline"),
    sa.Column("claim_worker", sa.Integer),
    sa.Column("claim_token", sa.Uuid),
    sa.Column("pausing", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("ending", JSONB),
    sa.Column("undo_cursor", sa.BigInteger),
    sa.Column("retries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cleanup", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("seed", sa.Uuid),  # a fork draws the random numbers of the run that it was forked from
    sa.Column("forked_from", sa.Uuid),
    sa.Column("chain", sa.Uuid),  # the first run of a chain of continue_as_new; null in that itself
    sa.Column("predecessor", sa.Uuid),
    sa.Column("successor", sa.Uuid),
    sa.Column("error", JSON),
    sa.Column("reason", sa.Text),
    _time("created_at", nullable=False),
    _time("started_at"),
    _time("finished_at"),
    # What must hold of a row says the trigger function check_run, which is asked only when a column that it speaks of
    # is written: constraints would be prepared and evaluated at each step.
    # HOT updates: none of these indexes holds a column that every step changes (revision, current_step, frame).
    sa.Index(  # of a chain, its head has the key. The key stands first: it is looked up alone too
        "runs_workflow_key_key",
        "key",
        "workflow",
        unique=True,
        postgresql_where=sa.text("successor is null and key is not null"),
    ),
    sa.Index("runs_created_at_id_idx", sa.text("created_at desc"), sa.text("id desc")),
    sa.Index("runs_status_created_at_idx", "status", sa.text("created_at desc"), sa.text("id desc")),
    sa.Index("runs_workflow_created_at_idx", "workflow", sa.text("created_at desc"), sa.text("id desc")),
    sa.Index(
        "runs_parent_id_idx",
        "parent_id",
        sa.text("created_at desc"),
        sa.text("id desc"),
        postgresql_where=sa.text("parent_id is not null"),
    ),
    sa.Index("runs_root_id_idx", "root_id", postgresql_where=sa.text("root_id <> id")),
    sa.Index("runs_tags_idx", "tags", postgresql_using="gin", postgresql_where=sa.text("tags <> '{}'")),
    sa.Index("runs_wake_at_idx", "wake_at", postgresql_where=sa.text("wake_at is not null")),
    sa.Index("runs_claim_worker_idx", "claim_worker", postgresql_where=sa.text("claim_worker is not null")),
    sa.Index(
        "runs_waiting_idx",
        "waiting_for",
        sa.text("created_at desc"),
        sa.text("id desc"),
        postgresql_where=sa.text("waiting_for is not null"),
    ),
    sa.Index(
        "runs_runnable_idx",
        "id",
        postgresql_where=sa.text("status in ('pending', 'running', 'compensating') and waiting_for is null"),
    ),
    sa.Index("runs_definition_idx", "waiting_name", postgresql_where=sa.text("waiting_for = 'definition'")),
    sa.Index("runs_started_at_idx", "started_at", postgresql_where=sa.text("started_at is not null")),
    sa.Index("runs_finished_at_idx", "finished_at", postgresql_where=sa.text("finished_at is not null")),
    postgresql_with={"fillfactor": "80"},
)

journal = sa.Table(
    "journal",
    metadata,
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("step_id", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),  # in the order of writing; it follows from the run's revision
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("result", JSON),
    sa.Column("error", JSON),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="1"),
    sa.Column("parent", sa.Text),
    sa.Column("extra", JSONB),
    _time("started_at"),
    _time("finished_at", nullable=False),  # what must hold of a row: check_entry
)

inbox = sa.Table(
    "inbox",
    metadata,
    # No foreign key to runs: its key-share lock would make a signal wait for the executing step.
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("message_id", sa.Text),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text),
    sa.Column("body", JSON),
    sa.Column("state", sa.Text, nullable=False, server_default="new"),
    sa.Column("taken_by", sa.Text),
    sa.Column("wants_reply", sa.Boolean, nullable=False, server_default=sa.false()),  # `request` waits for it
    sa.Column("reply", JSON),
    _time("sent_at", nullable=False),
    _time("taken_at"),
    _time("replied_at"),
    sa.UniqueConstraint("run_id", "message_id"),
    sa.CheckConstraint(_one_of("kind", MessageKind), name="kind"),
    sa.CheckConstraint("state in ('new', 'seen', 'taken')", name="state"),
    sa.Index("inbox_new_idx", "sent_at", postgresql_where=sa.text("state = 'new'")),
    sa.Index("inbox_untaken_idx", "run_id", "seq", postgresql_where=sa.text("state <> 'taken'")),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("step_id", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("error", JSON),
    _time("started_at"),
    _time("finished_at", nullable=False),
    _time("next_attempt_at"),
    sa.CheckConstraint("kind in ('failed', 'interrupted')", name="kind"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("step_id", sa.Text),
    sa.Column("data", JSON),
    _time("at", nullable=False),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    # What hooks are to be told, written with what it tells of, and deleted when a hook has taken it.
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("seq", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", JSON, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("error", JSON),  # of the last attempt
    _time("due", nullable=False),
    sa.CheckConstraint("kind in ('status', 'error')", name="kind"),
    sa.Index("deliveries_queue_due_idx", "queue", "due"),
)

workers = sa.Table(
    "workers",
    metadata,
    # Alive exactly while the session advisory lock (hashtext(schema), id) is held: see engine/liveness.py.
    sa.Column("id", sa.Integer, sa.Identity(always=True), primary_key=True),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("queue_worker_id", sa.BigInteger),  # the id under which its jobs are marked `doing`
    _time("started_at", nullable=False),
    sa.Index("workers_queue_worker_id_idx", "queue_worker_id"),
)

waiters = sa.Table(
    "waiters",
    metadata,
    # Who wants to be told of a run's end. Lost with a crash of the server, which a waiter's own poll covers.
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("waiter", sa.Uuid, primary_key=True),
    _time("registered_at", nullable=False),
    sa.Index("waiters_registered_at_idx", "registered_at"),
    prefixes=["UNLOGGED"],
)

progress = sa.Table(
    "progress",
    metadata,
    # What executing steps last said of themselves: beside the run, whose row they may hold. Not worth a log.
    sa.Column("run_id", sa.Uuid, primary_key=True),
    sa.Column("step_id", sa.Text, primary_key=True),
    sa.Column("body", JSON, nullable=False),
    _time("at", nullable=False),
    prefixes=["UNLOGGED"],
)

clock = sa.Table(
    "clock",
    metadata,
    # One row: how far tests have moved the engine's time ahead of the server's.
    sa.Column("only", sa.Boolean, primary_key=True, server_default=sa.true()),
    sa.Column("ahead", sa.Interval, nullable=False, server_default="0"),
    sa.CheckConstraint('"only"', name="only"),
)

queue_schema = sa.Table(
    "queue_schema",
    metadata,
    # Which versions of procrastinate's own schema were applied.
    sa.Column("version", sa.Text, primary_key=True),
    _time("applied_at", nullable=False),
)
