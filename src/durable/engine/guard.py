"""Around every stretch of a body: no event loop is in reach, and nothing runs on for longer than a second.

A body runs on the thread of the event loop, and everything else waits for it. A thread of its own looks at it, and
raises :class:`Stuck` in one that has gone on for too long. That works for Python code; one that is stuck in C ends with
the process, by the worker's watchdog.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import sysconfig
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self

from durable.core.functions.answers import Stuck

LIMIT: Final = 0.75
"""Seconds that a body may run without awaiting an operation; with the time until that is seen, less than a second."""
LOOK: Final = 0.1

_STDLIB: Final = sysconfig.get_path("stdlib")

NOTHING: Final[ctypes.py_object[Any]] = ctypes.py_object()
"""NULL, which takes back what was raised. None would be raised itself."""

_raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in_thread.argtypes = (ctypes.c_ulong, ctypes.py_object)


class _NoLoop:
    """In the place of the running event loop: whoever asks anything of it is told that there is none, and noted."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        if self._guard.touched is None:
            self._guard.touched = _users_line()
        raise RuntimeError("no event loop is in reach of a workflow's body")


class Guard:
    """A context manager, entered by one thread at a time. `touched`: where what ran in it reached for the event loop,
    as ``file:line``."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.touched: str | None = None
        self._limit = limit
        self._since: float | None = None
        self._thread = 0
        self._raised = False
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._closed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._no_loop: Any = _NoLoop(self)

    def __enter__(self) -> Self:
        if self._watcher is None:
            self._watch()
        self.touched = None
        self._loop = asyncio._get_running_loop()
        self._thread = threading.get_ident()
        asyncio._set_running_loop(self._no_loop)
        self._since = time.monotonic()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        while True:
            try:
                return self._leave()
            except Stuck:  # it came too late: what was to be stopped has ended by itself
                continue

    def _leave(self) -> None:
        """Nothing after this may be hit. May be called again, if it was hit itself."""
        with self._lock:
            self._since = None
            if self._raised:  # it may still be on its way
                _raise_in_thread(self._thread, NOTHING)
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


def _users_line() -> str:
    """``file:line`` of the innermost code that is neither Python's own nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_STDLIB, __file__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"
