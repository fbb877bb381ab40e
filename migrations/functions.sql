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
create function enqueue(
  p_task text, p_run uuid, p_revision bigint, p_queue text, p_priority int, p_delay interval default null
) returns void
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_ring constant boolean := p_task = 'durable.ring';
begin
  if p_task not in ('durable.advance', 'durable.compensate', 'durable.ring') or v_ring <> (p_revision is null) then
    raise exception 'no job % for revision %', p_task, coalesce(p_revision::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  insert into procrastinate_jobs (queue_name, task_name, priority, queueing_lock, args, scheduled_at)
  values (
    p_queue,
    p_task,
    greatest(-499999, least(499999, p_priority))
      + case when v_ring then 2000000 when p_revision > 0 then 1000000 else 0 end,
    case when not v_ring then format('%s:%s', p_run, p_revision) when p_delay is not null then 'ring:' || p_run end,
    jsonb_strip_nulls(jsonb_build_object('run_id', p_run, 'revision', p_revision)),
    clock_timestamp() + p_delay  -- the queue's time is the server's
  )
  on conflict (queueing_lock) where status = 'todo' do nothing;
end
$$;


-- Creates a run and its first job; with a delay no job: the run waits for its start. A deadline counts from there.
-- A used id, or key of this workflow, returns the run that has it. Two statements: after `on conflict do nothing` had
-- to wait for a rival, only a new statement sees what the rival committed. A child inherits its root.
-- p_input_hash says whether inputs are the same; a caller that has none passes ''.
create function start_run(
  p_id uuid, p_workflow text, p_version text, p_input json, p_input_hash text, p_queue text,
  p_key text default null, p_tags jsonb default '{}', p_priority int default 0,
  p_delay interval default null, p_timeout interval default null,
  p_parent uuid default null, p_parent_step text default null, p_root uuid default null,
  p_deadline timestamptz default null
) returns table (id uuid, created boolean, same boolean)
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := engine_now();
  v_delay constant interval := case when p_delay > interval '0' then p_delay end;
begin
  loop
    insert into runs (
      id, workflow, version, input, input_hash, queue, priority, key, tags, parent_id, parent_step, root_id,
      waiting_for, wake_at, deadline, created_at
    ) values (
      p_id, p_workflow, p_version, p_input, p_input_hash, p_queue, p_priority, p_key, p_tags, p_parent, p_parent_step,
      coalesce(p_root, (select r.root_id from runs r where r.id = p_parent), p_parent, p_id),
      case when v_delay is not null then 'start' end,
      v_now + v_delay,
      coalesce(p_deadline, v_now + coalesce(v_delay, interval '0') + p_timeout),
      v_now
    )
    on conflict do nothing;
    if found then
      insert into events (run_id, kind, at) values (p_id, 'created', v_now);
      if v_delay is null then
        perform enqueue('durable.advance', p_id, 0, p_queue, p_priority);
      end if;
      return query select p_id, true, true;
      return;
    end if;
    return query
      select r.id, false,
        r.workflow = p_workflow and r.version = p_version and (r.input_hash = p_input_hash or p_input_hash = '')
      from runs r
      where r.id = p_id or (r.workflow = p_workflow and r.key = p_key)
      order by r.id <> p_id
      limit 1;
    exit when found;  -- else it was purged in between
  end loop;
end
$$;


-- Many runs at once: an array of objects with the arguments of start_run, without their p_. Answers in its order, but
-- inserts in the order of the keys: two calls that share keys then wait for each other, instead of for ever.
create function start_runs(p_runs json) returns table (id uuid, created boolean, same boolean)
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
#variable_conflict use_column
begin
  return query
    with given as materialized (
      select s.*, e.place
      from json_array_elements(p_runs) with ordinality as e (run, place),
        json_to_record(e.run) as s (
          id uuid, workflow text, version text, input json, input_hash text, queue text, key text, tags jsonb,
          priority int, delay interval, timeout interval
        )
      order by s.workflow, s.key nulls first, s.id
    ),
    started as materialized (
      select g.place, r.*
      from given g,
        start_run(
          g.id, g.workflow, g.version, coalesce(g.input, 'null'), g.input_hash, g.queue, g.key, coalesce(g.tags, '{}'),
          coalesce(g.priority, 0), g.delay, g.timeout
        ) r
    )
    select s.id, s.created, s.same from started s order by s.place;
end
$$;


-- Puts a message into a run's inbox, and rings. Answers `sent`, `duplicate` (this id was sent to it before),
-- `finished` or `unknown`. Reads the status without a lock, so that it never waits for an executing step: a message
-- that crosses the run's end stays in the inbox. An ended run takes nothing; a completed one can be rolled back.
create function send_message(
  p_run uuid, p_kind text, p_name text default null, p_body json default null, p_message_id text default null
) returns text
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
declare
  v_run record;
begin
  select r.status, r.queue, r.priority, r.claim_token is not null as claimed into v_run from runs r where r.id = p_run;
  if not found then
    return 'unknown';
  end if;
  if v_run.status in ('completed', 'failed', 'canceled') and (v_run.status, p_kind) <> ('completed', 'rollback') then
    perform from inbox i where i.run_id = p_run and i.message_id = p_message_id;
    return case when found then 'duplicate' else 'finished' end;
  end if;
  insert into inbox (run_id, kind, name, body, message_id, sent_at)
  values (p_run, p_kind, p_name, p_body, p_message_id, engine_now())
  on conflict (run_id, message_id) do nothing;
  if not found then
    return 'duplicate';
  end if;
  perform enqueue('durable.ring', p_run, null, v_run.queue, v_run.priority);
  if v_run.claimed or p_kind in ('cancel', 'pause', 'resume', 'rollback') then
    perform pg_notify('{schema}_control', p_run::text);
  end if;
  return 'sent';
end
$$;


-- Sends a signal only to a run that waits for exactly this name now: `accepted`, else `refused`, `busy` (somebody held
-- the row for a second) or `unknown`, and nothing is written. The inbox is read after the lock, in a statement of its
-- own: a signal that no holder has taken yet answers one of the waits.
create function resume_wait(p_run uuid, p_name text, p_body json default null) returns text
language plpgsql volatile
set search_path = {schema}, pg_temp
set lock_timeout = '1s'
as $$
declare
  v_run record;
  v_waits int;
begin
  begin
    select r.status, r.claim_token is not null as claimed, r.frame into v_run
    from runs r where r.id = p_run for update;
  exception when lock_not_available then
    return 'busy';
  end;
  if not found then
    return 'unknown';
  end if;
  if not (v_run.status in ('suspended', 'paused') or (v_run.status = 'running' and v_run.claimed)) then
    return 'refused';
  end if;
  select count(*) into v_waits
  from jsonb_each(v_run.frame) as step (id, begun)
  where begun ->> 'waits' in ('signal', 'resume') and begun ->> 'name' = p_name
    -- what is accepted must be taken: a message that comes after the wait's time is not
    and coalesce((begun ->> 'deadline')::timestamptz > engine_now() + interval '50 ms', true);
  if v_waits <= (
    select count(*) from inbox i
    where i.run_id = p_run and i.kind = 'signal' and i.name = p_name and i.state <> 'taken'
  ) then
    return 'refused';
  end if;
  return case when send_message(p_run, 'signal', p_name, p_body) = 'sent' then 'accepted' else 'refused' end;
end
$$;


-- Ends the caller's transaction with a name that durable.store.errors knows: a guard that also works in the middle of a
-- pipeline, where nobody reads a result before COMMIT is on its way. Never returns.
create function refuse(p_constraint text, p_message text) returns bigint
language plpgsql volatile
set search_path = {schema}, pg_temp
as $$
begin
  raise exception '%', p_message using errcode = 'integrity_constraint_violation', constraint = p_constraint;
end
$$;


-- The same table as durable.values.MOVES; a test compares them.
create function check_move() returns trigger
language plpgsql
set search_path = {schema}, pg_temp
as $$
begin
  if (old.status, new.status) not in (
    ('pending', 'running'), ('pending', 'suspended'), ('pending', 'paused'), ('pending', 'completed'),
    ('pending', 'failed'), ('pending', 'canceled'),
    ('running', 'suspended'), ('running', 'paused'), ('running', 'compensating'), ('running', 'completed'),
    ('running', 'failed'), ('running', 'canceled'),
    ('suspended', 'running'), ('suspended', 'paused'), ('suspended', 'compensating'), ('suspended', 'completed'),
    ('suspended', 'failed'), ('suspended', 'canceled'),
    ('paused', 'running'), ('paused', 'suspended'), ('paused', 'compensating'), ('paused', 'failed'),
    ('paused', 'canceled'),
    ('compensating', 'running'), ('compensating', 'failed'), ('compensating', 'canceled'),
    ('failed', 'running'),
    ('completed', 'compensating')
  ) then
    raise exception 'run %: no move from % to %', old.id, old.status, new.status
      using errcode = 'check_violation', constraint = 'runs_legal_move', table = 'runs', schema = tg_table_schema;
  end if;
  return new;
end
$$;

create trigger runs_legal_move before update of status on runs
for each row when (old.status is distinct from new.status)
execute function check_move();
