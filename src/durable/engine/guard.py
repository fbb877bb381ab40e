"""Around every stretch of a body: no event loop is in reach, and nothing runs on for longer than a second.

A body runs on the thread of the event loop, and everything else waits for it. A thread of its own looks at it, and
raises :class:`Stuck` in one that has gone on for too long. That works for Python code; one that is stuck in C ends with
the process, by the worker's watchdog.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from types import TracebackType
from typing import Any, Final, Self

from durable.core.functions.answers import Stuck

LIMIT: Final = 0.75
"""Seconds that a body may run without awaiting an operation; with the time until that is seen, less than a second."""
LOOK: Final = 0.1

NOTHING: Final[ctypes.py_object[Any]] = ctypes.py_object()
"""NULL, which takes back what was raised. None would be raised itself."""

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in_thread.argtypes = (ctypes.c_ulong, ctypes.py_object)


class Guard:
    """A context manager, entered by one thread at a time, perhaps within itself: the outermost entry counts."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit = limit
        self._depth = 0
        self._since: float | None = None
        self._thread = 0
        self._raised = False
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._loop = asyncio._get_running_loop()
            asyncio._set_running_loop(None)
            self._thread = threading.get_ident()
            self._since = time.monotonic()
            if self._watcher is None:
                self._watch()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            with self._lock:
                self._since = None
                if self._raised:  # it may still be on its way: nothing after this line may be hit
                    _raise_in_thread(self._thread, NOTHING)
        finally:
            self._raised = False
            asyncio._set_running_loop(self._loop)

    def close(self) -> None:
        """No more bodies will run."""
        self._closed.set()

    def _watch(self) -> None:
        self._watcher = threading.Thread(target=self._look, name="durable-guard", daemon=True)
        self._watcher.start()

    def _look(self) -> None:
        while not self._closed.wait(LOOK):
            with self._lock:
                if self._since is not None and time.monotonic() - self._since > self._limit:
                    self._raised = True
                    _raise_in_thread(self._thread, Stuck)
                    self._since = time.monotonic()  # again, should it go on all the same
