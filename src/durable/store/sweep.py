"""What recovery asks the database: who is dead, what is due, what was never read, which run has no job.

Every worker takes a `look` about once a second: one statement, which changes nothing and says which of the others have
anything to do. Any number of workers may run those at once. So each
- takes rows with SKIP LOCKED: a row that somebody holds is alive, and not worth waiting for;
- goes through a partial index that holds only what it is after: a million parked runs cost it nothing;
- puts back by enqueueing a continuation, which the queueing lock ``run:revision`` makes one job, and the revision
  harmless wherever the run has moved on.

Dead means: nobody holds the session advisory lock (class of the schema, id of the worker). Asked on an autocommit
connection, no statement here keeps a lock for longer than itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from psycopg import AsyncClientCursor
from psycopg.rows import class_row, dict_row

from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.query import Statements, statement
from durable.values import Status

# ---------------------------------------------------------------- pieces that several statements share

# Ids of the workers whose lock is held. Computed once a statement; classid and objid are unsigned, hence the casts.
_LIVE: Final = """
  select objid::int4 from pg_locks
  where locktype = 'advisory' and granted and objsubid = 2 and classid = hashtext(%(schema)s)::oid
    and database = (select oid from pg_database where datname = current_database())
"""
# No waiting job carries this run at this revision. A scalar over the unique index: never a join over the backlog.
_NO_JOB: Final = """
  not exists (select from {schema}.procrastinate_jobs j
              where j.status = 'todo' and j.queueing_lock = r.id || ':' || r.revision)
"""
# A run that may go on at once: of the partial index runs_runnable_idx.
_RUNNABLE: Final = "r.status in ('pending', 'running', 'compensating') and r.waiting_for is null"
_PUT_BACK: Final = """
  {schema}.enqueue(case r.status when 'compensating' then 'durable.compensate' else 'durable.advance' end,
                   r.id, r.revision, r.queue, r.priority)
"""
# A park is over by its time. A running run is not waiting, a claimed one is its owner's, a paused one nobody's.
_DUE: Final = f"""
  r.wake_at <= (select {{schema}}.engine_now()) and r.status in ('pending', 'suspended', 'compensating')
  and r.claim_token is null and {_NO_JOB}
"""
# A job in nobody's hands: the queue's heartbeat is asked only of those that no worker of ours accounts for.
_LEFT: Final = """
  not exists (select from {schema}.workers w where w.queue_worker_id = j.worker_id)
  and not exists (select from {schema}.procrastinate_workers q
                  where q.id = j.worker_id and q.last_heartbeat > now() - interval '30 s')
"""
# Doorbells that wait are the highest band of the queue's priorities, one short range of its index.
_RUNG: Final = """
  m.run_id in (select (j.args ->> 'run_id')::uuid from {schema}.procrastinate_jobs j
               where j.status = 'todo' and j.priority > 1500000 and j.args ? 'run_id')
"""
# A worker died with a job of the run: evidence of a crash, which the takeover charges. Whoever put the run back before
# it would run the step once more uncharged, and a step that kills its worker would go on doing so.
_LEFT_TO_TAKEOVER: Final = f"""
  array(select (j.args ->> 'run_id')::uuid from {{schema}}.procrastinate_jobs j
        join {{schema}}.workers w on w.queue_worker_id = j.worker_id
        where j.status = 'doing' and j.args ? 'run_id' and w.id <> all (array({_LIVE})))
"""
# A run that has ended still is asked to retry, and a completed child to roll back, and one that has continued as new
# hands on what it gets; nothing else reaches it.
_HEARS: Final = (
    "(r.finished_at is null or m.kind in ('retry', 'rollback') or (r.successor is not null and m.kind <> 'child'))"
)
# `waiting_name` is "<workflow>@<version>" of what is missing, for a child of any version "<workflow>@".
_KNOWN: Final = f"""
  r.waiting_for = 'definition' and r.waiting_name = any (%(names)s)
  and r.status in ('pending', 'running', 'suspended', 'compensating') and r.claim_token is null and {_NO_JOB}
