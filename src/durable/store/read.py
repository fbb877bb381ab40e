"""What the operations show: status, list, history, result. Plain reads, which never lock and never wait for a lock.

A run's picture is put together from several tables, so it is read at one moment (REPEATABLE READ), unless the caller
hands in a connection that is in a transaction of its own. A page of a list is one statement, and each of its filters
walks an index; tests/store/test_plans.py holds them to it.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, TypeAlias

from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from durable.core.state import Begun, Entry, EntryKind, Run
from durable.errors import ConfigurationError, RunNotFound
from durable.snapshots import DERIVED, ErrorInfo, HistoryEvent, Page, RunSnapshot, StepSnapshot
from durable.store import codec, sweep
from durable.store.codec import Payloads
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Flush
from durable.store.history import Sources, compose, error_info, parent_of, with_beginnings
from durable.store.query import Statements, statement
from durable.store.runs import abandon
from durable.values import JsonText, Status, WaitingFor

Totals: TypeAlias = Callable[[str, str], int | None]

NODES: Final = frozenset({
    "step", "parallel", "route", "loop", "sleep", "signal", "child",
    "block", "join", "race", "map", "receive", "checkpoint",
})  # fmt: skip
"""The kinds of entries that a run's results are made of."""
NOT_SHOWN: Final = frozenset({"reply", "rollback", "patch"})
"""The kinds that are no steps: the engine's own notes."""
STATUSES: Final = (*(status.value for status in Status), *DERIVED.values())
MOST: Final = 1_000

_RUN: Final = """
  r.id, r.workflow, r.version, r.status, r.current_step, r.created_at, r.waiting_for, r.waiting_name, r.wake_at, r.key,
  r.tags::text, r.priority, r.parent_id, r.parent_step, r.started_at, r.finished_at, r.deadline, r.input::text,
  r.error::text, r.reason, r.retries, r.revision, r.predecessor, r.successor, r.forked_from
"""


class ReadSql(Statements):
    run = statement(f"""
-- one run
select {_RUN}, r.frame::text, r.claim_token from {{schema}}.runs r where r.id = %(id)s
""")

    children = statement(f"""
-- a level of the tree
select {_RUN}, r.frame::text, r.claim_token from {{schema}}.runs r
where r.parent_id = any (%(ids)s) order by r.created_at, r.id limit %(limit)s
""")

    journal = statement("""
-- what runs have passed
select run_id, seq, step_id, kind, status, result::text, error::text, attempt, parent, extra::text,
  started_at, finished_at
from {schema}.journal where run_id = any (%(ids)s) order by seq
""")

    last_attempts = statement("""
-- why steps are tried again
select distinct on (run_id, step_id) run_id, step_id, attempt, error::text, next_attempt_at
from {schema}.attempts where run_id = any (%(ids)s) order by run_id, step_id, seq desc
""")

    progress = statement("""
-- what executing steps last said of themselves
select run_id, step_id, body::text, at from {schema}.progress where run_id = any (%(ids)s)
""")

    attempts = statement("""
-- what failed
select step_id, attempt, kind, error::text, started_at, finished_at, next_attempt_at
from {schema}.attempts where run_id = %(id)s order by seq
""")

    events = statement("""
-- a run's life
select seq, kind, step_id, data::text, at from {schema}.events where run_id = %(id)s order by seq
""")

    signals = statement("""
-- what arrived
select seq, message_id, name, body::text, taken_by, sent_at, taken_at
from {schema}.inbox where run_id = %(id)s and kind = 'signal' order by seq
""")

    outcome = statement("""
-- how a run, or the one that it went on as, has ended; with the results of its nodes if it completed
select r.id, r.status, r.workflow, r.version, r.queue, r.error::text, r.reason, j.step_id, j.kind, j.result::text
from {schema}.runs r
left join {schema}.journal j
  on j.run_id = r.id and r.status = 'completed' and j.parent is null and j.status = 'completed'
where r.id = {schema}.chain_end(%(id)s) order by j.seq
""")

    answer = statement("""
-- a message that wants a reply: it went on with the run's chain, or an earlier run of that had it before
with recursive later as (
  select id, successor from {schema}.runs where id = %(id)s
  union all
  select next.id, next.successor from later join {schema}.runs next on next.id = later.successor
),
earlier as (
  select id, predecessor from {schema}.runs where id = %(id)s
  union all
  select before.id, before.predecessor from earlier join {schema}.runs before on before.id = earlier.predecessor
),
chain as (
  select id from later union all select id from earlier
),
found as (  -- one run after the other, by the index, until it is there
  select m.*
  from chain, lateral (
    select run_id, state, replied_at, reply from {schema}.inbox
    where run_id = chain.id and message_id = %(message)s limit 1
  ) m
  limit 1
)
select r.id, r.status, r.workflow, r.version, r.queue, r.error::text, r.reason,
  found.replied_at is not null as replied, found.reply::text,
  r.finished_at is not null and (r.successor is null or found.state = 'taken') as too_late
from found join {schema}.runs r on r.id = found.run_id
""")

    end_of_chain = statement("""
-- where a run has gone on to
select {schema}.chain_end(%(id)s) as id
""")

    revision = statement("""
-- whether a run has changed
select revision from {schema}.runs where id = %(id)s
""")

    status = statement("""
-- a run's status
select status from {schema}.runs where id = %(id)s
""")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a run has come, and if it has ended, how. `result` is JSON text, of a completed run only."""

    id: uuid.UUID
    status: Status
    workflow: str
    version: str
    queue: str
    result: JsonText | None = None
    error: ErrorInfo | None = None
    reason: str | None = None

    @property
    def not_undone(self) -> tuple[str, ...]:
        """What the rollback could not undo."""
        return tuple(self.error.details.get("not_undone", ())) if self.error else ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a message that wants a reply. `run` is the one that has it; `reply` is JSON text, once `replied`.
    `too_late`: nobody will reply any more."""

    run: Outcome
    replied: bool
    reply: JsonText | None
    too_late: bool


