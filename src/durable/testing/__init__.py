"""For the tests of those who use durable: drive workflows in process, move the clock, crash, look at what happened.

pytest imports this package wherever durable is installed: what it offers is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from durable.testing.harness import AsyncHarness, Harness
    from durable.testing.histories import History, assert_history
    from durable.testing.replays import replay

_LATE: Final = {
    "AsyncHarness": "durable.testing.harness",
    "Harness": "durable.testing.harness",
    "History": "durable.testing.histories",
    "assert_history": "durable.testing.histories",
    "replay": "durable.testing.replays",
}

__all__ = ["AsyncHarness", "Harness", "History", "assert_history", "replay"]


def __getattr__(name: str) -> Any:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value