"""


class SweepSql(Statements):
    # A scalar in the order of an index, with a limit of one, is looked up in that index, whatever the planner believes
    # of the table. `exists` would drop both, and may read a whole table that seems full of what there is none of. (That
    # is why a queue's name is looked up as a range: of what is equal there is no order.)
    look = statement(f"""
-- what there is to do: nothing is locked, nothing is changed
with page as materialized (
  select r.id, r.claim_token is null and r.id <> all (array(
      select (j.args ->> 'run_id')::uuid from {{schema}}.procrastinate_jobs j
      where j.status = 'doing' and j.args ? 'run_id')) and (
      select j.id from {{schema}}.procrastinate_jobs j
      where j.status = 'todo' and j.queueing_lock = r.id || ':' || r.revision limit 1) is null as alone
  from {{schema}}.runs r where {_RUNNABLE} and r.id > %(after)s order by r.id limit %(limit)s
)
select {{schema}}.engine_now() as now,
  (select wake_at from {{schema}}.runs where wake_at > (select {{schema}}.engine_now())
   order by wake_at limit 1) as next_wake,
  (select r.wake_at from {{schema}}.runs r where {_DUE} order by r.wake_at limit 1) is not null as due,
  exists (select from {{schema}}.workers where id <> all (array({_LIVE})))
  or (select r.claim_worker from {{schema}}.runs r
      where r.claim_worker is not null and not exists (select from {{schema}}.workers w where w.id = r.claim_worker)
      order by r.claim_worker limit 1) is not null
  or cardinality(array(select j.id from {{schema}}.procrastinate_jobs j where j.status = 'doing' and {_LEFT})) > 0
  as crashed,
  array(select id from {{schema}}.runs where claim_worker = %(worker)s and id <> all (%(executing)s::uuid[]))
  as stray_claims,
  array(select id from {{schema}}.procrastinate_jobs
        where status = 'doing' and worker_id = %(queue_worker)s::bigint and id <> all (%(jobs)s::bigint[]))
  as stray_jobs,
  (select m.sent_at from {{schema}}.inbox m left join {{schema}}.runs r on r.id = m.run_id
   where m.state = 'new' and m.sent_at < (select {{schema}}.engine_now()) - interval '1 s'
     and (r.id is null or not {_HEARS} or not ({_RUNG}))
   order by m.sent_at limit 1) is not null as unread,
  array(select distinct run_id from {{schema}}.inbox where run_id = any (%(executing)s::uuid[]) and state = 'new')
  as news,
  (select r.id from {{schema}}.runs r where {_KNOWN} limit 1) is not null as known,
  (select bool_or(alone) from page) is true as alone,
  (select id from page order by id offset %(limit)s - 1) as last,
  (select due from {{schema}}.deliveries
   where queue = %(queue)s and kind = any (%(kinds)s::text[]) and due <= (select {{schema}}.engine_now())
   order by due limit 1) is not null as deliveries,
  (select id from {{schema}}.procrastinate_jobs
   where status = 'todo' and queue_name between %(queue)s and %(queue)s
     and (scheduled_at is null or scheduled_at <= now())
   order by queue_name limit 1) is not null as waiting
""")

    register = statement("""
-- a new worker, whose row is seen only once its lock is held: it is never taken for dead
with made as (
  insert into {schema}.workers (queue, host, pid, started_at)
  values (%(queue)s, %(host)s, %(pid)s, {schema}.engine_now()) returning id
)
select id from made where pg_try_advisory_lock(hashtext(%(schema)s), id)
""")

    lock = statement("""
-- hold a worker's lock on another connection
select pg_try_advisory_lock(hashtext(%(schema)s), %(id)s)
""")

    unlock = statement("""
-- let go of it
select pg_advisory_unlock(hashtext(%(schema)s), %(id)s)
""")

    registered = statement("""
-- is it still there?
select exists (select from {schema}.workers where id = %(id)s)
""")

    set_queue_worker = statement("""
-- under which id procrastinate marks its jobs
update {schema}.workers set queue_worker_id = %(queue_worker_id)s where id = %(id)s
""")

    dead = statement(f"""
