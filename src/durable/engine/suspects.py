"""Steps that were running when their worker died, again: one at a time in a worker, so that a killer is charged alone.

The first crash makes nobody a suspect: it mostly comes from outside (a deploy, the kernel's out-of-memory killer), and
twenty long steps that were taken over together must not have to wait for each other. The second one does, and so does
any crash after which the next would fail the step.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from durable.core.transition import Call, Fanout

_ADMITTED: Final = nullcontext(True)


class Suspects:
    """Which run a worker watches, if it watches one. `max_crashes`: how many crashes fail a step."""

    def __init__(self, max_crashes: int) -> None:
        self._from = max(1, min(2, max_crashes - 1))
        self._running: uuid.UUID | None = None

    @property
    def watching(self) -> bool:
        """Whether a suspect runs."""
        return self._running is not None

    def admit(self, run_id: uuid.UUID, work: Call | Fanout) -> AbstractContextManager[bool]:
        """True if `work` may run now; a suspect keeps others out until the block ends."""
        for call in work.calls:
            if call.crashes >= self._from:
                return self._alone(run_id)
        return _ADMITTED

    @contextmanager
    def _alone(self, run_id: uuid.UUID) -> Iterator[bool]:
        if self._running is not None:
            yield False
        else:
            self._running = run_id
            try:
                yield True
            finally:
                self._running = None
