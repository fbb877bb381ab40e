"""What the engine of this process has done, for handlers that wait for that instead of for the clock.

A handler that is to be in flight when its run is claimed, or while a doorbell gives up, can't know how long that takes:
it asks the witness, which every worker of the suite tells what it passes.
"""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict

from durable.core.state import View
from durable.engine.points import Point


class Witness:
    """Part of a worker's hook. Handlers in threads may ask as well."""

    def __init__(self) -> None:
        self._flights: defaultdict[uuid.UUID, list[threading.Event]] = defaultdict(list)
        self.gave_up = 0
        """How many jobs found their row busy for too long."""
        self.told_to_end = threading.Event()
        """The worker has got SIGTERM."""

    def __call__(self, point: Point, view: View | None) -> None:
        if point is Point.BEFORE_RERING:
            self.gave_up += 1
        if view is None:
            return
        if point is Point.BEFORE_HANDLER:
            self._takes_off(view)
        if point is Point.AFTER_CLAIM:
            for flight in self._flights.pop(view.run.id, []):
                flight.set()

    def detached(self, run_id: uuid.UUID) -> threading.Event:
        """Set when the row is free of the handler that begins now. Of two that execute one run at once, after a lost
        connection, the first detaches both: that only ends a wait earlier."""
        return self._flights[run_id][-1]

    def _takes_off(self, view: View) -> None:
        flight = threading.Event()
        if view.run.claim is not None:
            flight.set()
        self._flights[view.run.id].append(flight)
