"""The one place where a transition is written.

Everything goes out in one flush, in the caller's transaction, and each guard raises in the database; so the same flush
may end with COMMIT and the next lock (`apply_and_relock`), and nothing of a refused transition is committed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable, Sequence
from typing import Any

import psycopg

from durable.core.control import REQUESTS  # one that waits behind another is still to be heard
from durable.core.frozen import value
from durable.core.journal import placed
from durable.core.state import Entry, Failure, Message, Run
from durable.core.transition import Event, Successor, Transition
from durable.define.payload import canonical_hash
from durable.store import codec, deliveries
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import InboxNews, InternalError, translate, translated
from durable.store.flush import Answer, Flush, send
from durable.store.inbox import load_inbox
from durable.store.jobs import queue_continuation
from durable.store.runs import (
    Committed,
    Following,
    Locked,
    abandon,
    let_go,
    messages_of,
    not_locked,
    queue_following,
    read_lock,
    went_through,
)
from durable.values import MOVES, Status

log = logging.getLogger(__name__)


@value(frozen=True, slots=True)
class Applied:
    """The entries as they stand in the journal now, with their seq."""

    entries: tuple[Entry, ...]


async def apply(
    db: Store,
    connection: Connection,
    transition: Transition,
    inbox: Iterable[Message] = (),
    *,
    journal: Container[str] | None = None,
    quiet: bool = False,
) -> Applied:
    """Write `transition` in the transaction that is open. `inbox` are the messages that its decision saw; `journal`:
    the steps that have an entry, if the caller knows them, or the database looks for them. `quiet`: this process looks
    by itself for the next job.

    Raises StaleRevision or JournalConflict, and then the transaction is lost: ``abandon`` the connection.
    """
    flush = Flush(connection)
    applied = _queue(db, flush, transition, inbox, journal)
    _queue_next(db, flush, transition, quiet=quiet)
    with translated():
        await flush.send()
    return applied


async def apply_and_commit(
    db: Store,
    connection: Connection,
    transition: Transition,
    inbox: Iterable[Message] = (),
    *,
    journal: Container[str] | None = None,
    quiet: bool = False,
    whole: Iterable[Message] | None = None,
    following: Following | None = None,
) -> tuple[Applied, Locked | None]:
    """`apply` and COMMIT in one flush: the end of a burst. Who waits for the run's end, or for a reply, is told behind
    the commit. Raises, with no transaction left open, if it was not committed. `whole`: only if nothing else lies in
    the inbox: else InboxNews is raised, and the transaction stands where it stood before, with all its locks.
    `following`: another run to be locked behind the commit, if nobody holds it; then that transaction is open."""
    commit, locking = Answer(), None
    applied, locked = Applied(()), None
    try:
        flush = Flush(connection)
        if whole is not None:
            _queue_guard(db, flush, transition.after, whole)
        applied = _queue(db, flush, transition, inbox, journal)
        _queue_next(db, flush, transition, quiet=quiet)
        ends = db.sql.commit if following is None else db.sql.commit_and_begin
        commit = flush.add(ends)
        if transition.ends or transition.replies:
            flush.add(db.sql.tell, {"run": transition.after.id_text, "channel": db.ended_channel})
            if following is not None:
                flush.add(ends)
        if following is not None:
            locking = queue_following(db, flush, following)
        await flush.send()
        went_through(commit)
        if locking is not None and (locked := read_lock(db, *locking)) is None:
            await let_go(db, connection)
    except BaseException as error:
        if isinstance(error, psycopg.Error) and isinstance(news := translate(error), InboxNews):
            await send(connection, db.sql.back_to_savepoint)
            raise news from error
        await abandon(connection)
        if commit.tag != "COMMIT" or not isinstance(error, psycopg.Error):
            with translated():
                raise error
        log.warning("run %s: it is written, but not what was to follow in that flush: %s", transition.after.id, error)
        locked = None
    return applied, locked


def _queue_guard(db: Store, flush: Flush, run: Run, inbox: Iterable[Message]) -> None:
    """Refuse what follows if anything else lies in the inbox. The savepoint keeps the row locked then: whoever waits
    for it would else have it before the outcome that was about to be written."""
    flush.add(db.sql.savepoint)
    flush.add(db.sql.unchanged, {"run": run.id, "seqs": [message.seq for message in inbox]})
    flush.add(db.sql.release)  # what is written has the transaction's own id, and not another one


async def apply_and_relock(
    db: Store,
    connection: Connection,
    transition: Transition,
    inbox: Collection[Message] = (),
    *,
    journal: Container[str] | None = None,
) -> tuple[Applied, Committed]:
    """`apply`, COMMIT, BEGIN, and the lock for the next step, if nobody holds it, in one flush: what a burst does
    between two steps. No job is enqueued.

    Raises, with no transaction left open, only if the transition was not committed. The run is not read again: at the
    revision just written it is ``transition.after``; at another one somebody took over, and there is no lock. Nor is
    the time: who held the row knows how it has moved on.
    """
    run = {"run": transition.after.id_text}
    applied, commit = Applied(()), Answer()
    try:
        flush = Flush(connection)
        applied = _queue(db, flush, transition, inbox, journal)
        commit = flush.add(db.sql.commit_and_begin)
        row = flush.add(db.sql.relock, run)
        messages = flush.add(db.sql.inbox, run) if inbox else None
        await flush.send()
        went_through(commit)
        committed = await _relocked(db, connection, transition.after, row, messages)
    except BaseException as error:
        committed = await not_locked(connection, commit, error)
    return applied, committed


async def _relocked(db: Store, connection: Connection, run: Run, row: Answer, messages: Answer | None) -> Committed:
    """`messages`: what lies in the inbox, if that was asked for; mostly nothing does."""
    revision, mail = row.row or (None, False)
    if revision != run.revision:
        await let_go(db, connection)
        return Committed(None)
    if messages is not None:
        return Committed(messages_of(db, messages.rows))
    return Committed(await load_inbox(db, connection, run.id) if mail else ())


def _queue(
    db: Store, flush: Flush, transition: Transition, inbox: Iterable[Message], journal: Container[str] | None
) -> Applied:
    """Queue all that there is to write, but for the next job."""
    before, after, sql, payloads = transition.before, transition.after, db.sql, db.payloads
    check_move(before, after)
    check_successor(transition)
    run: dict[str, Any] = {"run": after.id_text}
    if transition.forget:
        flush.add(sql.forget, run | {"steps": list(transition.forget)})
    if transition.prune:
        flush.add(sql.prune, run | {"steps": list(transition.prune)})
    if known := [entry.step_id for entry in transition.entries if journal is None or entry.step_id in journal]:
        flush.add(sql.make_room, run | {"steps": known})
    entries = placed(transition.entries, after.revision)
    _queue_move(db, flush, before, after, entries)
    for attempt in transition.attempts:
        values = {
            "step_id": attempt.step_id,
            "attempt": attempt.attempt,
            "kind": attempt.kind,
            "error": payloads.dump(codec.failure_json(attempt.error)),
            "started_at": attempt.started_at,
            "finished_at": attempt.finished_at,
            "next_attempt_at": attempt.next_attempt_at,
        }
        flush.add(sql.attempt, run | values)
    for event in (*lifecycle(before, after), *transition.events):
        values = {"kind": event.kind, "step_id": event.step_id, "data": payloads.dump(event.data), "at": event.at}
        flush.add(sql.event, run | values)

    _queue_inbox(db, flush, transition, inbox)
    if transition.successor is not None:  # before anything is sent: what is sent to the run goes to its successor
        _queue_successor(db, flush, after, transition.successor)
    for message in transition.outgoing:
        values = {"to": message.run_id, "kind": message.kind.value, "name": message.name, "id": message.id}
        flush.add(sql.send, values | {"body": payloads.encoded(message.body)})
    for child in transition.children:
        values = {
            "id": child.id,
            "workflow": child.workflow,
            "version": child.version,
            "input": payloads.encode(child.input),
            "input_hash": canonical_hash(child.input),
            "parent_step": child.parent_step,
        }
        flush.add(sql.start_child, run | values)

    deliveries.queue(db, flush, after, transition.reports)
    return Applied(entries)


def _queue_next(db: Store, flush: Flush, transition: Transition, *, quiet: bool) -> None:
    if transition.next is not None:
        queue_continuation(db, flush, f"durable.{transition.next.value}", transition.after, quiet=quiet)


def _queue_move(db: Store, flush: Flush, before: Run, after: Run, entries: Sequence[Entry]) -> None:
    """The run's row, with the first entry in the same statement: most transitions have one, and nothing else."""
    changes = codec.run_changes(before, after, db.payloads)
    values = changes | {"run": after.id_text, "before": before.revision}
    if not entries:
        flush.add(db.sql.move(tuple(changes), stepped=False), values)
        return
    values |= codec.entry_values(entries[0], db.payloads)
    flush.add(db.sql.move(tuple(changes), stepped=True), values)
    for entry in entries[1:]:
        flush.add(db.sql.write, {"run": after.id_text} | codec.entry_values(entry, db.payloads))


