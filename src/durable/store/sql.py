"""Every statement of the advance path. The first line of each says what for; the server's log and statistics show it.

Names are qualified: a connection's search_path does not matter. Guards raise in the database (``refuse``): a whole
transaction travels in one flush, and COMMIT is on its way before anybody could read a row count.
"""

from __future__ import annotations

from typing import Final

from durable.store.codec import ENTRY_COLUMNS, MESSAGE_COLUMNS, RUN_COLUMNS
from durable.store.query import Statement, Statements, statement

# As durable.engine_now() has it, without the call.
_NOW: Final = "clock_timestamp() + (select ahead from {schema}.clock)"

# The update stands first: what belongs to it is written only for a run that has moved.
_UPDATE: Final = """
with moved as (
  update {schema}.runs set {changes} where id = %(run)s and revision = %(before)s returning id
)
"""

_STALE: Final = """{schema}.refuse(
  'runs_revision', 'run ' || %(run)s || ' is no longer at revision ' || %(before)s
)"""

_COLUMNS: Final = "step_id, seq, kind, status, result, error, attempt, started_at, finished_at, parent, extra"
_VALUES: Final = (
    "%(step_id)s, %(seq)s, %(kind)s, %(entry_status)s, %(result)s, %(entry_error)s, %(attempt)s, %(began_at)s, "
    "%(ended_at)s, %(parent)s, %(extra)s"
)

_MOVED: Final = f"""
-- the run becomes what the transition says, if it still is what the transition was made from
{_UPDATE.strip()}
select case when not exists (select from moved) then {_STALE} end
"""

# With no `on conflict`, which would cost each entry more than `make_room` costs the few that need it.
_MOVED_BY_STEP: Final = f"""
-- the same, with the entry of the step that moved it: the first write wins
{_UPDATE.strip()}
insert into {{schema}}.journal (run_id, {_COLUMNS})
values (coalesce((select id from moved), {_STALE}), {_VALUES})
"""


