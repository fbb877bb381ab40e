"""What a run has passed."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from durable.core.journal import Journal
from durable.store import codec
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import Row, send


async def load_journal(db: Store, connection: Connection, run_id: uuid.UUID) -> Journal:
    """The run's entries."""
    return journal_of(db, (await send(connection, db.sql.journal, {"run": run_id})).rows)


def journal_of(db: Store, rows: Iterable[Row]) -> Journal:
    """The rows as entries, in their order."""
    entries = (codec.entry(row, db.payloads) for row in rows)
    return Journal((entry.step_id, entry) for entry in entries)
