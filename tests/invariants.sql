-- What holds of durable's tables, whatever crashed: every query returns the rows that violate it (run_id, detail).
--
--   `-- always: name`   at every committed moment
--   `-- at rest: name`  when nothing can be done now: every run has ended, or is parked for something that has not come
--
-- tests/invariants.py splits this file at those lines and runs each with the engine's schema as search_path. What the
-- tables' constraints hold already is here all the same: this page is meant to be read as the whole truth about them.
--
-- Builder and function runs are held to the same. Where they differ, derived entries tell them apart: what a body's
-- coroutines came to, its result included, was computed by no handler, and has no `started_at` (but for the last iteration
-- of a loop that remembers just that).

-- ==================================================================================== the run's row

-- always: the cursor counts the finished nodes, and a body's finished operations
-- (a child that was faster than the cancel of its parent is journaled by the rollback, which moves no cursor)
select r.id as run_id, format('current_step %s, finished nodes %s', r.current_step, j.nodes) as detail
from runs r, lateral (
  select count(*) as nodes, count(*) filter (where kind = 'child') as children from journal
  where run_id = r.id and parent is null and status = 'completed'
    and kind in ('step', 'parallel', 'route', 'loop', 'sleep', 'signal', 'child',
                 'block', 'join', 'race', 'map', 'receive', 'reply', 'checkpoint')
) j
where r.current_step <> j.nodes
  and not (r.ending is not null and j.children > 0 and j.nodes = r.current_step + 1)

-- always: a suspended run says why
select id as run_id, status as detail from runs where status = 'suspended' and waiting_for is null

-- always: a compensating run knows how it ends
select id as run_id, status as detail from runs where status = 'compensating' and ending is null

-- always: a run that has ended holds and awaits nothing
select id as run_id, format('%s: claim %s, frame %s, wake_at %s, waits for %s', status, claim_token, frame, wake_at,
                            waiting_for) as detail
from runs
where status in ('completed', 'failed', 'canceled')
  and (claim_token is not null or claim_worker is not null or frame <> '{}' or wake_at is not null
       or waiting_for is not null or pausing or finished_at is null)

-- always: a run that has not ended has no end
select id as run_id, format('%s, finished at %s', status, finished_at) as detail from runs
where status not in ('completed', 'failed', 'canceled') and finished_at is not null

-- always: a failed run says why
select id as run_id, status as detail from runs where status = 'failed' and error is null

-- always: a claimed run is active and not parked
select id as run_id, format('%s, waits for %s, worker %s', status, waiting_for, claim_worker) as detail from runs
where claim_token is not null
  and (status not in ('pending', 'running', 'compensating') or waiting_for is not null or claim_worker is null)

-- always: only a claimed run has steps that run without its row
select r.id as run_id, f.id as detail from runs r, jsonb_each(r.frame) as f (id, begun)
where r.claim_token is null and (f.begun ->> 'running')::boolean

-- always: what has finished is not in the frame
select r.id as run_id, f.id as detail from runs r, jsonb_each(r.frame) as f (id, begun)
join journal j on j.step_id = f.id
where j.run_id = r.id and j.status <> 'suspended'