# ---------------------------------------------------------------- one run


async def snapshot(
    db: Store,
    connection: Connection,
    run_id: uuid.UUID,
    children: int = 100,
    *,
    totals: Totals | None = None,
) -> RunSnapshot:
    """A run as it stands, with its steps and, level below level, up to `children` runs that it has started.

    `totals` says how many nodes a workflow has in a version, where that is known.
    """
    async with _one_moment(connection):
        rows = await _rows(connection, statements(db.schema).run, id=run_id)
        if not rows:
            raise RunNotFound(run_id)
        level = rows
        while level and children > 0:
            level = await _rows(
                connection, statements(db.schema).children, ids=[row["id"] for row in level], limit=children
            )
            rows = [*rows, *level]
        ids = [row["id"] for row in rows]
        journal = _by_run(await _rows(connection, statements(db.schema).journal, ids=ids))
        open_ids = [row["id"] for row in rows if row["frame"] != "{}"]
        attempts = _by_run(
            await _rows(connection, statements(db.schema).last_attempts, ids=open_ids) if open_ids else []
        )
        active = [row["id"] for row in rows if not Status(row["status"]).ended]
        said = _by_run(await _rows(connection, statements(db.schema).progress, ids=active) if active else [])
    made: dict[uuid.UUID, list[RunSnapshot]] = defaultdict(list)
    for row in reversed(rows):  # the lowest level first
        id_ = row["id"]
        one = _run(row, db.payloads, totals)
        one = _with_steps(one, row, journal.get(id_, []), attempts.get(id_, []), said.get(id_, []), db.payloads)
        made[row["parent_id"] if id_ != run_id else run_id].append(replace(one, children=tuple(reversed(made[id_]))))
    return made[run_id][-1]


async def status_of(db: Store, connection: Connection, run_id: uuid.UUID) -> Status | None:
    """The run's status; None if there is no such run."""
    rows = await _rows(connection, statements(db.schema).status, id=run_id)
    return Status(rows[0]["status"]) if rows else None


async def exists(db: Store, connection: Connection, run_id: uuid.UUID) -> bool:
    return await status_of(db, connection, run_id) is not None


async def end_of_chain(db: Store, connection: Connection, run_id: uuid.UUID) -> uuid.UUID:
    """The run as which this one goes on now: itself, unless it was continued as new."""
    found: uuid.UUID = (await _rows(connection, statements(db.schema).end_of_chain, id=run_id))[0]["id"]
    return found


async def revision_of(db: Store, connection: Connection, run_id: uuid.UUID) -> int | None:
    """The number that every change of the run raises; None if there is no such run."""
    rows = await _rows(connection, statements(db.schema).revision, id=run_id)
    return rows[0]["revision"] if rows else None


