"""The one place where a transition is written.

Everything goes out in one flush, in the caller's transaction, and each guard raises in the database; so the same flush
may end with COMMIT and the next lock (`apply_and_relock`), and nothing of a refused transition is committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from durable.core.control import REQUESTS  # one that waits behind another is still to be heard
from durable.core.state import Entry, Failure, Message, Run
from durable.core.transition import Event, Successor, Transition
from durable.define.payload import canonical_hash
from durable.store import codec, deliveries
from durable.store.db import Connection, Store
from durable.store.errors import InternalError, translated
from durable.store.jobs import enqueue
from durable.store.runs import Committed, Cursor, Locked, abandon, let_go, messages_of, not_locked, went_through
from durable.values import MOVES, Status


@dataclass(frozen=True, slots=True)
class Applied:
    """The entries as they stand in the journal now, with their seq."""

    entries: tuple[Entry, ...]


async def apply(db: Store, connection: Connection, transition: Transition, inbox: Iterable[Message] = ()) -> Applied:
    """Write `transition` in the transaction that is open. `inbox` are the messages that its decision saw.

    Raises StaleRevision or JournalConflict, and then the transaction is lost: ``abandon`` the connection.
    """
    with translated():
        async with connection.pipeline():
            written = await _queue(db, connection, transition, inbox)
        return await _applied(transition, written)


async def apply_and_commit(
    db: Store, connection: Connection, transition: Transition, inbox: Iterable[Message] = ()
) -> Applied:
    """`apply` and COMMIT in one flush: the end of a burst. Raises, with no transaction left open, if it was not
    committed."""
    try:
        async with connection.pipeline():
            written = await _queue(db, connection, transition, inbox)
            commit = await connection.execute(db.sql.commit)
        went_through(commit)
    except BaseException as error:
        await abandon(connection)
        with translated():
            raise error
    return await _applied(transition, written)


async def apply_and_relock(
    db: Store, connection: Connection, transition: Transition, inbox: Iterable[Message] = ()
) -> tuple[Applied, Committed]:
    """`apply`, COMMIT, BEGIN, and the lock for the next step, in one flush: what a burst does between two steps.

    Raises, with no transaction left open, only if the transition was not committed. The run is not read again: at the
    revision just written it is ``transition.after``; at another one somebody took over, and there is no lock.
    """
    run = {"run": transition.after.id}
    written: list[Cursor] = []
    commit: Cursor | None = None
    try:
        async with connection.pipeline():
            written = await _queue(db, connection, transition, inbox)
            commit = await connection.execute(db.sql.commit_and_begin)
            row = await connection.execute(db.sql.relock, run)
            messages = await connection.execute(db.sql.inbox, run)
        went_through(commit)
        committed = await _relocked(db, connection, transition.after, row, messages)
    except BaseException as error:
        committed = await not_locked(connection, commit, error)
    return await _applied(transition, written), committed


async def _relocked(db: Store, connection: Connection, run: Run, row: Cursor, messages: Cursor) -> Committed:
    found = await row.fetchone()
    if found is None or found[0] != run.revision:
        await let_go(db, connection)
        return Committed(None)
    return Committed(Locked(run, found[1], messages_of(db, await messages.fetchall())))


async def _queue(db: Store, connection: Connection, transition: Transition, inbox: Iterable[Message]) -> list[Cursor]:
    """In a pipeline: all that there is to write; the cursors of the entries are to be read after the flush."""
    before, after, sql, payloads = transition.before, transition.after, db.sql, db.payloads
    check_move(before, after)
    check_successor(transition)
    run: dict[str, Any] = {"run": after.id}

    await connection.execute(sql.move, run | {"before": before.revision} | codec.run_changes(after, payloads))
    if transition.forget:
        await connection.execute(sql.forget, run | {"steps": list(transition.forget)})
    if transition.prune:
        await connection.execute(sql.prune, run | {"steps": list(transition.prune)})
    written = [
        await connection.execute(sql.write, run | codec.entry_values(entry, payloads)) for entry in transition.entries
    ]
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
        await connection.execute(sql.attempt, run | values)
    for event in (*lifecycle(before, after), *transition.events):
        values = {"kind": event.kind, "step_id": event.step_id, "data": payloads.dump(event.data)}
        await connection.execute(sql.event, run | values)

    await _queue_inbox(db, connection, transition, inbox)
    if transition.successor is not None:  # before anything is sent: what is sent to the run goes to its successor
        await _queue_successor(db, connection, after, transition.successor)
    for message in transition.outgoing:
        values = {"to": message.run_id, "kind": message.kind.value, "name": message.name, "id": message.id}
        await connection.execute(sql.send, values | {"body": payloads.encoded(message.body)})
    for child in transition.children:
        values = {
            "id": child.id,
            "workflow": child.workflow,
            "version": child.version,
            "input": payloads.encode(child.input),
            "input_hash": canonical_hash(child.input),
            "parent_step": child.parent_step,
        }
        await connection.execute(sql.start_child, run | values)

    await deliveries.write(db, connection, after, transition.reports)
    if transition.next is not None:
        await enqueue(db, connection, f"durable.{transition.next.value}", after, after.revision)
    return written


async def _queue_inbox(db: Store, connection: Connection, transition: Transition, inbox: Iterable[Message]) -> None:
    """What becomes of the messages: taken, answered, or at least seen."""
    run: dict[str, Any] = {"run": transition.after.id}
    taken, replies = transition.taken or {}, transition.replies or {}
    if taken:
        await connection.execute(db.sql.take, run | {"seqs": list(taken), "steps": list(taken.values())})
    if replies:
        bodies = [db.payloads.encode(reply) for reply in replies.values()]
        await connection.execute(db.sql.reply, run | {"seqs": list(replies), "replies": bodies})
    done = taken.keys() | replies.keys()
    if seen := [m.seq for m in inbox if m.fresh and m.seq not in done and m.kind not in REQUESTS]:
        await connection.execute(db.sql.see, run | {"seqs": seen})


async def _queue_successor(db: Store, connection: Connection, run: Run, successor: Successor) -> None:
    """The run goes on as another one, which inherits its inbox."""
    values = {
        "run": run.id,
        "id": successor.id,
        "version": successor.version,
        "input": db.payloads.encode(successor.input),
    }
    await connection.execute(db.sql.start_successor, values)
    await connection.execute(db.sql.hand_over, values)


async def _applied(transition: Transition, written: list[Cursor]) -> Applied:
    entries = []
    for entry, cursor in zip(transition.entries, written, strict=True):
        row = await cursor.fetchone()
        assert row is not None  # refuse() or a seq
        entries.append(replace(entry, seq=row[0]))
    return Applied(tuple(entries))


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
    """What a transition means in the run's life, as history tells it."""
    started = [Event("started")] if before.started_at is None and after.started_at is not None else []
    match before.status, after.status:
        case was, now if was is now:
            waits_anew = now is Status.SUSPENDED and _wait(after) != _wait(before)
            return [_suspended(after)] if waits_anew else started
        case Status.FAILED, Status.RUNNING:
            return [Event("resumed", data={"by": "retry"})]
        case (Status.PAUSED, Status.RUNNING | Status.SUSPENDED) | (Status.COMPENSATING, Status.RUNNING):
            return [Event("resumed"), *started]
        case _, Status.SUSPENDED:
            return [*started, _suspended(after)]
        case _, Status.FAILED:
            return [*started, Event("failed", data=_with_error(after.error))]
        case _, Status.CANCELED:
            return [*started, Event("canceled", data={"reason": after.reason} if after.reason else None)]
        case _, Status.PAUSED | Status.COMPENSATING | Status.COMPLETED as now:
            return [*started, Event(now.value)]
        case _:
            return started  # or back to work after a wait: the journal tells that


def _wait(run: Run) -> tuple[object, ...]:
    return run.waiting_for, run.waiting_name, run.wake_at


def _suspended(run: Run) -> Event:
    data = {"waiting_for": run.waiting_for, "name": run.waiting_name, "wake_at": run.wake_at}
    return Event("suspended", data={name: value for name, value in data.items() if value is not None})


def _with_error(error: Failure | None) -> dict[str, Any] | None:
    return None if error is None else {"error": codec.failure_json(error)}
