"""Lock a run, and read what a decision needs: the row and its inbox.

The inbox is read in a statement after the lock: READ COMMITTED reads a row anew once the lock is had, but not the other
tables of that statement, and a message that came while we waited would be overlooked.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

import psycopg
from psycopg import AsyncCursor
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from durable.core.state import Message, Run
from durable.store import codec
from durable.store.db import Connection, Store
from durable.store.errors import translated

Mode: TypeAlias = Literal["wait", "skip"]
"""``wait`` for a held row as long as the session's ``lock_timeout``, then RowBusy; or ``skip`` it: None."""

Cursor: TypeAlias = AsyncCursor[TupleRow]


@dataclass(frozen=True, slots=True)
class Locked:
    """A run whose row this transaction holds, the time at which it was locked, and its untaken messages."""

    run: Run
    now: datetime
    inbox: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """COMMIT went through. `locked` is None if the run could not be locked again: `error` says why, if there was one;
    no transaction is open then."""

    locked: Locked | None
    error: Exception | None = None


async def lock(
    db: Store, connection: Connection, run_id: uuid.UUID, mode: Mode = "wait"
) -> tuple[Run, datetime] | None:
    """The run and the engine's time, in the transaction that is open. None: there is no such run, or it was skipped."""
    with translated():
        cursor = await connection.execute(_lock(db, mode), {"run": run_id})
    row = await cursor.fetchone()
    return None if row is None else (codec.run(row[:-1], db.payloads), row[-1])


async def begin_and_lock(db: Store, connection: Connection, run_id: uuid.UUID, mode: Mode = "wait") -> Locked | None:
    """BEGIN, lock and inbox in one flush. Without a lock (None, or RowBusy) no transaction is left open."""
    try:
        async with connection.pipeline():
            await connection.execute(db.sql.begin)
            row, inbox = await queue_lock(db, connection, run_id, mode)
        locked = await read_lock(db, row, inbox)
    except BaseException as error:
        await abandon(connection)
        with translated():
            raise error
    if locked is None:
        await let_go(db, connection)
    return locked


async def commit(db: Store, connection: Connection) -> None:
    """COMMIT, and make sure that it was one. On an error no transaction is left open, and nothing was written, unless
    the connection was lost: then nobody knows."""
    try:
        went_through(await connection.execute(db.sql.commit))
    except BaseException as error:
        await abandon(connection)
        with translated():
            raise error


async def commit_and_lock(db: Store, connection: Connection, run_id: uuid.UUID, mode: Mode = "wait") -> Committed:
    """COMMIT, BEGIN, lock and inbox in one flush. Raises only if COMMIT did not go through: what comes after it is no
    error of the transaction before it."""
    commit: Cursor | None = None
    try:
        async with connection.pipeline():
            commit = await connection.execute(db.sql.commit_and_begin)
            row, inbox = await queue_lock(db, connection, run_id, mode)
        went_through(commit)
        locked = await read_lock(db, row, inbox)
    except BaseException as error:
        return await not_locked(connection, commit, error)
    if locked is None:
        await let_go(db, connection)
    return Committed(locked)


async def queue_lock(db: Store, connection: Connection, run_id: uuid.UUID, mode: Mode) -> tuple[Cursor, Cursor]:
    """In a pipeline: the lock and the inbox, to be read after the flush."""
    run = {"run": run_id}
    return await connection.execute(_lock(db, mode), run), await connection.execute(db.sql.inbox, run)


async def read_lock(db: Store, row: Cursor, inbox: Cursor) -> Locked | None:
    found = await row.fetchone()
    if found is None:
        return None
    messages = await inbox.fetchall()
    return Locked(codec.run(found[:-1], db.payloads), found[-1], messages_of(db, messages))


def messages_of(db: Store, rows: list[TupleRow]) -> tuple[Message, ...]:
    return tuple(codec.message(row, db.payloads) for row in rows)


def went_through(commit: Cursor) -> None:
    """COMMIT of a transaction that had failed is answered with ROLLBACK, not with an error."""
    if commit.statusmessage != "COMMIT":
        raise psycopg.errors.InFailedSqlTransaction("COMMIT of a failed transaction: it was rolled back")


async def not_locked(connection: Connection, commit: Cursor | None, error: BaseException) -> Committed:
    """What an error in a flush with COMMIT in its middle means."""
    await abandon(connection)
    if isinstance(error, Exception) and commit is not None and commit.statusmessage == "COMMIT":
        return Committed(None, _meant(error))
    with translated():
        raise error


async def let_go(db: Store, connection: Connection) -> None:
    """End a transaction that wrote nothing. Not by ROLLBACK, with which psycopg forgets all prepared statements."""
    await connection.execute(db.sql.commit)


async def abandon(connection: Connection) -> None:
    """After an error in a flush: leave no transaction open, and no trap.

    psycopg takes a statement for prepared once it has sent the PREPARE, also if the flush failed before that was
    executed, and every later use of it would fail. Its ``rollback()`` forgets them all, but only in a transaction;
    ``execute("ROLLBACK")`` does not. So this is to be called after any error in a pipeline.
    """
    try:
        if connection.info.transaction_status is TransactionStatus.IDLE:
            await connection.execute("begin", prepare=False)
        await connection.rollback()
    except psycopg.OperationalError:
        await connection.close()


def _meant(error: Exception) -> Exception:
    try:
        with translated():
            raise error
    except Exception as meant:
        return meant


def _lock(db: Store, mode: Mode) -> bytes:
    return db.sql.lock if mode == "wait" else db.sql.lock_free
