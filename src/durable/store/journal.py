"""What a run has passed."""

from __future__ import annotations

import uuid

from durable.core.state import Entry
from durable.store import codec
from durable.store.db import Connection, Store


async def load_journal(db: Store, connection: Connection, run_id: uuid.UUID) -> dict[str, Entry]:
    """By step id, in the order in which the entries were written."""
    cursor = await connection.execute(db.sql.journal, {"run": run_id})
    entries = (codec.entry(row, db.payloads) for row in await cursor.fetchall())
    return {entry.step_id: entry for entry in entries}
