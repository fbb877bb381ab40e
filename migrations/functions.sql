-- What anyone may do to a run from any connection: start one, send it a message, resume a wait. One function each, in
-- the caller's own transaction. They look names up in their own schema alone, whatever the caller's search_path is.
--
-- The rules that keep wake-ups from getting lost live here:
--   * nothing here locks a run, except resume_wait, which waits for it a second at most;
--   * a message and its doorbell are written together, and the doorbell is never deduplicated;
--   * procrastinate's `lock` is never used.
--
-- {schema} is replaced by the name of the schema. Frozen with revision 0001: a later revision replaces functions itself.


-- The engine's time: the server's clock, plus what tests have put it ahead. Moves on within a transaction.
create function engine_now() returns timestamptz
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
begin
  return clock_timestamp() + ahead from clock;
end
$$;


-- Wakes a worker for a run. `durable.advance` and `durable.compensate` are continuations: for one revision, enqueued
-- only under the run's row lock. `durable.ring` is a doorbell: it says "look into the inbox". Only a ring with a delay
-- (the row was busy) collapses with others, for its message lies in the inbox already.
-- Doorbells go before continuations, these before new runs; p_priority is the user's, and orders within each band.
-- A worker that takes the job up itself is p_quiet: commits that notify wait for each other. p_worker (procrastinate's
-- id of it) is one that begins with the commit: for it the job is as if fetched, and nobody else sees it. Answers the
-- job's id, null if another one waits already.
create function enqueue(
  p_task text, p_run uuid, p_revision bigint, p_queue text, p_priority int, p_delay interval default null,
  p_quiet boolean default false, p_worker bigint default null
) returns bigint
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_ring constant boolean := p_task = 'durable.ring';
  v_job bigint;
