"""An event loop in a thread of its own: how blocking code calls async code.

The thread is a daemon, starts with the first call and ends with `close`; a call after that starts another one. A forked
child has none of its parent's threads: its portal is as if it had never been used.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from durable.errors import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")

_all: weakref.WeakSet[Portal] = weakref.WeakSet()
_of_parents: list[object] = []
"""What a forked child has inherited and must not touch, not even by collecting it."""


class Portal:
    """Runs coroutine functions for any thread that runs no event loop itself. Safe to share between threads."""

    def __init__(self, name: str = "durable") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        _all.add(self)

    @property
    def running(self) -> bool:
        """Whether there is a loop now: a call was made, and the portal was not closed since."""
        return self._loop is not None

    def call(self, fn: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """``await fn(*args, **kwargs)`` on the loop, and wait for it here. Interrupted here (Ctrl-C), it is cancelled.

        Raises what it raises; ConfigurationError where a loop is running, which would stand still meanwhile.
        """
        refuse_running_loop()
        future = self.submit(fn, *args, **kwargs)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # nothing, if it is what the call raised
            raise

    def submit(self, fn: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `call`, without waiting."""
        with self._lock:  # so that `close` does not stop the loop in between
            return asyncio.run_coroutine_threadsafe(fn(*args, **kwargs), self._started())

    def post(self, fn: Callable[[], object]) -> None:
        """Call `fn` on the loop, soon. Nothing happens if the portal is not running."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(fn)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """End the thread, after having awaited `last()` there. What still runs is cancelled. Idempotent."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None:
                return
            if thread is threading.current_thread():
                raise ConfigurationError("close() was called from the thread that it would end")
            self._loop = self._thread = None
        try:
            if last is not None:
                asyncio.run_coroutine_threadsafe(last(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            # psycopg knows no proactor, the default of Windows
            self._loop = asyncio.SelectorEventLoop() if sys.platform == "win32" else asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True)
            self._thread.start()
        return self._loop

    def _forget(self) -> None:
        """In a forked child: the thread is not there, and the lock may be held by one that is not there either."""
        _of_parents.append((self._loop, self._thread))
        self._lock, self._loop, self._thread = threading.Lock(), None, None


def refuse_running_loop() -> None:
    """Raise ConfigurationError if this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(
        "Durable was called inside a running event loop, which would stand still meanwhile: use AsyncDurable there "
        "(`await app.start(...)`), or call it in a thread (`await asyncio.to_thread(app.start, ...)`)"
    )


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The thread's whole life. Does not know the portal, which so can be collected."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def keep(what: object) -> None:
    """In a forked child: never collect what belongs to the parent."""
    _of_parents.append(what)


def close_at_exit(close: Callable[[], None]) -> None:
    """Call the bound method `close` when the interpreter ends, if its object still is there: before whatever was
    registered earlier, as the end of the embedded database is."""
    method = weakref.WeakMethod(close)
    made_by = os.getpid()

    def at_exit() -> None:
        still_there = method()
        if still_there is not None and os.getpid() == made_by:
            still_there()

    atexit.register(at_exit)


def _after_fork() -> None:
    for portal in list(_all):
        portal._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
