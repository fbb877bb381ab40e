"""Bodies of functions that this process has driven, kept for when their runs go on.

A body is a cache of the journal: valid for the revision that it was driven at, and for no other.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass

from durable.core.functions.body import Body
from durable.core.journal import Journal


@dataclass(frozen=True, slots=True)
class Kept:
    """A body, and the journal that it was driven with, as they stood at one revision of their run."""

    revision: int
    journal: Journal
    body: Body


class Bodies:
    """At most `limit` bodies; those that were used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[uuid.UUID, Kept] = OrderedDict()

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._kept

    def take(self, run_id: uuid.UUID, revision: int) -> Kept | None:
        """The body of a run at `revision`, which is the caller's now; one of another revision is closed."""
        kept = self._kept.pop(run_id, None)
        if kept is not None and kept.revision != revision:
            kept.body.close()
            return None
        return kept

    def keep(self, run_id: uuid.UUID, kept: Kept) -> None:
        """Keep a body, in the place of the one that has not been used for longest."""
        before, self._kept[run_id] = self._kept.pop(run_id, None), kept
        if before is not None and before.body is not kept.body:
            before.body.close()
        while len(self._kept) > self._limit:
            _, oldest = self._kept.popitem(last=False)
            oldest.body.close()

    def close(self) -> None:
        """End them all."""
        for kept in self._kept.values():
            kept.body.close()
        self._kept.clear()