async def outcome(db: Store, connection: Connection, run_id: uuid.UUID, *, waiter: uuid.UUID | None = None) -> Outcome:
    """What `result` needs, of the end of the run's chain. A result is what a body or ``result=fn`` gave, else ``{node:
    result}``: texts, which nobody parses.

    `waiter`: asks to be told of the run's end. That is committed before the run is read, in the same flush: an end that
    is not seen here is told.
    """
    flush = Flush(connection)
    if waiter is not None:
        flush.add(db.sql.begin)
        flush.add(sweep.statements(db.schema).register_for_end, {"id": run_id, "waiter": waiter})
        flush.add(db.sql.commit)
    answer = flush.add(statements(db.schema).outcome, {"id": run_id})
    try:
        await flush.send()
    except BaseException:
        await abandon(connection)
        raise
    rows = answer.rows
    if not rows:
        raise RunNotFound(run_id)
    first = dict(zip(_OUTCOME, rows[0], strict=True))
    result: JsonText | None = None
    if first["status"] == Status.COMPLETED:
        result = _result_of({step: db.payloads.decoded(text) for *_, step, kind, text in rows if _counts(step, kind)})
    return replace(_outcome(first, db.payloads), result=result)


def completed(run: Run, journal: Iterable[Entry]) -> Outcome:
    """What `outcome` reads of a run that has completed, from the entries that it has left."""
    own = (entry for entry in journal if entry.parent is None and entry.status == "completed")
    result = _result_of({entry.step_id: entry.result for entry in own if _counts(entry.step_id, entry.kind.value)})
    return Outcome(run.id, run.status, run.workflow, run.version, run.queue, result)


def _counts(step_id: str | None, kind: str | None) -> bool:
    return kind in NODES or step_id == _RESULT


def _result_of(texts: Mapping[str, JsonText | None]) -> JsonText:
    """What a body or ``result=fn`` gave, else ``{node: result}``."""
    read = {name: "null" if text is None else text for name, text in texts.items()}
    named = ",".join(f"{json.dumps(name, ensure_ascii=False)}:{text}" for name, text in read.items())
    return read.get(_RESULT, "{" + named + "}")


_RESULT: Final = "run:result"


_OUTCOME: Final = ("id", "status", "workflow", "version", "queue", "error", "reason", "step_id", "kind", "result")


async def answer(db: Store, connection: Connection, run_id: uuid.UUID, message_id: str) -> Answer:
    """What became of a message that was sent to this run, or to one of its chain. Raises RunNotFound if it is gone."""
    rows = await _rows(connection, statements(db.schema).answer, id=run_id, message=message_id)
    if not rows:
        raise RunNotFound(run_id)
    row = rows[0]
    return Answer(_outcome(row, db.payloads), row["replied"], db.payloads.decoded(row["reply"]), row["too_late"])


def _outcome(row: Mapping[str, Any], payloads: Payloads) -> Outcome:
    return Outcome(
        row["id"],
        Status(row["status"]),
        row["workflow"],
        row["version"],
        row["queue"],
        error=error_info(payloads.load(row["error"])),
        reason=row["reason"],
    )


async def history(db: Store, connection: Connection, run_id: uuid.UUID) -> list[HistoryEvent]:
    """All that happened to the run, in order."""
    async with _one_moment(connection):
        runs = await _rows(connection, statements(db.schema).run, id=run_id)
        if not runs:
            raise RunNotFound(run_id)
        events = await _rows(connection, statements(db.schema).events, id=run_id)
        journal = await _rows(connection, statements(db.schema).journal, ids=[run_id])
        attempts = await _rows(connection, statements(db.schema).attempts, id=run_id)
        signals = await _rows(connection, statements(db.schema).signals, id=run_id)
    load = db.payloads.load
    sources = Sources(
        run=runs[0],
        events=[row | {"data": load(row["data"])} for row in events],
        journal=[
            row | {"result": load(row["result"]), "error": error_info(load(row["error"])), "extra": load(row["extra"])}
            for row in journal
        ],
        attempts=[row | {"error": error_info(load(row["error"]))} for row in attempts],
        signals=[row | {"body": load(row["body"])} for row in signals],
        frame=codec.frame(runs[0]["frame"], db.payloads),
    )
    return compose(sources)


# ---------------------------------------------------------------- pages