def _queue_inbox(db: Store, flush: Flush, transition: Transition, inbox: Iterable[Message]) -> None:
    """What becomes of the messages: taken, answered, or at least seen."""
    run: dict[str, Any] = {"run": transition.after.id_text}
    taken, replies = transition.taken or {}, transition.replies or {}
    if taken:
        flush.add(db.sql.take, run | {"seqs": list(taken), "steps": list(taken.values())})
    if replies:
        bodies = [db.payloads.encode(reply) for reply in replies.values()]
        flush.add(db.sql.reply, run | {"seqs": list(replies), "replies": bodies})
    done = taken.keys() | replies.keys()
    if seen := [m.seq for m in inbox if m.fresh and m.seq not in done and m.kind not in REQUESTS]:
        flush.add(db.sql.see, run | {"seqs": seen})


def _queue_successor(db: Store, flush: Flush, run: Run, successor: Successor) -> None:
    """The run goes on as another one, which inherits its inbox."""
    values = {
        "run": run.id,
        "id": successor.id,
        "version": successor.version,
        "input": db.payloads.encode(successor.input),
    }
    flush.add(db.sql.start_successor, values)
    flush.add(db.sql.hand_over, values)


def check_move(before: Run, after: Run) -> None:
    """The database checks the move, too; this one names the run before anything is sent."""
    if after.revision != before.revision + 1:
        raise InternalError(f"run {before.id}: a transition from revision {before.revision} to {after.revision}")
    if after.status is not before.status and after.status not in MOVES[before.status]:
        raise InternalError(f"run {before.id}: no move from {before.status} to {after.status}")


