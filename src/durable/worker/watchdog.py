"""Ends the process when its event loop is stuck: a handler that blocks it would hold every other run of this worker.

By then the server has ended the worker's liveness session, which only the loop keeps alive, and others have taken over.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from typing import Final

log = logging.getLogger(__name__)

PATIENCE: Final = 60.0
EXIT_CODE: Final = 70


class Watchdog:
    """A thread that asks the loop for a sign of life."""

    def __init__(self, loop: asyncio.AbstractEventLoop, patience: float = PATIENCE) -> None:
        self._loop, self._patience = loop, patience
        self._seen = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="durable watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._patience / 10):
            try:
                self._loop.call_soon_threadsafe(self._mark)
            except RuntimeError:  # the loop is closed
                return
            if time.monotonic() - self._seen > self._patience:
                log.critical("the event loop has been blocked for %.0f s: ending this process", self._patience)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(EXIT_CODE)

    def _mark(self) -> None:
        self._seen = time.monotonic()