-- workers whose lock nobody holds
select id from {{schema}}.workers where id <> all (array({_LIVE})) order by id
""")

    alive = statement(f"""
-- live workers of a queue
select count(*) from {{schema}}.workers where queue = %(queue)s and id = any (array({_LIVE}))
""")

    forget = statement("""
-- dead workers that own nothing any more: their own lock, taken, proves that they are dead and stay so; what still
-- points to one (a claim, a job) is evidence of a crash that nobody has used yet
with idle as materialized (
  select w.id, w.queue_worker_id from {schema}.workers w
  where w.id = any (%(ids)s)
    and not exists (select from {schema}.runs r where r.claim_worker = w.id)
    and not exists (select from {schema}.procrastinate_jobs j
                    where j.worker_id = w.queue_worker_id and j.status = 'doing')
), gone as materialized (
  select id, queue_worker_id from idle where pg_try_advisory_xact_lock(hashtext(%(schema)s), id)
), theirs as (
  delete from {schema}.procrastinate_workers where id in (select queue_worker_id from gone)
)
delete from {schema}.workers where id in (select id from gone) returning id
""")

    unregister = statement("""
-- a worker that ends in order
with gone as (delete from {schema}.workers where id = %(id)s returning id)
select pg_advisory_unlock(hashtext(%(schema)s), id) from gone
""")

    claims_of = statement("""
-- claims of the dead: walks the claimed runs only
select r.id from {schema}.runs r
where r.claim_worker is not null
  and (r.claim_worker = any (%(ids)s) or not exists (select from {schema}.workers w where w.id = r.claim_worker))
order by r.id
""")

    doing_of = statement(f"""
-- jobs of the dead, and those that nobody alive accounts for
select j.id, j.args ->> 'run_id' as run_id, j.task_name as task, j.args from {{schema}}.procrastinate_jobs j
where j.status = 'doing'
  and (exists (select from {{schema}}.workers w where w.queue_worker_id = j.worker_id and w.id = any (%(ids)s))
       or {_LEFT})
order by j.id
""")

    delete_jobs = statement("""
-- they end here, once
delete from {schema}.procrastinate_jobs where id in (
  select id from {schema}.procrastinate_jobs where id = any (%(ids)s) and status = 'doing' for update skip locked
) returning id
""")

    own_doing = statement("""
-- the jobs that are marked as a worker's
select id from {schema}.procrastinate_jobs where status = 'doing' and worker_id = %(worker)s order by id
""")

    enqueue_due = statement(f"""
-- give them their continuations
with r as materialized (
  select r.id, r.status, r.revision, r.queue, r.priority from {{schema}}.runs r
  where {_DUE} and r.id <> all ({_LEFT_TO_TAKEOVER}) order by r.wake_at limit %(limit)s for update of r skip locked
)
select count(*) from r, {_PUT_BACK} as put_back
""")

    next_wake = statement("""
-- when the next one is due
select min(wake_at) from {schema}.runs where wake_at > %(since)s
""")

    unread = statement(f"""
-- runs with a message that was late to be read, whose row is free; what rings is asked only if some message is late
with late as materialized (
  select distinct m.run_id as id from {{schema}}.inbox m join {{schema}}.runs r on r.id = m.run_id
  where m.state = 'new' and m.sent_at < (select {{schema}}.engine_now()) - interval '1 s' and {_HEARS}
    and not ({_RUNG})
  limit 10 * %(limit)s
)
select r.id from {{schema}}.runs r where r.id in (select id from late) limit %(limit)s for update of r skip locked
""")

    ring = statement("""
-- a doorbell for a message that is committed: with a delay, if of nothing, such rings collapse
select count(*) from {schema}.runs r,
  {schema}.enqueue('durable.ring', r.id, null, r.queue, r.priority, interval '0') as rung
where r.id = %(id)s
""")

    unread_of = statement("""
-- claimed runs with new messages
select distinct run_id from {schema}.inbox where run_id = any (%(ids)s) and state = 'new'
""")

    settle = statement(f"""
