"""The runs of a database, read page by page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Any, Final

from durable.define.registry import Registry
from durable.replaying.recording import Recording
from durable.store.db import Pool, Store
from durable.store.read import page
from durable.store.recorded import load_recorded

PAGE: Final = 100


async def stored(
    db: Store,
    pool: Pool,
    registry: Registry,
    *,
    workflow: str | None = None,
    status: Collection[str] | None = None,
    limit: int | None = None,
) -> AsyncIterator[Recording]:
    """The runs of the workflows that `registry` has by name, in whatever version; the newest first, at most `limit`.

    One journal at a time is held in memory. Raises ConfigurationError for an unknown status.
    """
    filters: dict[str, Any] = {"workflow": workflow, "status": status}
    after: str | None = None
    left = limit
    while left is None or left > 0:
        async with pool.connection() as connection:
            found = await page(db, connection, **filters, limit=PAGE, after=after)
        for run in found:
            if run.workflow not in registry:
                continue
            async with pool.connection() as connection:
                loaded = await load_recorded(db, connection, run.id)
            if loaded is None:  # purged meanwhile
                continue
            yield Recording(*loaded)
            left = None if left is None else left - 1
            if left == 0:
                return
        after = found.next
        if after is None:
            return
