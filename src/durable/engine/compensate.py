"""The rollback's job: the same corridor as `advance.py`, walked backwards.

The plan of a compensating run is `core/undo.py`: the newest finished entry that has a compensator, one a transaction,
each with a journal entry of its own and a cursor, so that a rollback survives crashes as the forward path does.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from durable.core.transition import Next
from durable.engine.advance import continue_run
from durable.engine.slots import Slot

if TYPE_CHECKING:
    from durable.engine.engine import Engine


async def compensate(engine: Engine, run_id: uuid.UUID, revision: int, taken: Slot | None = None) -> None:
    """The continuation of a rollback at `revision`: does nothing when the run has moved on, or is claimed."""
    await continue_run(engine, run_id, revision, Next.COMPENSATE, taken)