-- messages that crossed the end of their run: seen, not taken, for a retry may want them
with mute as materialized (
  select m.run_id, m.seq from {{schema}}.inbox m left join {{schema}}.runs r on r.id = m.run_id
  where m.state = 'new' and m.sent_at < (select {{schema}}.engine_now()) - interval '1 s'
    and (r.id is null or not {_HEARS})
  order by m.sent_at limit %(limit)s for update of m skip locked
), seen as (
  update {{schema}}.inbox i set state = 'seen' from mute
  where i.run_id = mute.run_id and i.seq = mute.seq and i.state = 'new' returning 1
)
select count(*) from seen
""")

    orphans = statement(f"""
-- runnable runs without a job: the page is what is looked at, the walk goes on behind its last row; a run with a job in
-- hands is executed, or its worker is dead and the takeover's
with page as materialized (
  select r.id from {{schema}}.runs r where {_RUNNABLE} and r.id > %(after)s order by r.id limit %(limit)s
), busy as materialized (
  select (j.args ->> 'run_id')::uuid as id from {{schema}}.procrastinate_jobs j
  where j.status = 'doing' and j.args ? 'run_id'
), alone as materialized (
  select r.id, r.revision from {{schema}}.runs r
  where r.id = any (array(select id from page)) and {_RUNNABLE} and r.claim_token is null and {_NO_JOB}
    and r.id <> all (array(select id from busy))
  order by r.id for update of r skip locked
)
select alone.id, alone.revision, (select id from page order by id offset %(limit)s - 1) as last
from (select 1) as one left join alone on true
""")

    adopt = statement(f"""
-- give an orphan its continuation
with r as materialized (
  select r.id, r.status, r.revision, r.queue, r.priority from {{schema}}.runs r
  where r.id = %(id)s and r.revision = %(revision)s and {_RUNNABLE} and r.claim_token is null and {_NO_JOB}
  for update of r skip locked
)
select count(*) from r, {_PUT_BACK} as put_back
""")

    known = statement(f"""
-- runs parked for want of definitions that are here
select r.id, r.status, r.revision, r.queue, r.priority from {{schema}}.runs r where {_KNOWN} limit %(limit)s
""")

    enqueue_known = statement(f"""
-- give them their continuations
with r as materialized (
  select r.id, r.status, r.revision, r.queue, r.priority from {{schema}}.runs r
  where {_KNOWN} limit %(limit)s for update of r skip locked
)
select count(*) from r, {_PUT_BACK} as put_back
""")

    server_age = statement("""
-- seconds since the server began: until workers have had time to come back, a lock that is not held says nothing
select extract(epoch from clock_timestamp() - pg_postmaster_start_time())::float8
""")

    move_clock = statement("""
-- for tests: the engine's time runs ahead of the server's
update {schema}.clock set ahead = ahead + %(by)s
""")

    idle = statement(f"""
-- is there nothing that could be done now: no job, no run that could go on, none that is due?
select not exists (select from {{schema}}.procrastinate_jobs
                   where queue_name = %(queue)s and (status = 'doing' or status = 'todo'))
   and not exists (select from {{schema}}.runs r where {_RUNNABLE} and r.queue = %(queue)s)
   and not exists (select from {{schema}}.runs r where {_DUE} and r.queue = %(queue)s)
""")

    has_job = statement(f"""
-- a continuation that waits, or whatever job of the run that is in the hands of a live worker
select exists (select from {{schema}}.procrastinate_jobs
               where status = 'todo' and queueing_lock = %(id)s::uuid || ':' || %(revision)s)
    or exists (select from {{schema}}.procrastinate_jobs j join {{schema}}.workers w on w.queue_worker_id = j.worker_id
               where j.status = 'doing' and j.args ->> 'run_id' = %(id)s::uuid::text and w.id = any (array({_LIVE})))
""")

    register_waiter = statement("""
-- wait for the end
insert into {schema}.waiters (run_id, waiter, registered_at) values (%(id)s, %(waiter)s, {schema}.engine_now())
on conflict (run_id, waiter) do update set registered_at = excluded.registered_at
""")

    register_for_end = statement("""
