"""What was sent to a run and has not been taken. To be read under its lock, in a statement of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from durable.core.state import Message
from durable.store import codec
from durable.store.connection import Connection
from durable.store.db import Store
from durable.store.flush import send


async def load_inbox(db: Store, connection: Connection, run_id: uuid.UUID) -> tuple[Message, ...]:
    """The untaken messages, oldest first."""
    answer = await send(connection, db.sql.inbox, {"run": run_id})
    return tuple(codec.message(row, db.payloads) for row in answer.rows)


async def forward(db: Store, connection: Connection, run_id: uuid.UUID) -> int:
    """Send on, to the end of its chain, what came to a run after its successor had taken its inbox over: the sender
    had looked before. In the transaction that holds the run's row; rings there. Returns how many went on."""
    answer = await send(connection, db.sql.forward, {"run": run_id})
    assert answer.row is not None  # a function's answer
    return int(answer.row[0])


async def mark_seen(db: Store, connection: Connection, run_id: uuid.UUID, seqs: Iterable[int]) -> None:
    """Of messages that were looked at and left where they are: they are no reason to wake the run any more."""
    if wanted := list(seqs):
        await send(connection, db.sql.see, {"run": run_id, "seqs": wanted})