begin
  if p_task not in ('durable.advance', 'durable.compensate', 'durable.ring') or v_ring <> (p_revision is null) then
    raise exception 'no job % for revision %', p_task, coalesce(p_revision::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  insert into procrastinate_jobs (
    queue_name, task_name, priority, queueing_lock, args, scheduled_at, status, worker_id
  ) values (
    p_queue,
    p_task,
    greatest(-499999, least(499999, p_priority))
      + case when v_ring then 2000000 when p_revision > 0 then 1000000 else 0 end,
    case when not v_ring then p_run || ':' || p_revision when p_delay is not null then 'ring:' || p_run end,
    case when v_ring then jsonb_build_object('run_id', p_run)
      else jsonb_build_object('run_id', p_run, 'revision', p_revision) end,
    clock_timestamp() + p_delay,  -- the queue's time is the server's
    case when p_worker is null then 'todo' else 'doing' end::procrastinate_job_status,
    p_worker
  )
  on conflict (queueing_lock) where status = 'todo' do nothing
  returning id into v_job;
  if found and p_worker is null and not p_quiet and (p_delay is null or p_delay <= interval '0') then
    perform wake_workers(p_queue);
  end if;
  return v_job;
end
$$;


-- Tells the workers of a queue to look for jobs. All that one transaction enqueues is announced once.
create function wake_workers(p_queue text) returns void
language sql volatile
as $$
select pg_notify('procrastinate_queue_v1#' || p_queue, '{"type": "job_inserted", "job_id": 0}')
$$;


-- The run in which a chain of continue_as_new that goes through this one ends now: itself, if it has no successor.
-- Takes no lock: the end may have gone on when the answer is there.
create function chain_end(p_run uuid) returns uuid
language plpgsql stable
set search_path = {schema}, pg_temp
as $$
declare
  v_id uuid := p_run;
  v_next uuid := p_run;
begin
  while v_next is not null loop
    v_id := v_next;
    select r.successor into v_next from runs r where r.id = v_id;
  end loop;
  return v_id;
end
$$;


-- Whether a message with this id was sent to one of the runs that this one went on from.
create function sent_before(p_run uuid, p_message_id text) returns boolean
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_id uuid := p_run;
begin
  loop
    select r.predecessor into v_id from runs r where r.id = v_id;
    exit when v_id is null;
    perform from inbox i where i.run_id = v_id and i.message_id = p_message_id;
    if found then
      return true;
    end if;
  end loop;
  return false;
end
$$;


-- Creates a run and its first job; with a delay no job: the run waits for its start. A deadline counts from there.
-- A used id, or key of this workflow, returns the run that has it: a used key the end of its chain, of which the first
-- run was asked for. Two statements: after `on conflict do nothing` had to wait for a rival, only a new statement sees
-- what the rival committed. A child inherits its root, a successor the chain of its predecessor.
-- p_input_hash says whether inputs are the same; a caller that has none passes ''. p_worker begins with the run itself,
-- if it is a new one without a delay: see enqueue; `job` is what it has in hand then.
create function start_run(
  p_id uuid, p_workflow text, p_version text, p_input json, p_input_hash text, p_queue text,
  p_key text default null, p_tags jsonb default '{}', p_priority int default 0,
  p_delay interval default null, p_timeout interval default null,
  p_parent uuid default null, p_parent_step text default null, p_root uuid default null,
  p_deadline timestamptz default null, p_predecessor uuid default null, p_worker bigint default null
) returns table (id uuid, created boolean, same boolean, job bigint)
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := engine_now();
  v_delay constant interval := case when p_delay > interval '0' then p_delay end;
  v_job bigint;
begin
  loop
    insert into runs (
      id, workflow, version, input, input_hash, queue, priority, key, tags, parent_id, parent_step, root_id,
      waiting_for, wake_at, deadline, chain, predecessor, created_at
    ) values (
      p_id, p_workflow, p_version, p_input, p_input_hash, p_queue, p_priority, p_key, p_tags, p_parent, p_parent_step,
      coalesce(p_root, (select r.root_id from runs r where r.id = p_parent), p_parent, p_id),
      case when v_delay is not null then 'start' end,
      v_now + v_delay,
      coalesce(p_deadline, v_now + coalesce(v_delay, interval '0') + p_timeout),
      (select coalesce(r.chain, r.id) from runs r where r.id = p_predecessor), p_predecessor,
      v_now
    )
    on conflict do nothing;
    if found then
      if v_delay is null then
        v_job := enqueue('durable.advance', p_id, 0, p_queue, p_priority, p_worker => p_worker);
      end if;
      return query select p_id, true, true, case when p_worker is not null then v_job end;
      return;
    end if;
    return query
      select r.id, false,
        r.workflow = p_workflow and coalesce(first.version, r.version) = p_version
          and (r.input_hash = p_input_hash or p_input_hash = ''),
        null::bigint
      from runs r left join runs first on first.id = r.chain
      where r.id = p_id or (r.workflow = p_workflow and r.key = p_key and r.successor is null)
      order by r.id <> p_id
      limit 1;
    exit when found;  -- else it was purged in between
  end loop;
end
$$;


-- Many runs at once: an array of objects with the arguments of start_run, without their p_. Answers in its order, but
-- inserts in the order of the keys: two calls that share keys then wait for each other, instead of for ever. What could
-- not be inserted with the others goes through start_run, which says what is there.
create function start_runs(p_runs json) returns table (id uuid, created boolean, same boolean)
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := engine_now();
  v_made uuid[];
  v_queues text[];
begin
  with given as (
    select s.*, e.place, case when s.delay > interval '0' then s.delay end as waits
    from json_array_elements(p_runs) with ordinality as e (run, place),
      json_to_record(e.run) as s (
        id uuid, workflow text, version text, input json, input_hash text, queue text, key text, tags jsonb,
        priority int, delay interval, timeout interval
      )
  ), made as (
    insert into runs (
      id, workflow, version, input, input_hash, queue, priority, key, tags, root_id, waiting_for, wake_at, deadline,
      created_at
    )
    select g.id, g.workflow, g.version, coalesce(g.input, 'null'), g.input_hash, g.queue, coalesce(g.priority, 0),
      g.key, coalesce(g.tags, '{}'), g.id, case when g.waits is not null then 'start' end, v_now + g.waits,
      v_now + coalesce(g.waits, interval '0') + g.timeout, v_now
    from given g
    order by g.workflow, g.key nulls first, g.id, g.place
    on conflict do nothing
    returning id, queue, priority, waiting_for
  ), jobs as (
    insert into procrastinate_jobs (queue_name, task_name, priority, queueing_lock, args)
    select m.queue, 'durable.advance', greatest(-499999, least(499999, m.priority)), m.id || ':' || 0,
      jsonb_build_object('run_id', m.id, 'revision', 0)
    from made m where m.waiting_for is null
    on conflict (queueing_lock) where status = 'todo' do nothing
    returning queue_name
  )
  select coalesce(array_agg(m.id), '{}'), (select array_agg(distinct j.queue_name) from jobs j)
  into v_made, v_queues from made m;
  perform wake_workers(q) from unnest(v_queues) q;

  return query
    with given as materialized (
      select s.*, e.place, s.id = any (v_made)
        and row_number() over (partition by s.id order by s.workflow, s.key nulls first, e.place) = 1 as made
      from json_array_elements(p_runs) with ordinality as e (run, place),
        json_to_record(e.run) as s (
          id uuid, workflow text, version text, input json, input_hash text, queue text, key text, tags jsonb,
          priority int, delay interval, timeout interval
        )
      order by s.workflow, s.key nulls first, s.id
    ),
    found as materialized (
      select g.place, r.*
      from given g,
        start_run(
          g.id, g.workflow, g.version, coalesce(g.input, 'null'), g.input_hash, g.queue, g.key, coalesce(g.tags, '{}'),
          coalesce(g.priority, 0), g.delay, g.timeout
        ) r
      where not g.made
    )
    select coalesce(f.id, g.id), coalesce(f.created, true), coalesce(f.same, true)
    from given g left join found f on f.place = g.place
    order by g.place;
end
$$;


-- Puts a message into a run's inbox, and rings. Answers `sent`, `duplicate` (this id was sent to it before),
-- `finished` or `unknown`. Reads the status without a lock, so that it never waits for an executing step: a message
-- that crosses the run's end stays in the inbox. An ended run takes nothing; a completed one can be rolled back.
-- What is sent to a run that went on as new goes to the end of its chain, and an id counts once in the whole of it. What
-- a child answers does not: it is for the run that asked. `run` is where it went.
-- p_worker answers the doorbell itself, if it serves the run's queue: see enqueue. `job` is what it has in hand then.
create function post_message(
  p_run uuid, p_kind text, p_name text, p_body json, p_message_id text, p_wants_reply boolean default false,
  p_worker bigint default null, p_queue text default null, out answer text, out run uuid, out job bigint
)
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_run record;
  v_worker bigint;
begin
  run := p_run;
  loop
    select r.status, r.queue, r.priority, r.claim_token is not null as claimed, r.predecessor, r.successor into v_run
    from runs r where r.id = run;
    if not found then
      answer := 'unknown';
      return;
    end if;
    exit when v_run.successor is null or p_kind = 'child';
    run := v_run.successor;
  end loop;
  if p_message_id is not null and v_run.predecessor is not null and sent_before(run, p_message_id) then
    answer := 'duplicate';
    return;
  end if;
  if v_run.status in ('completed', 'failed', 'canceled') and (v_run.status, p_kind) <> ('completed', 'rollback') then
    perform from inbox i where i.run_id = run and i.message_id = p_message_id;
    answer := case when found then 'duplicate' else 'finished' end;
    return;
  end if;
  insert into inbox (run_id, kind, name, body, message_id, wants_reply, sent_at)
  values (run, p_kind, p_name, p_body, p_message_id, p_wants_reply, engine_now())
  on conflict (run_id, message_id) do nothing;
  if not found then
    answer := 'duplicate';
    return;
  end if;
  answer := 'sent';
  if v_run.queue = p_queue then
    v_worker := p_worker;
  end if;
  job := enqueue('durable.ring', run, null, v_run.queue, v_run.priority, p_worker => v_worker);
  if v_worker is null then
    job := null;
  end if;
  if v_run.claimed or p_kind in ('cancel', 'pause', 'resume', 'rollback') then
    perform pg_notify('{schema}_control', run::text);
  end if;
end
$$;


-- The same for whoever is no worker: what was sent.
create function send_message(
  p_run uuid, p_kind text, p_name text default null, p_body json default null, p_message_id text default null,
  p_wants_reply boolean default false
) returns text
language sql volatile
set search_path = {schema}, pg_temp
as $$
  select answer from post_message(p_run, p_kind, p_name, p_body, p_message_id, p_wants_reply)
$$;


-- Sends on, to the end of its chain, what came to a run after it went on as new: the sender had looked before, and the
-- doorbell of its message finds the run ended. To be called under the run's lock, which keeps the doorbells apart. Rings
-- there, and answers how many went on. One whose id the chain has had meanwhile is dropped.
create function forward_messages(p_run uuid) returns int
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_to constant uuid := chain_end(p_run);
  v_message inbox;
  v_sent int := 0;
begin
  if v_to = p_run then
    return 0;
  end if;
  for v_message in
    with late as (
      delete from inbox i where i.run_id = p_run and i.state <> 'taken' and i.kind <> 'child' returning i.*
    )
    select * from late order by seq
  loop
    continue when v_message.message_id is not null and sent_before(v_to, v_message.message_id);
    v_message.run_id := v_to;
    v_message.state := 'new';
    insert into inbox overriding system value values (v_message.*) on conflict (run_id, message_id) do nothing;
    if found then
      v_sent := v_sent + 1;
    end if;
  end loop;
  if v_sent > 0 then
    perform enqueue('durable.ring', r.id, null, r.queue, r.priority) from runs r where r.id = v_to;
    perform pg_notify('{schema}_control', v_to::text);
  end if;
  return v_sent;
end
$$;


-- Sends a signal only to a run that waits for exactly this name now: `accepted`, else `refused`, `busy` (somebody held
-- the row for a second) or `unknown`, and nothing is written. The inbox is read after the lock, in a statement of its
-- own: a signal that no holder has taken yet answers one of the waits. A wait has one name, or a list of them: an empty
-- one takes any. Of a chain its end is asked; one that goes on meanwhile waits for nothing yet.
create function resume_wait(p_run uuid, p_name text, p_body json default null) returns text
language plpgsql volatile
set search_path = {schema}, pg_temp
set lock_timeout = '1s'
as $$
declare
  v_id constant uuid := chain_end(p_run);
  v_run record;
  v_accepts boolean;
begin
  begin
    select r.status, r.claim_token is not null as claimed, r.frame into v_run
    from runs r where r.id = v_id for update;
  exception when lock_not_available then
    return 'busy';
  end;
  if not found then
    return 'unknown';
  end if;
  if not (v_run.status in ('suspended', 'paused') or (v_run.status = 'running' and v_run.claimed)) then
    return 'refused';
  end if;
  with waits as materialized (
    select begun ->> 'name' as name, begun -> 'names' as names
    from jsonb_each(v_run.frame) as step (id, begun)
    where begun ->> 'waits' in ('signal', 'resume')
      and (begun ->> 'name' = p_name or begun -> 'names' ? p_name or begun -> 'names' = '[]')
      -- what is accepted must be taken: a message that comes after the wait's time is not
      and coalesce((begun ->> 'deadline')::timestamptz > engine_now() + interval '50 ms', true)
  ), unread as (  -- each may satisfy one of them before this one does
    select from inbox i
    where i.run_id = v_id and i.kind = 'signal' and i.state <> 'taken'
      and exists (select from waits w where w.name = i.name or w.names ? i.name or w.names = '[]')
  )
  select (select count(*) from waits) > (select count(*) from unread) into v_accepts;
  if not v_accepts then
    return 'refused';
  end if;
  return case when send_message(v_id, 'signal', p_name, p_body) = 'sent' then 'accepted' else 'refused' end;
end
$$;


-- Ends the caller's transaction with a name that durable.store.errors knows: a guard that also works in the middle of a
-- pipeline, where nobody reads a result before COMMIT is on its way. Never returns; a uuid, to stand for a run's id.
create function refuse(p_constraint text, p_message text) returns uuid
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
begin
  raise exception '%', p_message using errcode = 'integrity_constraint_violation', constraint = p_constraint;
end
$$;


-- The top-level step that a step id stands in: `poll` of `poll[2]/charge`, `target` of `choice:target`.
create function step_root(p_step text) returns text
language sql immutable
set search_path = {schema}, pg_temp
as $$
select substring(regexp_replace(p_step, '^(choice|input):', '') from '^[^/[]+')
$$;


-- A new run of the same workflow, with a copy of a run's journal up to a step: that step, or the top-level step that it
-- stands in, begins anew; without p_step, everything does. Answers `forked`; or why not, and then nothing is written:
-- `unknown`, `no_step` (with the steps there are), `undone` (with the steps before it that were), `rolled_back` (it
-- went back to a checkpoint before it came to p_step).
-- Takes no lock: one look settles where the copy ends, and nothing is written before what stands there. A caller that
-- has no hash of p_input passes none.
create function fork_run(
  p_run uuid, p_id uuid, p_step text default null, p_input json default null, p_input_hash text default null
) returns table (answer text, steps text[])
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_root constant text := step_root(p_step);
  v_origin runs;
  v_found record;
  v_end bigint;  -- what has a smaller seq is copied
  v_undone text[];
begin
  select r.* into v_origin from runs r where r.id = p_run;
  if not found then
    return query select 'unknown', null::text[];
    return;
  end if;

  if p_step is null then
    v_end := 0;
  else
    with begun as (
      select step_root(j.step_id) as root, j.seq
      from journal j
      where j.run_id = p_run and j.kind not in ('undo', 'result', 'rollback', 'patch')
      union all
      select step_root(step), null
      from jsonb_object_keys(v_origin.frame) step
      where step not like 'undo:%' and step not like 'run:%'
    ),
    roots as (
      select b.root, min(b.seq) as first from begun b group by b.root
    )
    select
      bool_or(r.root = v_root) as there,
      min(r.first) filter (where r.root = v_root) as first,
      (select max(j.seq) from journal j where j.run_id = p_run) as last,
      array_agg(r.root order by r.first nulls last, r.root) as roots
    into v_found
    from roots r;
    if v_found.there is not true then
      return query select 'no_step', coalesce(v_found.roots, '{}');
      return;
    end if;
    v_end := coalesce(v_found.first, v_found.last + 1, 0);
    perform from journal j where j.run_id = p_run and j.kind = 'rollback' and j.seq < v_end;
    if found then
      return query select 'rolled_back', null::text[];
      return;
    end if;
    select array_agg(j.step_id order by j.seq) into v_undone
    from journal j join journal undo on undo.run_id = j.run_id and undo.step_id = 'undo:' || j.step_id
    where j.run_id = p_run and j.seq < v_end and step_root(j.step_id) <> v_root;
    if v_undone is not null then
      return query select 'undone', v_undone;
      return;
    end if;
  end if;

  insert into journal (  -- seq: before all that is written at revision 1
    run_id, step_id, seq, kind, status, result, error, attempt, parent, extra, started_at, finished_at
  )
  select p_id, j.step_id, row_number() over (order by j.seq), j.kind, j.status, j.result, j.error, j.attempt, j.parent,
    coalesce(j.extra, '{}') || '{"copied": true}', j.started_at, j.finished_at
  from journal j
  where j.run_id = p_run and j.seq < v_end and j.status <> 'suspended' and j.kind not in ('undo', 'result')
    and step_root(j.step_id) <> v_root;

  insert into runs (  -- revision 0 would be a run that nothing has happened to
    id, revision, workflow, version, input, input_hash, queue, priority, tags, root_id, current_step, seed, forked_from,
    created_at
  ) values (
    p_id, 1, v_origin.workflow, v_origin.version, coalesce(p_input, v_origin.input),
    case when p_input is null then v_origin.input_hash else coalesce(p_input_hash, '') end,
    v_origin.queue, v_origin.priority, v_origin.tags, p_id,
    (
      select count(*) from journal j
      where j.run_id = p_id and j.parent is null and j.kind not in ('choice', 'patch')
    ),
    coalesce(v_origin.seed, v_origin.id), p_run, engine_now()
  );
  insert into events (run_id, kind, data, at)
  values (
    p_id, 'created', json_strip_nulls(json_build_object('forked_from', p_run, 'from_step', p_step)), engine_now()
  );
  perform enqueue('durable.advance', p_id, 1, v_origin.queue, v_origin.priority);
  return query select 'forked', null::text[];
end
$$;


-- What must hold of a run, by the names that durable.store.errors knows. A trigger, because constraints are evaluated at
-- each update: a step that goes on as the one before it writes none of the columns that this speaks of. A move is one
-- text: a list of pairs would be prepared anew in each transaction, pair by pair.
create function check_run() returns trigger
language plpgsql
set search_path = {schema}, pg_temp
as $$
declare
  v_ended constant boolean := new.status in ('completed', 'failed', 'canceled');
  v_broken text := case
    when new.status not in (
      'pending', 'running', 'suspended', 'paused', 'compensating', 'completed', 'failed', 'canceled'
    ) then 'runs_status_check'
    when new.waiting_for not in (
      'start', 'retry', 'sleep', 'signal', 'resume', 'child', 'rollback', 'definition', 'person'
    ) then 'runs_waiting_for_check'
    when v_ended <> (new.finished_at is not null) then 'runs_finished_check'
    when new.status = 'suspended' and new.waiting_for is null then 'runs_suspended_says_why_check'
    when v_ended and (new.wake_at is not null or new.waiting_for is not null) then 'runs_ended_waits_not_check'
    when (new.claim_worker is null) <> (new.claim_token is null) then 'runs_claim_check'
    when new.claim_token is not null and new.status not in ('pending', 'running', 'compensating')
      then 'runs_claimed_is_active_check'
    when new.status = 'compensating' and new.ending is null then 'runs_ending_check'
    when jsonb_typeof(new.tags) <> 'object' then 'runs_tags_check'
  end;
begin
  if v_broken is not null then
    raise exception 'run %: a row of runs breaks %', new.id, v_broken
      using errcode = 'check_violation', constraint = v_broken, table = 'runs', schema = tg_table_schema;
  end if;
  -- the same table as durable.values.MOVES; a test compares them
  if tg_op = 'UPDATE' and new.status <> old.status and old.status || ' to ' || new.status not in (
    'pending to running', 'pending to suspended', 'pending to paused', 'pending to compensating',
    'pending to completed', 'pending to failed', 'pending to canceled',
    'running to suspended', 'running to paused', 'running to compensating', 'running to completed',
    'running to failed', 'running to canceled',
    'suspended to running', 'suspended to paused', 'suspended to compensating', 'suspended to completed',
    'suspended to failed', 'suspended to canceled',
    'paused to running', 'paused to suspended', 'paused to compensating', 'paused to failed',
    'paused to canceled',
    'compensating to running', 'compensating to failed', 'compensating to canceled',
    'failed to running',
    'completed to compensating'
  ) then
    raise exception 'run %: no move from % to %', old.id, old.status, new.status
      using errcode = 'check_violation', constraint = 'runs_legal_move', table = 'runs', schema = tg_table_schema;
  end if;
  return new;
end
$$;

create trigger runs_check
before insert or update of
  status, waiting_for, wake_at, finished_at, claim_worker, claim_token, ending, tags
on runs for each row execute function check_run();


-- What must hold of an entry; one with no time of its own gets the present. Most are of a step that has completed, and
-- the rest is not looked at.
create function check_entry() returns trigger
language plpgsql
as $$
declare
  v_broken text;
begin
  if new.finished_at is null then
    new.finished_at := {schema}.engine_now();
  end if;
  if new.kind = 'step' and new.status = 'completed' then
    return new;
  end if;
  v_broken := case
    when new.kind not in (
      'step', 'parallel', 'route', 'loop', 'sleep', 'signal', 'child', 'branch', 'iteration', 'choice', 'undo',
      'result', 'block', 'join', 'race', 'map', 'receive', 'reply', 'checkpoint', 'rollback', 'patch'
    ) then 'journal_kind_check'
    when new.status not in ('completed', 'failed', 'suspended') then 'journal_status_check'
    when new.status = 'failed' and new.error is null then 'journal_failed_says_why_check'
  end;
  if v_broken is not null then
    raise exception 'run %: the entry of % breaks %', new.run_id, new.step_id, v_broken
      using errcode = 'check_violation', constraint = v_broken, table = 'journal', schema = tg_table_schema;
  end if;
  return new;
end
$$;

create trigger journal_check before insert or update on journal for each row execute function check_entry();