-- the same for who wants nothing else: nobody tells of an end that has come
insert into {schema}.waiters (run_id, waiter, registered_at)
select %(id)s::uuid, %(waiter)s::uuid, {schema}.engine_now()
where not exists (
  select from {schema}.runs where id = %(id)s::uuid and status in ('completed', 'failed', 'canceled'))
on conflict (run_id, waiter) do update set registered_at = excluded.registered_at
""")

    drop_stale_waiters = statement("""
-- waiters that are gone
with gone as (
  delete from {schema}.waiters where registered_at < (select {schema}.engine_now()) - interval '1 hour' returning 1
)
select count(*) from gone
""")

    drop_stale_progress = statement("""
-- what steps said of themselves that ended long ago
with gone as (delete from {schema}.progress where at < (select {schema}.engine_now()) - interval '1 day' returning 1)
select count(*) from gone
""")

    purge = statement("""
-- whole trees that have ended, if each run of them could be locked: else a retry or a rollback begins there
with roots as materialized (
  select r.id from {schema}.runs r
  where r.finished_at < (select {schema}.engine_now()) - %(older_than)s::interval and r.root_id = r.id
    and not exists (select from {schema}.runs k where k.root_id = r.id and k.root_id <> k.id and k.finished_at is null)
  order by r.finished_at limit %(limit)s for update of r skip locked
), below as materialized (
  select k.id, k.root_id from {schema}.runs k
  where k.root_id = any (array(select id from roots)) and k.root_id <> k.id and k.finished_at is not null
  for update of k skip locked
), whole as materialized (
  select r.id from roots r
  where (select count(*) from below b where b.root_id = r.id)
      = (select count(*) from {schema}.runs k where k.root_id = r.id and k.root_id <> k.id)
), ids as materialized (
  select array(select id from whole union all select b.id from below b join whole w on w.id = b.root_id) as list
), a as (delete from {schema}.journal where run_id = any ((select list from ids)::uuid[])),
   b as (delete from {schema}.inbox where run_id = any ((select list from ids)::uuid[])),
   c as (delete from {schema}.attempts where run_id = any ((select list from ids)::uuid[])),
   d as (delete from {schema}.events where run_id = any ((select list from ids)::uuid[])),
   e as (delete from {schema}.waiters where run_id = any ((select list from ids)::uuid[])),
   h as (delete from {schema}.deliveries where run_id = any ((select list from ids)::uuid[])),
   p as (delete from {schema}.progress where run_id = any ((select list from ids)::uuid[])),
   f as (delete from {schema}.runs where id = any ((select list from ids)::uuid[]))
select cardinality(list) from ids
""")


@dataclass(frozen=True, slots=True)
class Due:
    """A run that can be put back: what its continuation needs to carry."""

    id: uuid.UUID
    status: Status
    revision: int
    queue: str
    priority: int


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job that is marked `doing` by a worker that is gone: evidence of a crash, if it carries a run."""

    id: int
    run_id: uuid.UUID | None
    task: str
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who looks, and what is in its hands: a worker of `queue`.

    - `id`, `queue_worker`: as the workers' table and the queue know it; `executing`, `jobs`: the runs that it executes
      and the jobs that it has fetched, as it knows.
    - `known`: the workflows and versions that it can execute; `kinds`: of deliveries, those that it has hooks for.
    """

    id: int
    queue: str
    queue_worker: int | None = None
    executing: Collection[uuid.UUID] = ()
    jobs: Collection[int] = ()
    known: Collection[tuple[str, str]] = ()
    kinds: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was to do at one look. An answer is a hint: whoever acts on it asks again, under locks.

    - `now`: the engine's time then; `next_wake`: when the next run to come is due.
    - `due`: some run is; `crashed`: some worker is dead, or some claim or job in nobody's hands.
    - `stray_claims`, `stray_jobs`: stand in the watcher's name, and it does not know of them.
    - `unread`: a message is late, and no doorbell waits; `news`: runs that the watcher executes have new messages.
    - `known`: some run waits for a definition that the watcher has.
    - `alone`: some runnable run of the page has no job; `last`: where the next page begins, None: the walk is through.
    - `deliveries`: some are due; `waiting`: some job can be fetched from the watcher's queue.
    """

    now: datetime
    next_wake: datetime | None
    due: bool
    crashed: bool
    stray_claims: list[uuid.UUID]
    stray_jobs: list[int]
    unread: bool
    news: list[uuid.UUID]
    known: bool
    alone: bool
    last: uuid.UUID | None
    deliveries: bool
    waiting: bool


