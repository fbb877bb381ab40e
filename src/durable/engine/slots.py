"""How many handlers may hold a connection while they run: the pool less two, which are left to those that end.

A handler that holds its slot while others wait for one is detached early: `wanted` says so.
"""

from __future__ import annotations

import asyncio
from typing import Self


class Slot:
    """The right to hold a connection while user code runs: ``async with`` waits for it. Given back once, by whoever
    comes first."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots
        self._had = False

    async def __aenter__(self) -> Self:
        if self._slots is not None and not self._had:
            await self._slots.acquire()
            self._had = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.give_back()

    async def wanted(self) -> None:
        """Return as soon as somebody waits for a slot."""
        if self._slots is not None:
            await self._slots.pressure.wait()

    def give_back(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None and self._had:
            slots.free.release()


class Slots:
    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)
        self.pressure = asyncio.Event()
        self._waiting = 0

    def one(self) -> Slot:
        """For ``async with``."""
        return Slot(self)

    async def at_once(self) -> Slot | None:
        """One that is free now, had already. None: somebody would have to wait."""
        return await Slot(self).__aenter__() if not self.free.locked() else None

    async def acquire(self) -> None:
        """Wait for a slot; while somebody does, there is pressure."""
        self._waiting += 1
        if self.free.locked():
            self.pressure.set()
        try:
            await self.free.acquire()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.pressure.clear()
