"""Lock a run, and read what a decision needs: the row and its inbox.

The inbox is read in a statement after the lock: READ COMMITTED reads a row anew once the lock is had, but not the other
tables of that statement, and a message that came while we waited would be overlooked.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus

from durable.core.frozen import value
from durable.core.journal import Journal
from durable.core.state import Message, Run
from durable.store import codec
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.errors import translated
from durable.store.flush import Answer, Flush, Row, send
from durable.store.journal import journal_of
from durable.store.query import Statement

Mode: TypeAlias = Literal["wait", "skip"]
"""``wait`` for a held row as long as the session's ``lock_timeout``, then RowBusy; or ``skip`` it: None."""

ROLLBACK: Final = Statement.of("rollback")


@value(frozen=True, slots=True)
class Locked:
    """A run whose row this transaction holds, the time at which it was locked, and its untaken messages. `journal`: if
    it was asked for."""

    run: Run
    now: datetime
    inbox: tuple[Message, ...]
    journal: Journal | None = None


@value(frozen=True, slots=True)
class Committed:
    """COMMIT went through. `inbox`: the untaken messages of the run, which is locked again. None: it is not, because
    somebody else has it, or because of `error`; no transaction is open then."""

    inbox: tuple[Message, ...] | None
    error: Exception | None = None


async def begin_and_lock(
    db: Store, connection: Connection, run_id: uuid.UUID, mode: Mode = "wait", *, with_journal: bool = False
) -> Locked | None:
    """BEGIN, lock, inbox and journal in one flush. Without a lock (None, or RowBusy) no transaction is left open."""
    try:
        flush = Flush(connection)
        flush.add(db.sql.begin)
        row, inbox = queue_lock(db, flush, run_id, mode)
        journal = flush.add(db.sql.journal, {"run": run_id}) if with_journal else None
        await flush.send()
        locked = read_lock(db, row, inbox, journal)
    except BaseException as error:
        await abandon(connection)
        with translated():
            raise error
    if locked is None:
        await let_go(db, connection)
    return locked


async def write_and_lock(
    db: Store,
    connection: Connection,
    statement: Statement,
    values: Mapping[str, Any],
    following: Following,
) -> tuple[Answer, Locked | None]:
    """A statement in a transaction of its own, and behind its COMMIT the lock of a run, if nobody holds it: in one
    flush. Returns the statement's answer. Raises, with no transaction left open, only if it was not committed."""
    answer, commit = Answer(), Answer()
    try:
        flush = Flush(connection)
        flush.add(db.sql.begin)
        answer = flush.add(statement, values)
        commit = flush.add(db.sql.commit_and_begin)
        locking = queue_following(db, flush, following)
        await flush.send()
        went_through(commit)
        locked = read_lock(db, *locking)
        if locked is None:
            await let_go(db, connection)
    except BaseException as error:
        await not_locked(connection, commit, error)
        locked = None
    return answer, locked


@value(frozen=True, slots=True)
class Following:
    """A run that is to be locked behind somebody else's COMMIT. `with_journal`: and its journal read."""

    run_id: uuid.UUID
    with_journal: bool


def queue_following(db: Store, flush: Flush, run: Following) -> tuple[Answer, Answer, Answer | None]:
    """The lock, if nobody holds it; the inbox; and the journal, if it is wanted: for `read_lock`."""
    row, inbox = queue_lock(db, flush, run.run_id, "skip")
    return row, inbox, flush.add(db.sql.journal, {"run": run.run_id}) if run.with_journal else None


async def commit(db: Store, connection: Connection) -> None:
    """COMMIT, and make sure that it was one. On an error no transaction is left open, and nothing was written, unless
    the connection was lost: then nobody knows."""
    try:
        went_through(await send(connection, db.sql.commit))
    except BaseException as error:
        await abandon(connection)
        with translated():
            raise error


def queue_lock(db: Store, flush: Flush, run_id: uuid.UUID, mode: Mode) -> tuple[Answer, Answer]:
    """The lock and the inbox, to be read when they have been sent."""
    run = {"run": run_id}
    return flush.add(db.sql.lock if mode == "wait" else db.sql.lock_free, run), flush.add(db.sql.inbox, run)


def read_lock(db: Store, row: Answer, inbox: Answer, journal: Answer | None = None) -> Locked | None:
    """What `queue_lock` brought. None: there is no such run, or it was skipped."""
    found = row.row
    if found is None:
        return None
    run, messages = codec.run(found[:-1], db.payloads), messages_of(db, inbox.rows)
    return Locked(run, found[-1], messages, None if journal is None else journal_of(db, journal.rows))


def messages_of(db: Store, rows: Iterable[Row]) -> tuple[Message, ...]:
    return tuple(codec.message(row, db.payloads) for row in rows)


def went_through(commit: Answer) -> None:
    """COMMIT of a transaction that had failed is answered with ROLLBACK, not with an error."""
    if commit.tag != "COMMIT":
        raise psycopg.errors.InFailedSqlTransaction("COMMIT of a failed transaction: it was rolled back")


async def not_locked(connection: Connection, commit: Answer, error: BaseException) -> Committed:
    """What an error in a flush with COMMIT in its middle means."""
    await abandon(connection)
    if isinstance(error, Exception) and commit.tag == "COMMIT":
        return Committed(None, _meant(error))
    with translated():
        raise error


async def let_go(db: Store, connection: Connection) -> None:
    """End a transaction that wrote nothing."""
    await send(connection, db.sql.commit)


async def abandon(connection: Connection) -> None:
    """After an error: leave no transaction open. A connection that can't even roll back is closed."""
    try:
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            await send(connection, ROLLBACK)
    except psycopg.OperationalError:
        await connection.close()


def _meant(error: Exception) -> Exception:
    try:
        with translated():
            raise error
    except Exception as meant:
        return meant
