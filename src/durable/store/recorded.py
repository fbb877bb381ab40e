"""A run as it is recorded, to be looked at without locking it."""

from __future__ import annotations

import uuid

from durable.core.state import Entry, Run
from durable.store import codec
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.journal import load_journal


async def load_recorded(db: Store, connection: Connection, run_id: uuid.UUID) -> tuple[Run, dict[str, Entry]] | None:
    """The run's row and its journal, both as of one moment. None: there is no such run (any more).

    `connection` is in no transaction yet. Raises PayloadError for what went through a codec that is not here.
    """
    async with connection.transaction():
        await connection.execute("set transaction isolation level repeatable read, read only")
        cursor = await connection.execute(db.sql.look, {"run": run_id})
        row = await cursor.fetchone()
        if row is None:
            return None
        return codec.run(row, db.payloads), await load_journal(db, connection, run_id)
