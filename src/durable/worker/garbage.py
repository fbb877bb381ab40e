"""How often a process that does nothing but work looks for garbage.

Nearly all that a step leaves behind goes away without Python's cycle collector, which would look through it every few
steps all the same: a tenth of a worker's time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

THRESHOLDS: Final = (20_000, 20, 20)
"""So many objects more than before, and the young ones are looked through; the older ones every 20th time."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """In this block the whole process collects less often; what it has loaded by now is not looked at again."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
