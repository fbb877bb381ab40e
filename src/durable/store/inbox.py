"""What was sent to a run and has not been taken. To be read under its lock, in a statement of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from durable.core.state import Message
from durable.store import codec
from durable.store.db import Connection, Store


async def load_inbox(db: Store, connection: Connection, run_id: uuid.UUID) -> tuple[Message, ...]:
    """The untaken messages, oldest first."""
    cursor = await connection.execute(db.sql.inbox, {"run": run_id})
    return tuple(codec.message(row, db.payloads) for row in await cursor.fetchall())


async def forward(db: Store, connection: Connection, run_id: uuid.UUID) -> int:
    """Send on, to the end of its chain, what came to a run after its successor had taken its inbox over: the sender
    had looked before. In the transaction that holds the run's row; rings there. Returns how many went on."""
    cursor = await connection.execute(db.sql.forward, {"run": run_id})
    row = await cursor.fetchone()
    assert row is not None  # a function's answer
    return int(row[0])


async def mark_seen(db: Store, connection: Connection, run_id: uuid.UUID, seqs: Iterable[int]) -> None:
    """Of messages that were looked at and left where they are: they are no reason to wake the run any more."""
    if wanted := list(seqs):
        await connection.execute(db.sql.see, {"run": run_id, "seqs": wanted})
