"""Steps that were running when their worker died: one at a time in a worker, so that a killer is soon charged alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from durable.core.transition import Call, Fanout


class Suspects:
    def __init__(self) -> None:
        self._running: uuid.UUID | None = None

    @contextmanager
    def admit(self, run_id: uuid.UUID, work: Call | Fanout) -> Iterator[bool]:
        """True if `work` may run now; a suspect keeps others out until the block ends."""
        if not any(call.crashes for call in work.calls):
            yield True
        elif self._running is not None:
            yield False
        else:
            self._running = run_id
            try:
                yield True
            finally:
                self._running = None