class Sql(Statements):
    begin = statement("begin isolation level read committed read write")
    commit = statement("commit")
    commit_and_begin = statement("commit and chain")  # the next transaction has the isolation level of this one

    # The lock stands in a subquery: what the outer one reads, it reads when the lock has been had; the time, too.
    lock = statement(f"""
-- lock a run, and read it: wait for its holder
select {RUN_COLUMNS}, {_NOW}
from (select * from {{schema}}.runs where id = %(run)s for update) run
""")

    lock_free = statement(f"""
-- lock a run, and read it, if nobody holds it
select {RUN_COLUMNS}, {_NOW}
from (select * from {{schema}}.runs where id = %(run)s for update skip locked) run
""")

    relock = statement("""
-- lock a run that was just written, if nobody holds it: only another revision would have changed it; and whether its
-- inbox is worth a look: nothing was waited for, so the lock is no younger than what this sees
select revision, exists (select from {schema}.inbox where run_id = %(run)s and state <> 'taken')
from {schema}.runs where id = %(run)s for update skip locked
""")

    look = statement(f"""
-- a run as it stands, without a lock
select {RUN_COLUMNS} from {{schema}}.runs where id = %(run)s
""")

    inbox = statement(f"""
-- what lies in the inbox: read after the lock, never with it
select {MESSAGE_COLUMNS} from {{schema}}.inbox where run_id = %(run)s and state <> 'taken' order by seq
""")

    journal = statement(f"""
-- what the run has passed, in the order in which it was written
select {ENTRY_COLUMNS} from {{schema}}.journal where run_id = %(run)s order by seq
""")

    savepoint = statement("savepoint locked")
    release = statement("release locked")
    back_to_savepoint = statement("rollback to locked")

    unchanged = statement("""
-- nothing lies in the inbox but what was seen
select {schema}.refuse('inbox_news', 'run ' || %(run)s::uuid || ': something came to its inbox meanwhile')
from {schema}.inbox where run_id = %(run)s::uuid and state <> 'taken' and seq <> all (%(seqs)s::bigint[]) limit 1
""")

    see = statement("""
-- these messages were shown to a holder of the lock: they wake nobody any more
update {schema}.inbox set state = 'seen' where run_id = %(run)s and seq = any(%(seqs)s) and state = 'new'
""")

    take = statement("""
-- these messages were taken, each by a step or, control requests, by the engine
update {schema}.inbox message set state = 'taken', taken_by = taken.step, taken_at = {schema}.engine_now()
from unnest(%(seqs)s::bigint[], %(steps)s::text[]) as taken (seq, step)
where message.run_id = %(run)s and message.seq = taken.seq and message.state <> 'taken'
""")

    reply = statement("""
-- these messages were completed: whoever asked finds the answer with them, and the first one stands
update {schema}.inbox message
set reply = answer.body::json, replied_at = {schema}.engine_now(), state = 'taken',
  taken_at = coalesce(message.taken_at, {schema}.engine_now())
from unnest(%(seqs)s::bigint[], %(replies)s::text[]) as answer (seq, body)
where message.run_id = %(run)s and message.seq = answer.seq and message.replied_at is null
""")

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        self._moves: dict[tuple[bool, tuple[str, ...]], Statement] = {}

    def move(self, changed: tuple[str, ...], *, stepped: bool) -> Statement:
        """The write of a transition that changes these columns; `stepped`: with an entry of the journal."""
        made = self._moves.get((stepped, changed))
        if made is None:
            changes = ", ".join(f"{name} = %({name})s" for name in changed)
            text = (_MOVED_BY_STEP if stepped else _MOVED).replace("{changes}", changes)
            made = self._moves[stepped, changed] = self.statement(text.strip())
        return made

    tell = statement("""
-- who waits for news of the run is told: after the commit, for commits that notify are serialised
with told as (delete from {schema}.waiters where run_id = %(run)s returning run_id)
select pg_notify(%(channel)s, run_id::text) from told
""")

    forget = statement("""
-- a retried run forgets the failures that ended it: from the journal they move to the failed attempts
with forgotten as (
  delete from {schema}.journal where run_id = %(run)s and step_id = any(%(steps)s) and status = 'failed' returning *
)
insert into {schema}.attempts (run_id, step_id, attempt, kind, error, started_at, finished_at)
select run_id, step_id, attempt, 'failed', error, started_at, finished_at from forgotten
where kind in ('step', 'branch', 'iteration', 'choice', 'result')
""")

    prune = statement("""
-- old iterations of a loop, whose results nobody needs any more
delete from {schema}.journal where run_id = %(run)s and step_id = any(%(steps)s)
""")

    make_room = statement("""
-- the entry of a suspended step goes, for what became of it; no other is ever replaced
delete from {schema}.journal where run_id = %(run)s and step_id = any(%(steps)s) and status = 'suspended'
""")

    write = statement(f"""
-- one more entry
insert into {{schema}}.journal (run_id, {_COLUMNS}) values (%(run)s, {_VALUES})
""")

    attempt = statement("""
-- an attempt that failed, or whose worker died
insert into {schema}.attempts (run_id, step_id, attempt, kind, error, started_at, finished_at, next_attempt_at)
values (%(run)s, %(step_id)s, %(attempt)s, %(kind)s, %(error)s, %(started_at)s, %(finished_at)s, %(next_attempt_at)s)
""")

    event = statement("""
-- what happened to the run
insert into {schema}.events (run_id, kind, step_id, data, at)
values (%(run)s, %(kind)s, %(step_id)s, %(data)s, coalesce(%(at)s, {schema}.engine_now()))
""")

    send = statement("""
-- a message to another run
select {schema}.send_message(%(to)s, %(kind)s, %(name)s, %(body)s, %(id)s)
""")

    start_child = statement("""
-- a child: it has its parent's queue, priority, tags, root and deadline
select child.id, child.created
from {schema}.runs parent, {schema}.start_run(
  p_id => %(id)s, p_workflow => %(workflow)s, p_version => %(version)s, p_input => %(input)s,
  p_input_hash => %(input_hash)s, p_queue => parent.queue, p_tags => parent.tags, p_priority => parent.priority,
  p_parent => parent.id, p_parent_step => %(parent_step)s, p_root => parent.root_id, p_deadline => parent.deadline
) child
where parent.id = %(run)s
""")

    start_successor = statement("""
-- continue_as_new: it takes what the run had, also its key, which `move` has freed; a used id is refused
select case when not made.created then {schema}.refuse(
  'runs_successor', 'run ' || %(run)s || ' can not go on as ' || %(id)s || ': there is such a run already'
) end
from {schema}.runs r, {schema}.start_run(
  p_id => %(id)s, p_workflow => r.workflow, p_version => %(version)s, p_input => %(input)s,
  p_input_hash => r.input_hash, p_queue => r.queue, p_key => r.key, p_tags => r.tags, p_priority => r.priority,
  p_parent => r.parent_id, p_parent_step => r.parent_step, p_root => r.root_id, p_deadline => r.deadline,
  p_predecessor => r.id
) made
where r.id = %(run)s::uuid
""")

    hand_over = statement("""
-- what nobody took goes to the successor, which has seen none of it; but an answer of a child is for the run that asked
update {schema}.inbox set run_id = %(id)s, state = 'new'
where run_id = %(run)s and state <> 'taken' and kind <> 'child'
""")

    forward = statement("""
-- what crossed the run's continue_as_new
select {schema}.forward_messages(%(run)s)
""")

    ring_later = statement("""
-- the row was busy: one more ring, whose message lies in the inbox already
select {schema}.enqueue('durable.ring', id, null, queue, priority, %(delay)s) from {schema}.runs where id = %(run)s
""")

    enqueue = statement("""
-- the next job: last of all, for it may have to wait for a rival
select {schema}.enqueue(%(task)s, %(run)s, %(revision)s, %(queue)s, %(priority)s, p_quiet => %(quiet)s)
""")
