"""Several processes of one command, each replaced when it dies, all ended together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from durable.cli.problems import DONE, FAILED

log = logging.getLogger("durable.worker")

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
STABLE: Final = 30.0
"""Seconds after which a process that dies is no sign of something that kills each one at its start."""


async def supervise(command: Sequence[str], count: int, *, environment: Mapping[str, str]) -> int:
    """Keep `count` processes of the command alive until SIGTERM or SIGINT; returns the exit code.

    The command gets ``--lifeline N``, a pipe that ends with this process: nobody outlives it, however it ends.
    """
    read, write = os.pipe()
    crew = Crew([*command, "--lifeline", str(read)], read, environment)
    loop = asyncio.get_running_loop()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, crew.heed, number)
        codes = await asyncio.gather(*(crew.keep_one() for _ in range(count)))
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        os.close(write)
        os.close(read)
    return DONE if not any(codes) else FAILED


class Crew:
    """The processes that are alive."""

    def __init__(self, command: Sequence[str], lifeline: int, environment: Mapping[str, str]) -> None:
        self._command, self._lifeline, self._environment = command, lifeline, environment
        self._alive: set[Process] = set()
        self._stop = asyncio.Event()

    def heed(self, number: int) -> None:
        """The first signal ends all in order, the second at once."""
        if self._stop.is_set():
            for process in self._alive:
                process.kill()
            os._exit(128 + number)
        log.info(
            "%s: ending %d processes in order, again to end at once", signal.Signals(number).name, len(self._alive)
        )
        self._stop.set()
        for process in self._alive:
            with suppress(ProcessLookupError):
                process.terminate()

    async def keep_one(self) -> int:
        """One process, and another one whenever it dies; returns the exit code of the last."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code = await self._run_one()
            if self._stop.is_set():
                return code
            pause = FIRST_PAUSE if time.monotonic() - began > STABLE else pause
            log.error("a process ended unexpectedly (%s), starting another one in %.1f s", _named(code), pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
            if self._stop.is_set():
                return DONE
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _run_one(self) -> int:
        # A process group of its own: Ctrl-C reaches this process only, which tells the others once.
        process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, pass_fds=(self._lifeline,), process_group=0
        )
        self._alive.add(process)
        log.info("process %d was started", process.pid)
        if self._stop.is_set():  # the signal came in between
            process.terminate()
        try:
            return await process.wait()
        finally:
            self._alive.discard(process)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
