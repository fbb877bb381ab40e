"""How many handlers may hold a connection while they run: the pool less two, which are left to those that end.

A handler that holds its slot while others wait for one is detached early: `wanted` says so. A job that is over locks
the run of whoever waits for longest in the flush that ends its own, and passes that on with slot and connection.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from durable.engine.hold import Hold


class Slot:
    """The right to hold a connection while user code runs: ``async with`` waits for it. Given back once, by whoever
    comes first.

    - `run_id`: for which run; `revision`: where that is expected to be, if that is known.
    - `hold`: the run, if it was locked with the slot.
    """

    def __init__(self, slots: Slots, run_id: uuid.UUID, revision: int | None) -> None:
        self.run_id, self.revision = run_id, revision
        self.hold: Hold | None = None
        self._slots: Slots | None = slots
        self._turn: asyncio.Future[None] | None = None
        self._had = False

    async def __aenter__(self) -> Self:
        if not self._had and self._slots is not None:
            await self._slots.acquire(self)
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
            slots.release()

    def heir(self) -> Heir | None:
        """Whoever waits for longest, taken out of the line: to be given this slot, or put back."""
        waiting = self._slots.promise() if self._slots is not None and self._had else None
        return Heir(self, waiting) if waiting is not None else None

    def hand_to(self, waiting: Slot) -> None:
        """`waiting`, which still does, has it now."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.kept()
        waiting.grant()

    def put_back(self, waiting: Slot) -> None:
        """`waiting` waits again, before all others."""
        if self._slots is not None:
            self._slots.take_back(waiting)

    # ---------------------------------------------------------------- waiting

    def wait(self) -> asyncio.Future[None]:
        """Done when it is granted."""
        self._turn = asyncio.get_running_loop().create_future()
        return self._turn

    def grant(self) -> None:
        self._had = True
        if self._turn is not None:
            self._turn.set_result(None)

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._turn is None or self._turn.done()

    async def refuse(self) -> None:
        """Whoever waited was cancelled: what was granted at that moment goes back."""
        if self.hold is not None:
            await self.hold.discard()
        self.give_back()


class Heir:
    """Whoever had waited for longest for what `slot` gives: `inherit`, or `put_back`."""

    def __init__(self, slot: Slot, waiting: Slot) -> None:
        self._slot, self._waiting = slot, waiting
        self.run_id, self.revision = waiting.run_id, waiting.revision

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more."""
        return self._waiting.gone

    def inherit(self, hold: Hold) -> None:
        """Let it, which is not gone, have the slot, and its run locked."""
        self._waiting.hold = hold
        self._slot.hand_to(self._waiting)

    def put_back(self) -> None:
        """It waits again, before all others."""
        self._slot.put_back(self._waiting)


class Slots:
    """`count` of them. `pressure` is set while somebody waits."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.pressure = asyncio.Event()
        self._waiting: deque[Slot] = deque()
        self._promised = 0  # that were taken out of the line, to inherit a slot

    @property
    def spare(self) -> int:
        """How many jobs there are beyond those that have a slot."""
        return len(self._waiting) + self._promised

    def one(self, run_id: uuid.UUID, revision: int | None = None) -> Slot:
        """For ``async with``."""
        return Slot(self, run_id, revision)

    def at_once(self, run_id: uuid.UUID) -> Slot | None:
        """One that is free now, had already. None: one would have to wait for it."""
        if not self.free:
            return None
        self.free -= 1
        slot = self.one(run_id)
        slot.grant()
        return slot

    async def acquire(self, slot: Slot) -> None:
        """Grant it, in the order in which they came."""
        if self.free:
            self.free -= 1
            return slot.grant()
        turn = slot.wait()
        self._waiting.append(slot)
        self.pressure.set()
        try:
            await turn
        except asyncio.CancelledError:
            self.forget(slot)
            await slot.refuse()
            raise

    def release(self) -> None:
        if (heir := self.next()) is not None:
            heir.grant()
        else:
            self.free += 1

    def next(self) -> Slot | None:
        """Take whoever waits for longest out of the line."""
        found = None
        while found is None and self._waiting:
            first = self._waiting.popleft()
            found = None if first.gone else first
        self._ease()
        return found

    def promise(self) -> Slot | None:
        """As `next`: who it is gets a slot soon (`kept`), or waits again (`take_back`)."""
        found = self.next()
        if found is not None:
            self._promised += 1
        return found

    def kept(self) -> None:
        """A slot was passed on as promised."""
        self._promised -= 1

    def take_back(self, slot: Slot) -> None:
        """It waits again, before all others; unless it does not any more."""
        self._promised -= 1
        if not slot.gone:
            self._waiting.appendleft(slot)
            self.pressure.set()

    def forget(self, slot: Slot) -> None:
        """It does not wait any more."""
        with suppress(ValueError):
            self._waiting.remove(slot)
        self._ease()

    def _ease(self) -> None:
        if not self._waiting:
            self.pressure.clear()
