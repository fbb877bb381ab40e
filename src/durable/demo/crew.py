"""The demo's worker processes: ``durable worker``, as anybody would start them."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from durable.errors import DurableError

LAST_WORDS: Final = 20
"""Lines of a worker's log that are kept, to show why it has died."""
GRACE: Final = 15.0


class WorkerDied(DurableError):
    """A worker has ended that nobody has killed."""


@dataclass(eq=False, slots=True)
class Hand:
    """A worker process."""

    number: int
    process: Process
    said: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))
    listening: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


class Crew:
    """Those who work. They end with the block, and with this process, however that ends."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._command = [sys.executable, "-m", "durable.cli", "worker"]
        self._command += ["--import", "durable.demo.orders", "--import", "durable.demo.function"]
        self._command += ["--schema", schema, "--log-level", "warning", "--grace", f"{GRACE / 3:.0f}s"]
        self._environment = os.environ | {"DURABLE_DATABASE_URL": dsn, "DURABLE_EMBEDDED": "auto"}
        self._lifeline, self._held = os.pipe()
        self._all: list[Hand] = []
        self._killed: set[Hand] = set()

    @property
    def alive(self) -> list[Hand]:
        return [hand for hand in self._all if hand not in self._killed]

    async def hire(self) -> Hand:
        """Start another worker."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--lifeline",
            str(self._lifeline),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env=self._environment,
            pass_fds=(self._lifeline,),
            process_group=0,  # Ctrl-C is for the demo, which ends its workers in order
        )
        hand = Hand(len(self._all) + 1, process)
        hand.listening = asyncio.create_task(_listen(hand))
        self._all.append(hand)
        return hand

    def kill(self, hand: Hand) -> None:
        """``kill -9``: it has no time for anything."""
        self._killed.add(hand)
        hand.process.kill()

    def must_be_alive(self) -> None:
        """Raises WorkerDied."""
        for hand in self.alive:
            if hand.process.returncode is not None:
                words = "\n".join(hand.said) or "it said nothing"
                raise WorkerDied(f"worker {hand.number} ended by itself ({hand.process.returncode}):\n{words}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hand in self._all:
            with suppress(ProcessLookupError):
                hand.process.terminate()
        for hand in self._all:
            try:
                await asyncio.wait_for(hand.process.wait(), GRACE)
            except TimeoutError:
                hand.process.kill()
                await hand.process.wait()
            if hand.listening is not None:
                await hand.listening
        os.close(self._lifeline)
        os.close(self._held)


async def _listen(hand: Hand) -> None:
    assert hand.process.stderr is not None
    async for line in hand.process.stderr:
        hand.said.append(line.decode(errors="replace").rstrip())