-- always: nothing goes on in what is over
-- (what a race's losers had begun went with its end; the children of an ended map were canceled)
select r.id as run_id, format('%s in %s %s', f.id, j.kind, j.step_id) as detail
from runs r, jsonb_each(r.frame) as f (id, begun)
join journal j on starts_with(f.id, j.step_id || '/') or starts_with(f.id, j.step_id || '[')
where j.run_id = r.id and j.kind in ('block', 'join', 'race', 'loop', 'map', 'branch', 'iteration')

-- always: a run was started before anything of it was journaled
select r.id as run_id, r.status as detail from runs r
where r.started_at is null and exists (select from journal j where j.run_id = r.id)

-- ==================================================================================== continue_as_new

-- always: a chain is linked both ways, and what is the same in all of it is
select p.id as run_id, format('went on as %s: %s', p.successor, to_json(s)) as detail
from runs p left join runs s on s.id = p.successor
where p.successor is not null
  and (p.id, coalesce(p.chain, p.id), p.workflow, p.input_hash, p.key, p.root_id, p.parent_id, p.parent_step)
      is distinct from
      (s.predecessor, s.chain, s.workflow, s.input_hash, s.key, s.root_id, s.parent_id, s.parent_step)

-- always: a run that goes on from another is its only successor
select s.id as run_id, format('predecessor %s, chain %s', s.predecessor, s.chain) as detail
from runs s left join runs p on p.id = s.predecessor
where (s.predecessor is null) <> (s.chain is null) or s.predecessor is not null and p.successor is distinct from s.id

-- always: a run that went on as new has completed
select id as run_id, status as detail from runs where successor is not null and status <> 'completed'

-- ==================================================================================== the journal

-- always: iterations are in order
select run_id, format('%s: %s', parent, array_agg(extra ->> 'iteration' order by seq)) as detail from journal
where kind = 'iteration' and status = 'completed'
group by run_id, parent
having array_agg((extra ->> 'iteration')::int order by seq)
     <> array_agg((extra ->> 'iteration')::int order by (extra ->> 'iteration')::int)

-- always: iterations are contiguous
-- (of a function's loop the older ones are pruned, but for those with something to undo, each with the one before it)
select run_id, format('%s, then iteration %s', step_id, following) as detail
from (
  select *, (extra ->> 'iteration')::int as place,
         lead((extra ->> 'iteration')::int) over (partition by run_id, parent order by seq) as following
  from journal where kind = 'iteration' and status = 'completed'
) i
where following <> place + 1 and (started_at is not null or not exists (
  select from journal j
  where j.run_id = i.run_id and starts_with(j.step_id, i.step_id || '/') and (j.extra ->> 'undo')::boolean
))

-- always: what an iteration holds goes with it
select j.run_id, j.step_id as detail from journal j
join journal l on l.run_id = j.run_id and l.kind = 'loop' and starts_with(j.step_id, l.step_id || '[')
where not exists (
  select from journal i
  where i.run_id = j.run_id and i.parent = l.step_id and i.kind = 'iteration'
    and (j.step_id = i.step_id or starts_with(j.step_id, i.step_id || '/'))
) and l.status = 'completed'

-- always: an iteration is journaled under its number
select run_id, format('%s is iteration %s of %s', step_id, extra ->> 'iteration', parent) as detail from journal
where kind = 'iteration' and status = 'completed' and step_id <> format('%s[%s]', parent, extra ->> 'iteration')

-- always: the attempt that succeeded is the one after those that failed
-- (a pause for want of attempts, and `retry`, give fresh ones: such runs were resumed; so does a block's next attempt)
select j.run_id, format('%s: attempt %s after %s failed ones', j.step_id, j.attempt, a.failed) as detail
from journal j, lateral (
  select count(*) as failed from attempts where run_id = j.run_id and step_id = j.step_id and kind = 'failed'
) a
where j.status = 'completed' and j.kind in ('step', 'branch', 'iteration', 'choice', 'result', 'undo')
  and j.attempt <> 1 + a.failed
  and not exists (select from events e where e.run_id = j.run_id and e.kind = 'resumed')
  and not exists (select from attempts b where b.run_id = j.run_id and starts_with(j.step_id, b.step_id || '/'))

-- always: failed attempts are numbered without gaps
select run_id, format('%s: %s', step_id, array_agg(attempt order by seq)) as detail from attempts
where kind = 'failed' and not exists (select from events e where e.run_id = attempts.run_id and e.kind = 'resumed')
  and not exists (select from attempts b
                  where b.run_id = attempts.run_id and starts_with(attempts.step_id, b.step_id || '/'))
group by run_id, step_id
having min(attempt) <> 1 or max(attempt) <> count(*) or count(distinct attempt) <> count(*)

-- always: what ended did not end before it began
select run_id, format('%s: %s to %s', step_id, started_at, finished_at) as detail from journal
where started_at > finished_at

-- always: a completed run has no failed node
-- (a body may go on from a failure: a run whose result no handler computed, or which went on as new, was a function's)
select j.run_id, format('%s is %s', j.step_id, j.status) as detail from journal j join runs r on r.id = j.run_id
where r.status = 'completed' and j.status = 'failed' and j.kind <> 'undo' and r.successor is null
  and not exists (select from journal f where f.run_id = r.id and f.step_id = 'run:result' and f.started_at is null)

-- always: a completed run has no suspended step
-- (but what a rollback to a checkpoint, or the end of a race, left behind)
select j.run_id, j.step_id as detail from journal j join runs r on r.id = j.run_id
where r.status = 'completed' and j.status = 'suspended' and not exists (
  select from journal o
  where o.run_id = j.run_id and o.seq > j.seq
    and (o.kind = 'rollback' or o.kind = 'race' and starts_with(j.step_id, o.step_id || '/'))
)

-- always: what is over has all that belongs to it
-- (the entries of what a node, block, join, race, loop, branch or iteration holds come before its own, or with it)
select p.run_id, format('%s (seq %s) after %s (seq %s)', c.step_id, c.seq, p.step_id, p.seq) as detail
from journal p join journal c on c.run_id = p.run_id and c.parent = p.step_id
where c.kind not in ('undo', 'rollback') and p.status <> 'suspended' and c.seq > p.seq

-- always: a journal belongs to a run
select run_id, step_id as detail from journal where run_id not in (select id from runs)

-- ==================================================================================== the rollback

-- always: only finished entries are undone, after they finished
select u.run_id, u.step_id as detail from journal u
where u.kind = 'undo' and not exists (
  select from journal j
  where j.run_id = u.run_id and u.step_id = 'undo:' || j.step_id and j.status = 'completed' and j.seq < u.seq
)

-- always: what was done last is undone first
-- (within one rollback: a run that went back to a checkpoint may be rolled back anew)
select later.run_id, format('%s before %s', earlier.step_id, later.step_id) as detail
from journal earlier join journal later on later.run_id = earlier.run_id and later.seq > earlier.seq
join journal a on a.run_id = earlier.run_id and earlier.step_id = 'undo:' || a.step_id
join journal b on b.run_id = later.run_id and later.step_id = 'undo:' || b.step_id
where earlier.kind = 'undo' and later.kind = 'undo' and a.seq < b.seq and not exists (
  select from journal k
  where k.run_id = earlier.run_id and k.kind = 'rollback' and k.seq between earlier.seq and later.seq
)

-- always: the rollback's cursor stands on the entry that was undone last
select r.id as run_id, format('cursor %s, undone down to %s', r.undo_cursor, u.lowest) as detail
from runs r, lateral (
  select min(j.seq) as lowest from journal u join journal j on j.run_id = u.run_id and u.step_id = 'undo:' || j.step_id
  where u.run_id = r.id and u.kind = 'undo' and not exists (
    select from journal k where k.run_id = u.run_id and k.kind = 'rollback' and k.seq > u.seq
  )
) u
where r.undo_cursor is distinct from u.lowest

-- always: nothing goes forward once a rollback began
-- (one to a checkpoint ends there)
select j.run_id, format('%s (seq %s)', j.step_id, j.seq) as detail from journal j
where j.kind not in ('undo', 'child', 'rollback') and exists (
  select from journal u where u.run_id = j.run_id and u.kind = 'undo' and u.seq < j.seq and not exists (
    select from journal k where k.run_id = u.run_id and k.kind = 'rollback' and k.seq between u.seq and j.seq
  )
)

-- always: a rollback to a checkpoint undid what came after it, and nothing before it
select k.run_id, format('%s to %s: %s', k.step_id, c.step_id, j.step_id) as detail
from journal k
join journal c on c.run_id = k.run_id and c.step_id = k.extra ->> 'to'
join journal j on j.run_id = k.run_id and (j.extra ->> 'undo')::boolean and j.status = 'completed' and j.seq < k.seq
left join journal u on u.run_id = k.run_id and u.step_id = 'undo:' || j.step_id
where k.kind = 'rollback'
  and (j.seq > c.seq and (u.seq is null or u.seq > k.seq)
       or j.seq < c.seq and u.seq < k.seq
          and not exists (select from journal b where b.run_id = k.run_id and b.kind = 'rollback'
                          and b.seq between u.seq and k.seq - 1))

-- always: rollbacks to checkpoints are numbered, and each went to one that was passed
select k.run_id, format('%s to %s', k.step_id, k.extra ->> 'to') as detail
from (select *, row_number() over (partition by run_id order by seq) as number from journal where kind = 'rollback') k
where k.step_id <> 'rollback:' || k.number or (k.extra ->> 'epoch')::int <> k.number or not exists (
  select from journal c
  where c.run_id = k.run_id and c.step_id = k.extra ->> 'to' and c.kind = 'checkpoint' and c.seq < k.seq
)

-- ==================================================================================== the run's life

-- (that a run was created, started and completed is told by its row; there are events of it only where the row does not
-- say all: of what a fork was made, and when a run had completed that is rolled back)

-- always: a run was created once, and that came first
select r.id as run_id, format('created at %s, %s', r.created_at, array_agg((e.kind, e.at) order by e.seq)) as detail
from runs r left join events e on e.run_id = r.id
group by r.id
having count(*) filter (where e.kind = 'created') > 1
  or bool_or(e.kind = 'created') and (array_agg(e.kind order by e.seq))[1] <> 'created'
  or r.forked_from is not null and not coalesce(bool_or(e.kind = 'created' and e.data is not null), false)

-- always: a run was started once, if at all
select r.id as run_id, format('%s times, started_at %s', count(e.seq), r.started_at) as detail
from runs r left join events e on e.run_id = r.id and e.kind = 'started'
group by r.id
having count(e.seq) > case when r.started_at is null then 0 else 1 end

-- always: nothing happens to a run that was not started but a pause, or a cancel
select r.id as run_id, e.kind as detail from runs r join events e on e.run_id = r.id
where r.started_at is null and e.kind in ('suspended', 'compensating', 'completed', 'failed')

-- always: each event may follow the one before it
with lives as (
  select run_id, seq, kind, lag(kind) over (partition by run_id order by seq) as before from events
  where kind in ('created', 'started', 'suspended', 'paused', 'resumed', 'compensating', 'completed', 'failed', 'canceled')
)
select run_id, format('%s after %s', kind, before) as detail from lives
where before is null and kind = 'resumed' or before is not null and (before, kind) not in (
  ('created', 'started'), ('created', 'suspended'), ('created', 'paused'), ('created', 'compensating'),
  ('created', 'completed'), ('created', 'failed'), ('created', 'canceled'),
  ('started', 'suspended'), ('started', 'paused'), ('started', 'compensating'), ('started', 'completed'),
  ('started', 'failed'), ('started', 'canceled'),
  ('suspended', 'suspended'), ('suspended', 'paused'), ('suspended', 'compensating'), ('suspended', 'completed'),
  ('suspended', 'failed'), ('suspended', 'canceled'), ('suspended', 'started'),
  ('paused', 'resumed'), ('paused', 'compensating'), ('paused', 'failed'), ('paused', 'canceled'),
  ('resumed', 'started'), ('resumed', 'suspended'), ('resumed', 'paused'), ('resumed', 'compensating'),
  ('resumed', 'completed'), ('resumed', 'failed'), ('resumed', 'canceled'),
  ('compensating', 'failed'), ('compensating', 'canceled'), ('compensating', 'resumed'),
  ('completed', 'compensating'), ('failed', 'resumed')
)

-- always: events are in the order of their times, and none is older than its run
with lives as (
  select run_id, kind, at, lag(at) over (partition by run_id order by seq) as before from events
)
select r.id as run_id, format('%s at %s, after %s', e.kind, e.at, coalesce(e.before, r.created_at)) as detail
from runs r join lives e on e.run_id = r.id
where e.at < greatest(e.before, r.created_at)

-- always: the last event tells how a run ended, or that it has not
-- (of one that has completed there may be none, or what came before its end)
with last as (
  select distinct on (run_id) run_id, kind from events
  where kind in ('created', 'started', 'suspended', 'paused', 'resumed', 'compensating', 'completed', 'failed', 'canceled')
  order by run_id, seq desc
)
select r.id as run_id, format('status %s, last event %s', r.status, l.kind) as detail
from runs r left join last l on l.run_id = r.id
where (r.status in ('failed', 'canceled', 'paused', 'compensating') or
       l.kind in ('completed', 'failed', 'canceled', 'paused', 'compensating')) and r.status is distinct from l.kind

-- always: a run ended once, except by retry or by its parent's rollback
-- (a completion that stands has no event of its own, or that one is the last)
select r.id as run_id, format('%s ends, %s retries, %s', e.ends, r.retries, r.reason) as detail
from runs r, lateral (
  select count(*) filter (where kind <> 'compensating') + case
    when r.status = 'completed' and (array_agg(kind order by seq desc))[1] is distinct from 'completed' then 1 else 0
  end as ends
  from events where run_id = r.id and kind in ('completed', 'failed', 'canceled', 'compensating')
) e
where e.ends <> r.retries + case when r.finished_at is not null then 1 else 0 end
                + case when r.parent_id is not null and r.ending ->> 'answer_to' is not null then 1 else 0 end

-- ==================================================================================== the inbox

-- always: a message that was taken has its time, and only that
select run_id, format('%s %s is %s, taken at %s', kind, name, state, taken_at) as detail from inbox
where (state = 'taken') <> (taken_at is not null)

-- always: a message that was completed was taken, and has its answer and its time
select run_id, format('%s %s is %s, answered at %s: %s', kind, name, state, replied_at, reply) as detail from inbox
where (reply is null) <> (replied_at is null) or replied_at is not null and state <> 'taken'

-- always: a wait that was satisfied took one message of its name
select j.run_id, format('%s took %s', j.step_id, m.taken) as detail
from journal j, lateral (
  select count(*) as taken from inbox i
  where i.run_id = j.run_id and i.taken_by = j.step_id and i.state = 'taken' and i.kind = 'signal'
    and i.name = j.extra ->> 'signal'
) m
where j.kind = 'signal' and j.status = 'completed' and j.extra ->> 'timed_out' is null and m.taken <> 1

-- always: a receive took the messages that it yielded, or they were completed
-- (what was received to be completed waits for that untaken)
select j.run_id, format('%s received %s: %s by %s', j.step_id, m.seq, i.state, i.taken_by) as detail
from journal j, jsonb_array_elements_text(j.extra -> 'messages') as m (seq)
left join inbox i on i.seq = m.seq::bigint
where j.kind = 'receive' and j.status = 'completed' and (j.extra ->> 'copied') is null
  and (i.seq is null
       or i.run_id = j.run_id and i.taken_by is distinct from j.step_id and (i.state = 'taken') <> (i.replied_at is not null))

-- always: a message was received once
-- (again, if it was not completed before its run went back to a checkpoint)
select j.run_id, format('%s and %s received %s', j.step_id, k.step_id, m.seq) as detail
from journal j join journal k on k.run_id = j.run_id and k.kind = 'receive' and k.seq > j.seq,
  jsonb_array_elements_text(j.extra -> 'messages') as m (seq)
where j.kind = 'receive' and j.status = 'completed' and k.extra -> 'messages' @> m.seq::jsonb
  and not exists (select from journal b
                  where b.run_id = j.run_id and b.kind = 'rollback' and b.seq between j.seq and k.seq)

-- always: a message was completed as the body said
select j.run_id, format('%s: message %s is %s, %s', j.step_id, i.seq, i.state, i.reply) as detail
from journal j left join inbox i on i.run_id = j.run_id and i.seq = (j.extra ->> 'message')::bigint
where j.kind = 'reply' and j.status = 'completed' and (j.extra ->> 'copied') is null
  and (i.replied_at is null or i.state <> 'taken')

-- ==================================================================================== children

-- always: a child that is waited for exists, and is this run's
select r.id as run_id, format('%s: %s', f.id, f.begun ->> 'child') as detail
from runs r, jsonb_each(r.frame) as f (id, begun)
where f.begun ->> 'child' is not null and not exists (
  select from runs c where c.id = (f.begun ->> 'child')::uuid and c.parent_id = r.id and c.parent_step = f.id
    and c.root_id = r.root_id
)

-- always: a child that its parent knows as completed is that, or was rolled back by it
-- (of a child that went on as new, here and below, the end of its chain counts)
select j.run_id, format('%s: child %s is %s (%s)', j.step_id, c.id, c.status, c.reason) as detail
from journal j join runs c on coalesce(c.chain, c.id) = (j.extra ->> 'child')::uuid and c.successor is null
where j.kind = 'child' and j.status = 'completed' and c.status <> 'completed' and c.ending ->> 'answer_to' is null

-- always: a child has ended before its parent knows of it
select j.run_id, format('%s: child %s', j.step_id, j.extra ->> 'child') as detail from journal j
where j.kind = 'child' and not exists (select from runs c
                                       where coalesce(c.chain, c.id) = (j.extra ->> 'child')::uuid
                                       and c.successor is null
                                       and (c.finished_at is not null
                                            or exists (select from events e where e.run_id = c.id
                                                       and e.kind in ('completed', 'failed', 'canceled'))))

-- always: a child that ended has told its parent
-- (a parent that had ended before is told nothing)
select c.id as run_id, format('%s, parent %s is %s', c.status, p.id, p.status) as detail
from runs c join runs p on p.id = c.parent_id
where c.finished_at is not null and c.successor is null and (p.finished_at is null or p.finished_at > c.finished_at)
  and c.ending ->> 'answer_to' is null
  and not exists (select from inbox i where i.run_id = p.id and i.kind = 'child' and i.name = c.parent_step)

-- ==================================================================================== at rest

-- at rest: nobody has a claim
select id as run_id, format('%s, worker %s, %s', status, claim_worker, frame) as detail from runs
where claim_token is not null

-- at rest: no run could go on
select id as run_id, format('%s at step %s, revision %s, %s', status, current_step, revision, frame) as detail from runs
where status in ('pending', 'running', 'compensating') and waiting_for is null

-- at rest: nobody's time has come
select id as run_id, format('%s since %s', waiting_for, wake_at) as detail from runs
where wake_at <= engine_now() and status <> 'paused'

-- at rest: the queue is empty
select (args ->> 'run_id')::uuid as run_id, format('%s %s, %s', status, task_name, args) as detail
from procrastinate_jobs where status in ('todo', 'doing')

-- at rest: no finished job is kept
select (args ->> 'run_id')::uuid as run_id, format('%s %s, %s', status, task_name, args) as detail
from procrastinate_jobs where status not in ('todo', 'doing')

-- at rest: nobody waits for a signal that lies in its inbox
-- (one that was received, and is to be completed, is there for nobody else)
select r.id as run_id, format('%s waits for %s', f.id, f.begun ->> 'name') as detail
from runs r, jsonb_each(r.frame) as f (id, begun)
where r.status <> 'paused' and f.begun ->> 'waits' in ('signal', 'resume') and exists (
  select from inbox i
  where i.run_id = r.id and i.kind = 'signal' and i.state <> 'taken'
    and (i.name = f.begun ->> 'name' or f.begun -> 'names' ? i.name or f.begun -> 'names' = '[]')
    and (f.begun ->> 'deadline' is null or i.sent_at <= (f.begun ->> 'deadline')::timestamptz)
    and not exists (select from journal j where j.run_id = r.id and j.kind = 'receive'
                    and j.extra -> 'messages' @> to_jsonb(i.seq))
)

-- at rest: a run that went on as new left nothing behind
-- (what crossed its end was sent on; a child's answer is for the run that asked)
select i.run_id, format('%s %s', i.kind, i.name) as detail from inbox i join runs r on r.id = i.run_id
where r.successor is not null and i.state <> 'taken' and i.kind <> 'child'

-- at rest: a message's id is once in a chain
select (array_agg(i.run_id order by i.seq))[1] as run_id, format('%s times %s', count(*), i.message_id) as detail
from inbox i join runs r on r.id = i.run_id
where i.message_id is not null
group by coalesce(r.chain, r.id), i.message_id having count(*) > 1

-- at rest: nobody waits for a child that has ended
select r.id as run_id, format('%s: child %s is %s', f.id, c.id, c.status) as detail
from runs r, jsonb_each(r.frame) as f (id, begun)
join runs c on coalesce(c.chain, c.id) = (f.begun ->> 'child')::uuid and c.successor is null
where r.status <> 'paused' and c.finished_at is not null

-- at rest: nobody waits for a rollback that is over
select r.id as run_id, format('%s: child %s is %s', f.id, c.id, c.status) as detail
from runs r, jsonb_each(r.frame) as f (id, begun)
join journal j on f.id = 'undo:' || j.step_id
join runs c on coalesce(c.chain, c.id) = (j.extra ->> 'child')::uuid and c.successor is null
where j.run_id = r.id and f.begun ->> 'waits' = 'rollback' and c.finished_at is not null

-- at rest: every message to a run that has not ended was read
select i.run_id, format('%s %s', i.kind, i.name) as detail from inbox i join runs r on r.id = i.run_id
where i.state = 'new' and r.finished_at is null

-- at rest: every request was heard
select i.run_id, i.kind as detail from inbox i join runs r on r.id = i.run_id
where i.kind in ('cancel', 'pause', 'resume', 'rollback') and i.state <> 'taken' and r.finished_at is null
