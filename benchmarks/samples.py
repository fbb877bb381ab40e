"""Single values, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from benchmarks.load import RESTING

WARMING: Final = 5
"""Values that do not count."""


async def warm_samples(once: Callable[[], Awaitable[float]], count: int) -> list[float]:
    """So many values of `once`, when it is warm, each after a rest."""
    values = []
    for _ in range(WARMING + count):
        await asyncio.sleep(RESTING)
        values.append(await once())
    return values[WARMING:]
