"""What app code asks of a run, applied at once where the row is free: by the asking process, with the worker's code,
needing neither a worker nor the definition. Where it is busy, a message and a doorbell do it.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Literal

from durable.core import control
from durable.core.state import Message, MessageKind, View
from durable.engine.desk import Desk
from durable.engine.hold import Hold, take
from durable.errors import RunNotFound
from durable.store import operations, read
from durable.values import JsonText, Status


async def cancel(desk: Desk, run_id: uuid.UUID, reason: str | None, *, compensate: bool) -> bool:
    """Stop a run now, or roll it back first. False if it has ended already. Raises RunNotFound."""
    body = json.dumps({"reason": reason, "compensate": compensate})
    return await _request(desk, run_id, MessageKind.CANCEL, body)


async def pause(desk: Desk, run_id: uuid.UUID) -> bool:
    """Hold a run after the step in progress. False if it is paused, rolling back, or has ended. Raises RunNotFound."""
    return await _request(desk, run_id, MessageKind.PAUSE)


async def unpause(desk: Desk, run_id: uuid.UUID) -> bool:
    """The other half of pause. False if the run is not paused. Raises RunNotFound."""
    return await _request(desk, run_id, MessageKind.RESUME)


async def retry(desk: Desk, run_id: uuid.UUID) -> Literal["accepted", "refused", "undone", "busy"]:
    """Take a failed run up again. ``undone``: entries of it were, and nobody knows what it would go on from."""
    hold = await take(desk, run_id, mode="skip")
    if hold is None:
        await _must_exist(desk, run_id)
        return "busy"
    if hold.view.run.status is Status.FAILED and control.was_undone(hold.view):
        await hold.drop()
        return "undone"
    transition = control.retry(hold.view, hold.now)
    if transition is None:
        await hold.drop()
        return "refused"
    await hold.write(transition)
    return "accepted"


async def _request(desk: Desk, run_id: uuid.UUID, kind: MessageKind, body: JsonText | None = None) -> bool:
    hold = await take(desk, run_id, mode="skip")
    if hold is not None and not _has_requests(hold.view):
        return await _apply(desk, hold, kind, body)
    if hold is not None:
        await hold.drop()  # others asked before: the inbox keeps the order
    async with desk.pool.connection() as connection:
        sent = await operations.execute_async(operations.send(desk.store, run_id, kind, body=body), connection)
    if sent.answer == "unknown":
        raise RunNotFound(run_id)
    return sent.answer != "finished"


async def _apply(desk: Desk, hold: Hold, kind: MessageKind, body: JsonText | None) -> bool:
    run = hold.view.run
    if not control.takes_effect(run, kind):
        await hold.drop()
        return False
    request = Message(seq=0, kind=kind, name=None, body=body, sent_at=datetime.now(UTC))
    await hold.write(control.apply(hold.view, request, hold.now))
    if run.claim is not None:
        await desk.tell_owner(run.id)
    return True


def _has_requests(view: View) -> bool:
    return any(message.kind in control.REQUESTS for message in view.inbox)


async def _must_exist(desk: Desk, run_id: uuid.UUID) -> None:
    async with desk.pool.connection() as connection:
        if await read.status_of(desk.store, connection, run_id) is None:
            raise RunNotFound(run_id)