async def look(
    db: Store, connection: Connection, watcher: Watcher, after: uuid.UUID | None = None, limit: int = 1_000
) -> Seen:
    """All questions at once, and no answer but whether anything is there. `after`, `limit`: of the walk over runnable
    runs, as `orphans` has them.

    It is planned each time: a plan that was made while there were no runs and no jobs would go on reading both whole.
    """
    values = {
        "worker": watcher.id,
        "queue": watcher.queue,
        "queue_worker": watcher.queue_worker,
        "executing": list(watcher.executing),
        "jobs": list(watcher.jobs),
        "names": missing_names(watcher.known),
        "kinds": list(watcher.kinds),
        "after": after or FIRST,
        "limit": limit,
        "schema": db.schema,
    }
    async with AsyncClientCursor(connection, row_factory=class_row(Seen)) as cursor:
        await cursor.execute(statements(db.schema).look, values)
        seen = await cursor.fetchone()
    assert seen is not None
    return seen


# ---------------------------------------------------------------- workers


async def register_worker(db: Store, connection: Connection, queue: str, host: str, pid: int) -> int:
    """A new worker, alive for as long as `connection` (direct, autocommit, kept open) lives: it holds the lock."""
    return int(await _value(db, connection, "register", queue=queue, host=host, pid=pid))


async def lock_worker(db: Store, connection: Connection, worker_id: int) -> bool:
    """Hold the worker's lock anew on another connection. False: the old one still does, or recover has forgotten the
    worker meanwhile (register again; its claims are lost)."""
    if not await _value(db, connection, "lock", id=worker_id):
        return False
    if await registered(db, connection, worker_id):  # asked under the lock: from here nobody forgets it
        return True
    await _value(db, connection, "unlock", id=worker_id)
    return False


async def registered(db: Store, connection: Connection, worker_id: int) -> bool:
    """Whether the worker has a row: one that has none is gone, and forgotten."""
    return bool(await _value(db, connection, "registered", id=worker_id))


async def set_queue_worker(db: Store, connection: Connection, worker_id: int, queue_worker_id: int | None) -> None:
    """Say under which id procrastinate marks the worker's jobs: before the first one is fetched."""
    await _rows(db, connection, "set_queue_worker", id=worker_id, queue_worker_id=queue_worker_id)


async def unregister_worker(db: Store, connection: Connection, worker_id: int) -> None:
    """The worker ends in order: it has given its claims and jobs back. On the connection that holds its lock."""
    await _rows(db, connection, "unregister", id=worker_id)


async def dead_workers(db: Store, connection: Connection) -> list[int]:
    """Registered workers whose lock nobody holds."""
    return await _column(db, connection, "dead")


async def workers_alive(db: Store, connection: Connection, queue: str) -> int:
    """How many live workers serve a queue."""
    return int(await _value(db, connection, "alive", queue=queue))


async def forget_workers(db: Store, connection: Connection, worker_ids: Collection[int]) -> list[int]:
    """Delete dead workers that own nothing any more, and their rows in the queue; returns which."""
    return await _column(db, connection, "forget", ids=list(worker_ids)) if worker_ids else []


# ---------------------------------------------------------------- what dead workers held


async def claims_of(db: Store, connection: Connection, worker_ids: Collection[int]) -> list[uuid.UUID]:
    """Runs that are claimed by one of these (dead) workers, or by one that is not registered any more."""
    return await _column(db, connection, "claims_of", ids=list(worker_ids))