async def page(
    db: Store,
    connection: Connection,
    *,
    status: Status | str | Collection[Status | str] | None = None,
    workflow: str | None = None,
    version: str | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: uuid.UUID | None = None,
    key: str | None = None,
    started_after: datetime | None = None,
    limit: int = 50,
    after: str | None = None,
    totals: Totals | None = None,
) -> Page[RunSnapshot]:
    """Runs that match all filters, the newest first. `after` is the ``next`` of the page before.

    A `status` may be a derived one (``retrying``, ``sleeping`` ...), or several; `tags` must all be there. A run that
    went on as another one has left its `key` to that.
    """
    query, values = page_query(
        db.schema,
        status=status,
        workflow=workflow,
        version=version,
        tags=tags,
        parent=parent,
        key=key,
        started_after=started_after,
        limit=limit,
        after=_read_cursor(after) if after is not None else None,
    )
    rows = await _rows(connection, query, **values)
    items = tuple(_run(row, db.payloads, totals) for row in rows[:limit])
    return Page(items, _cursor(items[-1]) if len(rows) > limit else None)


def page_query(
    schema: str,
    *,
    status: Status | str | Collection[Status | str] | None = None,
    workflow: str | None = None,
    version: str | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: uuid.UUID | None = None,
    key: str | None = None,
    started_after: datetime | None = None,
    limit: int = 50,
    after: tuple[datetime, uuid.UUID] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """The statement of a page and its values. One more row than `limit`: to know if there is a next page.

    Each status asked for is an arm of its own, in the order of an index and as short as the page; then the arms are
    merged. One ``status in (...)`` would sort all matching runs, or walk over all that do not match.
    """
    if not 1 <= limit <= MOST:
        raise ConfigurationError(f"limit={limit!r}: a page holds 1 to {MOST} runs")
    if started_after is not None and started_after.tzinfo is None:
        raise ConfigurationError(f"started_after={started_after!r} has no time zone: use an aware datetime")
    values: dict[str, Any] = {"limit": limit + 1}
    where: list[str] = []

    def add(condition: str, **more: Any) -> None:
        where.append(condition)
        values.update(more)

    if workflow is not None:
        add("r.workflow = %(workflow)s", workflow=workflow)
    if version is not None:
        add("r.version = %(version)s", version=version)
    if tags:  # the second condition is what the partial index asks for
        add("r.tags @> %(tags)s::jsonb and r.tags <> '{}'", tags=json.dumps(dict(tags)))
    if parent is not None:
        add("r.parent_id = %(parent)s", parent=parent)
    if key is not None:  # the second condition is what the partial index asks for: the end of a chain has its key
        add("r.key = %(key)s and r.successor is null", key=key)
    if started_after is not None:
        add("r.started_at > %(started_after)s", started_after=started_after)
    if after is not None:
        add("(r.created_at, r.id) < (%(after_time)s, %(after_id)s)", after_time=after[0], after_id=after[1])

    runs, order = f'"{schema}".runs', "order by r.created_at desc, r.id desc limit %(limit)s"
    arms = [" and ".join([arm, *where]) for arm in _arms(status)]
    if len(arms) == 1:
        return f"select {_RUN} from {runs} r where {arms[0]} {order}".encode(), values
    ids = " union ".join(f"(select r.id, r.created_at from {runs} r where {arm} {order})" for arm in arms)
    newest = f"select r.id from ({ids}) r {order}"
    query = f"select {_RUN} from {runs} r where r.id = any (array({newest})) order by r.created_at desc, r.id desc"
    return query.encode(), values


def _arms(status: Status | str | Collection[Status | str] | None) -> list[str]:
    """A condition for each status asked for; those that another one covers are left out."""
    if status is None:
        return ["true"]
    asked = {str(one) for one in ([status] if isinstance(status, str) else status)}
    unknown = sorted(asked - set(STATUSES))
    if unknown or not asked:
        what = f"unknown status {', '.join(map(repr, unknown))}" if unknown else "no status at all was asked for"
        raise ConfigurationError(f"{what}: there are {', '.join(STATUSES)}")
    plainly = [Status(one) for one in sorted(asked) if one not in DERIVED.values()]
    arms = [f"r.status = '{one.value}'" for one in plainly]
    for waiting_for, derived in DERIVED.items():
        if derived in asked:
            arms.append(f"r.waiting_for = '{waiting_for.value}' and r.status in ('pending', 'suspended')")
    return arms


def _cursor(last: RunSnapshot) -> str:
    return base64.urlsafe_b64encode(f"{last.created_at.isoformat()} {last.id}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[datetime, uuid.UUID]:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        created_at, id_ = text.split(" ")
        return datetime.fromisoformat(created_at), uuid.UUID(id_)
    except (ValueError, TypeError, binascii.Error) as error:
        raise ConfigurationError(f"after={cursor!r} is not the `next` of a page") from error


# ---------------------------------------------------------------- rows into snapshots


def _run(row: Mapping[str, Any], payloads: Payloads, totals: Totals | None) -> RunSnapshot:
    error = error_info(payloads.load(row["error"]))
    return RunSnapshot(
        id=row["id"],
        workflow=row["workflow"],
        version=row["version"],
        status=Status(row["status"]),
        cursor=row["current_step"],
        created_at=row["created_at"],
        total_steps=totals(row["workflow"], row["version"]) if totals else None,
        waiting_for=WaitingFor(row["waiting_for"]) if row["waiting_for"] else None,
        waiting_name=row["waiting_name"],
        wake_at=row["wake_at"],
        key=row["key"],
        tags=json.loads(row["tags"]),
        priority=row["priority"],
        parent_id=row["parent_id"],
        parent_step=row["parent_step"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        deadline=row["deadline"],
        input=payloads.load(row["input"]),
        error=error,
        reason=row["reason"],
        not_undone=tuple(error.details.get("not_undone", ())) if error else (),
        retries=row["retries"],
        revision=row["revision"],
        predecessor=row["predecessor"],
        successor=row["successor"],
        forked_from=row["forked_from"],
    )


def _with_steps(
    run: RunSnapshot,
    row: Mapping[str, Any],
    journal: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
    said: Sequence[Mapping[str, Any]],
    payloads: Payloads,
) -> RunSnapshot:
    """The run with what its journal and its frame say of its steps."""
    entries = {entry["step_id"]: _entry(entry, payloads) for entry in with_beginnings(journal)}
    nodes = {entry["step_id"] for entry in journal if entry["parent"] is None and entry["kind"] in NODES}
    results = {name: step.result for name, step in entries.items() if name in nodes and step.status == "completed"}
    failed = tuple(
        name.removeprefix("undo:") for name, s in entries.items() if s.kind == "undo" and s.status == "failed"
    )
    quiet = {name for name, s in entries.items() if s.kind in ("choice", "result") and s.status == "completed"}
    quiet |= {name for name, s in entries.items() if s.kind in NOT_SHOWN}
    parents = {entry["step_id"]: entry["parent"] for entry in journal}
    known = {name: step for name, step in entries.items() if name not in quiet}
    last = {attempt["step_id"]: attempt for attempt in attempts}
    can_run = row["claim_token"] is not None or run.status in (Status.RUNNING, Status.COMPENSATING)
    for step_id, begun in ({} if run.ended else codec.frame(row["frame"], payloads)).items():
        known[step_id] = _begun(step_id, begun, entries.get(step_id), last.get(step_id), payloads, can_run=can_run)
        parents.setdefault(step_id, parent_of(step_id))
    for report in said:
        _add_progress(known, parents, entries, report["step_id"], payloads.load(report["body"]))
    return replace(run, results=results, steps=_nested(known, parents), not_undone=run.not_undone or failed)


def _add_progress(
    known: dict[str, StepSnapshot],
    parents: dict[str, str | None],
    entries: Mapping[str, StepSnapshot],
    step_id: str,
    said: Mapping[str, Any],
) -> None:
    """What a step says of itself while it runs. One that holds the run's row is not to be seen otherwise."""
    if step_id in entries:
        return
    step = known.get(step_id) or StepSnapshot(step_id, _kind(step_id, Begun()), "running")
    if step.status == "running":
        known[step_id] = replace(step, progress=said)
        parents.setdefault(step_id, parent_of(step_id))


def _entry(row: Mapping[str, Any], payloads: Payloads) -> StepSnapshot:
    value = payloads.load(row["result"])
    suspended = row["status"] == "suspended"
    return StepSnapshot(
        step_id=row["step_id"],
        kind=row["kind"],
        status=row["status"],
        attempt=row["attempt"],
        result=None if suspended else value,
        snapshot=value if suspended else None,
        error=error_info(payloads.load(row["error"])),
        started_at=row["started_at"],
        finished_at=None if suspended else row["finished_at"],
    )


def _begun(
    step_id: str,
    begun: Begun,
    entry: StepSnapshot | None,
    last: Mapping[str, Any] | None,
    payloads: Payloads,
    *,
    can_run: bool,
) -> StepSnapshot:
    """A step that has begun and has not ended: it runs, or it waits; `entry` is there if it had returned Suspend."""
    running = begun.running or (begun.waits is None and can_run)
    suspended = begun.waits is WaitingFor.RESUME
    base = entry or StepSnapshot(step_id, _kind(step_id, begun), "waiting")
    return replace(
        base,
        status="suspended" if suspended else "running" if running else "waiting",
        attempt=begun.attempts + 1,
        error=error_info(payloads.load(last["error"])) if last is not None else base.error,
        started_at=base.started_at or begun.since,
        next_attempt_at=begun.due if begun.waits is WaitingFor.RETRY else None,
    )


_KINDS: Final[Mapping[WaitingFor | None, EntryKind]] = {
    WaitingFor.SLEEP: EntryKind.SLEEP,
    WaitingFor.SIGNAL: EntryKind.SIGNAL,
    WaitingFor.CHILD: EntryKind.CHILD,
}


def _kind(step_id: str, begun: Begun) -> EntryKind:
    """The kind of a step that is not in the journal yet, by its id and its wait."""
    if step_id.startswith(("choice:", "input:")):
        return EntryKind.CHOICE
    if step_id.startswith("undo:"):
        return EntryKind.UNDO
    if step_id.startswith("run:"):
        return EntryKind.RESULT
    if begun.names is not None:
        return EntryKind.RECEIVE
    if begun.waits in _KINDS:
        return _KINDS[begun.waits]
    if step_id.endswith("]"):
        return EntryKind.ITERATION
    around = parent_of(step_id)
    if around is None or parent_of(around) is not None:  # only a function's steps stand that deep
        return EntryKind.STEP
    return EntryKind.STEP if around.endswith("]") else EntryKind.BRANCH


def _nested(known: Mapping[str, StepSnapshot], parents: Mapping[str, str | None]) -> tuple[StepSnapshot, ...]:
    """The steps under the nodes around them. A node that is not journaled yet stands where its first child does."""
    shown = dict(known)
    below: dict[str | None, list[str]] = defaultdict(list)
    inside: dict[str | None, set[str]] = defaultdict(set)
    for step_id, step in known.items():
        inside[parents.get(step_id)].add(step.kind)

    def place(step_id: str) -> None:
        parent = parents[step_id] if step_id in parents else parent_of(step_id)
        if parent is not None and parent not in shown:
            kind = EntryKind.ROUTE if f"choice:{parent}" in parents else _kind_around(shown[step_id], parent, inside)
            shown[parent] = StepSnapshot(parent, kind, "running", started_at=shown[step_id].started_at)
            place(parent)
        below[parent].append(step_id)

    def tree(step_id: str) -> StepSnapshot:
        return replace(shown[step_id], children=tuple(tree(child) for child in below[step_id]))

    for step_id in known:
        place(step_id)
    return tuple(tree(step_id) for step_id in below[None])


def _kind_around(child: StepSnapshot, parent: str, inside: Mapping[str | None, set[str]]) -> EntryKind:
    """The kind of a node that is not in the journal yet, by what is in it and beside it."""
    if child.step_id.endswith("]"):
        return EntryKind.MAP if child.kind == EntryKind.CHILD else EntryKind.LOOP
    if parent.endswith("]"):
        return EntryKind.ITERATION
    if EntryKind.BRANCH in {child.kind, *inside.get(parent, ())}:
        return EntryKind.PARALLEL
    return EntryKind.BRANCH if EntryKind.BRANCH in inside.get(parent_of(parent), ()) else EntryKind.BLOCK


def _by_run(rows: Sequence[dict[str, Any]]) -> dict[uuid.UUID, list[dict[str, Any]]]:
    runs: dict[uuid.UUID, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["run_id"]].append(row)
    return runs


# ---------------------------------------------------------------- the connection


@asynccontextmanager
async def _one_moment(connection: Connection) -> AsyncIterator[None]:
    """All that is read in the block is read as of its beginning."""
    if connection.info.transaction_status is not TransactionStatus.IDLE:
        yield  # the caller's transaction
        return
    async with connection.transaction():
        await connection.execute("set transaction isolation level repeatable read, read only")
        yield


async def _rows(connection: Connection, query: bytes, **values: Any) -> list[dict[str, Any]]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, values)
        return await cursor.fetchall()


@lru_cache
def statements(schema: str) -> ReadSql:
    """The statements for one schema."""
    return ReadSql(schema)