def check_successor(transition: Transition) -> None:
    """The row names the run that is started in its place, and no other."""
    run, successor = transition.after, transition.successor
    named = successor.id if successor is not None else transition.before.successor
    if run.successor != named:
        raise InternalError(f"run {run.id}: its row names {run.successor} as its successor, the transition {named}")


def lifecycle(before: Run, after: Run) -> list[Event]:
    """What a transition means in the run's life, as history tells it; but for what the row says as long as it stands:
    when it was created, started and completed. Most runs have no events at all."""
    match before.status, after.status:
        case was, now if was is now:
            waits_anew = now is Status.SUSPENDED and _wait(after) != _wait(before)
            return [_suspended(after)] if waits_anew else []
        case Status.FAILED, Status.RUNNING:
            return [Event("resumed", data={"by": "retry"})]
        case (Status.PAUSED, Status.RUNNING | Status.SUSPENDED) | (Status.COMPENSATING, Status.RUNNING):
            return [Event("resumed")]
        case Status.COMPLETED, Status.COMPENSATING:
            return [Event("completed", at=before.finished_at), Event("compensating")]
        case _, Status.SUSPENDED:
            return [_suspended(after)]
        case _, Status.FAILED:
            return [Event("failed", data=_with_error(after.error))]
        case _, Status.CANCELED:
            return [Event("canceled", data={"reason": after.reason} if after.reason else None)]
        case _, Status.PAUSED | Status.COMPENSATING as now:
            return [Event(now.value)]
        case _:
            return []  # it completed; or it is back at work after a wait, and the journal tells that


def _wait(run: Run) -> tuple[object, ...]:
    return run.waiting_for, run.waiting_name, run.wake_at


def _suspended(run: Run) -> Event:
    data = {"waiting_for": run.waiting_for, "name": run.waiting_name, "wake_at": run.wake_at}
    return Event("suspended", data={name: value for name, value in data.items() if value is not None})


def _with_error(error: Failure | None) -> dict[str, Any] | None:
    return None if error is None else {"error": codec.failure_json(error)}