async def doing_jobs_of(db: Store, connection: Connection, worker_ids: Collection[int]) -> list[DeadJob]:
    """`doing` jobs of these (dead) workers, and those that nobody alive accounts for."""
    return [_dead_job(row) for row in await _rows(db, connection, "doing_of", ids=list(worker_ids))]


async def delete_jobs(db: Store, connection: Connection, job_ids: Collection[int]) -> list[int]:
    """Delete `doing` jobs; returns those that were still there. Only who deleted a job may count it as a crash."""
    return sorted(await _column(db, connection, "delete_jobs", ids=list(job_ids))) if job_ids else []


async def own_doing_jobs(db: Store, connection: Connection, queue_worker_id: int) -> list[int]:
    """The jobs that are marked `doing` by this worker."""
    return await _column(db, connection, "own_doing", worker=queue_worker_id)


async def own_stray_jobs(
    db: Store,
    connection: Connection,
    queue_worker_id: int,
    running_job_ids: Collection[int],
    seen: Collection[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Delete `doing` jobs of a live worker that it isn't running: (deleted, strays left for the next look).

    A job that is being fetched this moment looks stray too, so only what was stray in the look before, `seen`, goes.
    """
    strays = set(await own_doing_jobs(db, connection, queue_worker_id)) - set(running_job_ids)
    deleted = await delete_jobs(db, connection, sorted(strays if seen is None else strays & set(seen)))
    return deleted, sorted(strays - set(deleted))


# ---------------------------------------------------------------- timers


async def enqueue_due(db: Store, connection: Connection, limit: int = 100) -> int:
    """Give each due run its continuation; returns how many got one. As many as `limit`: there may be more."""
    return int(await _value(db, connection, "enqueue_due", limit=limit))


async def next_wake(db: Store, connection: Connection, since: datetime) -> datetime | None:
    """The earliest time after `since` at which a run is due, on the engine's clock."""
    when: datetime | None = await _value(db, connection, "next_wake", since=since)
    return when


# ---------------------------------------------------------------- messages that nobody read


async def unread(db: Store, connection: Connection, limit: int = 100) -> list[uuid.UUID]:
    """Runs with a message that nobody has read for a second, whose row is free and for which no doorbell waits."""
    return await _column(db, connection, "unread", limit=limit)


async def ring(db: Store, connection: Connection, run_id: uuid.UUID) -> bool:
    """Ring for a message that is committed already: collapses with other such rings. False: there is no such run."""
    return bool(await _value(db, connection, "ring", id=run_id))


async def unread_of(db: Store, connection: Connection, run_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    """Which of these runs (a worker's claimed ones) have new messages."""
    return set(await _column(db, connection, "unread_of", ids=list(run_ids))) if run_ids else set()


async def settle_unread(db: Store, connection: Connection, limit: int = 1_000) -> int:
    """Mark messages that came too late, for runs that have ended or are gone, so that `unread` need not pass them."""
    return int(await _value(db, connection, "settle", limit=limit))


# ---------------------------------------------------------------- runs without a job

FIRST: Final = uuid.UUID(int=0)


async def orphans(
    db: Store, connection: Connection, after: uuid.UUID | None = None, limit: int = 1_000
) -> tuple[list[tuple[uuid.UUID, int]], uuid.UUID | None]:
    """One page of the walk over all runnable runs: ((id, revision) of those that look orphaned, where to go on).

    One look proves nothing: a live burst's row is free for moments. Look again 250 ms later, then `adopt` what both
    found at the same revision. None: the walk is through.
    """
    rows = await _rows(db, connection, "orphans", after=after or FIRST, limit=limit)
    return [(row["id"], row["revision"]) for row in rows if row["id"] is not None], rows[0]["last"]


async def adopt(db: Store, connection: Connection, run_id: uuid.UUID, revision: int) -> bool:
    """Give an orphan its continuation. False: somebody holds it, it has moved on, or it has a job by now."""
    return bool(await _value(db, connection, "adopt", id=run_id, revision=revision))


async def has_job(db: Store, connection: Connection, run_id: uuid.UUID, revision: int) -> bool:
    """Whether a continuation for this revision waits in the queue, or a live worker has a job of the run."""
    return bool(await _value(db, connection, "has_job", id=run_id, revision=revision))


async def waiting_for_definition(
    db: Store, connection: Connection, known: Iterable[tuple[str, str]], limit: int = 100
) -> list[Due]:
    """Runs parked for want of a definition that this process has: for a worker that takes them up itself."""
    return [_due(row) for row in await _rows(db, connection, "known", names=missing_names(known), limit=limit)]


async def enqueue_known(db: Store, connection: Connection, known: Iterable[tuple[str, str]], limit: int = 100) -> int:
    """Give those runs their continuation, which any worker of the queue may take; returns how many."""
    return int(await _value(db, connection, "enqueue_known", names=missing_names(known), limit=limit))


def missing_name(workflow: str, version: str | None) -> str:
    """The `waiting_name` of a run that waits for this definition; version None: any version serves."""
    return f"{workflow}@{version or ''}"


def missing_names(known: Iterable[tuple[str, str]]) -> list[str]:
    """Every `waiting_name` that these definitions answer."""
    return sorted({name for workflow, version in known for name in (f"{workflow}@{version}", f"{workflow}@")})


# ---------------------------------------------------------------- who waits for an end


async def register_waiter(db: Store, connection: Connection, run_id: uuid.UUID, waiter: uuid.UUID) -> None:
    """Ask to be told of the run's end. LISTEN first, read the status afterwards."""
    await _rows(db, connection, "register_waiter", id=run_id, waiter=waiter)


async def drop_stale_waiters(db: Store, connection: Connection) -> int:
    """Delete registrations older than an hour, whose waiters are gone; one that still polls is not hurt."""
    return int(await _value(db, connection, "drop_stale_waiters"))


async def drop_stale_progress(db: Store, connection: Connection) -> int:
    """Delete reports of progress that nobody has renewed for a day."""
    return int(await _value(db, connection, "drop_stale_progress"))


# ---------------------------------------------------------------- purge


async def purge(db: Store, connection: Connection, older_than: timedelta, limit: int = 100) -> int:
    """Delete up to `limit` whole trees whose root ended longer ago; returns how many runs went. 0: none is left."""
    return int(await _value(db, connection, "purge", older_than=older_than, limit=limit))


# ---------------------------------------------------------------- how the statements are run


async def server_age(db: Store, connection: Connection) -> float:
    """Seconds since the server was started."""
    return float(await _value(db, connection, "server_age"))


async def move_clock(db: Store, connection: Connection, by: timedelta) -> None:
    """Put the engine's time ahead; for tests."""
    await _rows(db, connection, "move_clock", by=by)


async def idle(db: Store, connection: Connection, queue: str) -> bool:
    """Whether nothing can be done now: every run is finished or parked."""
    return bool(await _value(db, connection, "idle", queue=queue))


@lru_cache
def statements(schema: str) -> SweepSql:
    """The statements for one schema."""
    return SweepSql(schema)


async def _rows(db: Store, connection: Connection, name: str, **values: Any) -> list[dict[str, Any]]:
    query: bytes = getattr(statements(db.schema), name)
    # Planned anew each time, with its values in place: which plan is good depends on what there is to do at the moment.
    async with AsyncClientCursor(connection, row_factory=dict_row) as cursor:
        await cursor.execute(query, values | {"schema": db.schema})
        return await cursor.fetchall() if cursor.description else []


async def _column(db: Store, connection: Connection, name: str, **values: Any) -> list[Any]:
    return [next(iter(row.values())) for row in await _rows(db, connection, name, **values)]


async def _value(db: Store, connection: Connection, name: str, **values: Any) -> Any:
    found = await _column(db, connection, name, **values)
    return found[0] if found else None


def _due(row: Mapping[str, Any]) -> Due:
    return Due(**{**row, "status": Status(row["status"])})


def _dead_job(row: Mapping[str, Any]) -> DeadJob:
    return DeadJob(**{**row, "run_id": uuid.UUID(row["run_id"]) if row["run_id"] else None})
