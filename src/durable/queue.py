"""Jobs: what they are called, and what they carry. The queue only rings; the run's row is the truth.

A *continuation* takes a run on from one revision, is enqueued only under the run's row lock, and does nothing when it
is stale. A *doorbell* carries the run alone, says that something lies in its inbox, and is never stale. How they are
put into the queue (priority bands, deduplication) says the database function ``enqueue``, which serves callers in SQL,
too: ``migrations/functions.sql``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, TypedDict

from durable.errors import ConfigurationError

ADVANCE: Final = "durable.advance"
COMPENSATE: Final = "durable.compensate"
RING: Final = "durable.ring"

DEFAULT_QUEUE: Final = "durable"
MAX_PRIORITY: Final = 499_999
"""The largest priority of a run, and with a minus the smallest: beyond it the bands would touch."""

RERING: Final = timedelta(seconds=1)
"""The time after which a doorbell that found the row busy rings again."""


class Continuation(TypedDict):
    """The arguments of ``durable.advance`` and ``durable.compensate``."""

    run_id: str
    revision: int


class Doorbell(TypedDict):
    """The arguments of ``durable.ring``."""

    run_id: str


def valid_queue(name: str) -> str:
    """`name`, if it can be a queue's: NOTIFY refuses longer ones, and their inserts with them."""
    if not 0 < len(name.encode()) <= 40:
        raise ConfigurationError(f"{name!r} cannot be a queue's name: 1 to 40 bytes")
    return name
