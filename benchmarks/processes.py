"""Worker processes of a measurement: started, talked to by lines, and ended by their own ids.

A worker ends when its standard input does: none outlives the process that started it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final, TypeAlias

LIMIT: Final = 60.0
"""Seconds that a worker may take to start or to end."""

Said: TypeAlias = "tuple[WorkerProcess, str]"


class WorkerProcess:
    """A process of ``python -m MODULE ...``. What it says goes, line by line, into the queue that it was given."""

    def __init__(self, process: Process, said: asyncio.Queue[Said]) -> None:
        self._process, self._said, self.killed = process, said, False
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._said.put_nowait((self, line.decode().strip()))
        self._said.put_nowait((self, "ended"))

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    def kill(self) -> float:
        """``kill -9``. Returns the time of it, in seconds since the epoch."""
        self.killed = True
        self._process.kill()
        return time.time()

    async def end(self) -> None:
        """Let it end by itself; kill it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), LIMIT)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._reading


class Crew:
    """The worker processes of one measurement."""

    def __init__(self, module: str, arguments: Sequence[str], stack: AsyncExitStack) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._stack = stack
        self._said: asyncio.Queue[Said] = asyncio.Queue()

    async def start(self) -> WorkerProcess:
        """One more, started and not waited for."""
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE)
        worker = WorkerProcess(process, self._said)
        self._stack.push_async_callback(worker.end)
        return worker

    async def start_ready(self, count: int = 1) -> list[WorkerProcess]:
        """So many more, once each has said ``ready``."""
        workers = [await self.start() for _ in range(count)]
        waited_for = set(workers)
        while waited_for:
            waited_for.discard((await self.next("ready"))[0])
        return workers

    async def next(self, word: str, *, limit: float = LIMIT) -> Said:
        """The next worker that says `word`, and the rest of its line. What else is said until then is passed over.

        Raises TimeoutError after `limit` seconds; RuntimeError if a worker ends that was not killed.
        """
        async with asyncio.timeout(limit):
            while True:
                worker, line = await self._said.get()
                first, _, rest = line.partition(" ")
                if first == word:
                    return worker, rest
                if first == "ended" and not worker.killed:
                    raise RuntimeError(f"worker {worker.pid} has ended by itself")


@asynccontextmanager
async def crew(module: str, *arguments: str) -> AsyncIterator[Crew]:
    """Worker processes of ``python -m MODULE ARGUMENTS``, which end with the block."""
    async with AsyncExitStack() as stack:
        yield Crew(module, arguments, stack)


async def stdin_ended() -> None:
    """In a worker: wait until whoever started it wants it to end, or is gone."""
    while await asyncio.to_thread(sys.stdin.readline):
        pass


def say(line: str) -> None:
    """In a worker: tell whoever started it."""
    print(line, flush=True)
