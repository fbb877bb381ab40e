"""The doorbell's job: something lies in a run's inbox.

It is never stale and never deduplicated. On a busy row it rings again a second later, together with all others that
found it busy: their messages are committed, and whoever locks the row next reads them all.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from durable.core import control
from durable.core.transition import Next, Transition
from durable.engine.advance import after_naps, burst, lock
from durable.engine.hold import Hold
from durable.engine.slots import Slot
from durable.store.errors import RowBusy
from durable.values import Status

if TYPE_CHECKING:
    from durable.engine.engine import Engine


async def deliver(engine: Engine, run_id: uuid.UUID, taken: Slot | None = None) -> None:
    """Look into the inbox of a run, and take the run on if something new lies there."""
    async with taken or engine.slots.one(run_id) as slot:
        try:
            hold = slot.hold or await lock(engine, run_id)
        except RowBusy:
            return await engine.ring_later(run_id)
        if hold is None:
            return
        parked = await _deliver(engine, hold, slot)
    await after_naps(engine, parked)


async def _deliver(engine: Engine, hold: Hold, slot: Slot) -> Transition | None:
    if hold.view.run.successor is not None:
        await hold.forward()
        return None
    if not any(message.fresh for message in hold.view.inbox):
        await hold.drop()
        return None
    if hold.view.run.claim is not None:
        await _tell_owner(engine, hold)
        return None
    compensating = hold.view.run.status is Status.COMPENSATING
    return await burst(engine, hold, slot, Next.COMPENSATE if compensating else Next.ADVANCE)


async def _tell_owner(engine: Engine, hold: Hold) -> None:
    """A claimed run belongs to its owner: requests are applied here, everything else is the owner's to read."""
    run_id = hold.view.run.id
    request = control.apply_next(hold.view, hold.now)
    if request is not None:
        await hold.write(request)
    else:
        await hold.drop()  # unread: if the owner dies before it looks, recovery sees a new message
    await engine.tell_owner(run_id)
