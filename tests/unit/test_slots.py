"""Slots without a database: who gets one, in which order, and what becomes of one when who waits is cancelled."""

from __future__ import annotations

import asyncio
import uuid
from typing import cast

import pytest

from durable.engine.hold import Hold
from durable.engine.slots import Heir, Slot, Slots


class Holding:
    """A hold that notes that it was let go."""

    discarded = False

    async def discard(self) -> None:
        self.discarded = True


def holding() -> tuple[Holding, Hold]:
    made = Holding()
    return made, cast(Hold, made)


async def had(slots: Slots) -> Slot:
    return await slots.one(uuid.uuid4()).__aenter__()


def waiting(slot: Slot) -> asyncio.Task[Slot]:
    return asyncio.create_task(slot.__aenter__())


def taken_out(slot: Slot, waits: Slot) -> Heir:
    """Out of the line: the first in it, which is `waits`."""
    heir = slot.heir()
    assert heir is not None
    assert heir.run_id == waits.run_id
    return heir


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_there_are_so_many() -> None:
    slots = Slots(2)
    first, second = await had(slots), await had(slots)
    assert slots.at_once(uuid.uuid4()) is None
    third = waiting(slots.one(uuid.uuid4()))
    await turn()
    assert not third.done()
    assert slots.pressure.is_set()
    first.give_back()
    (await third).give_back()
    assert not slots.pressure.is_set()
    second.give_back()
    second.give_back()  # once
    assert slots.free == 2
    at_once = slots.at_once(uuid.uuid4())
    assert at_once is not None
    async with at_once:
        assert slots.free == 1
    assert slots.free == 2


async def test_who_came_first_has_it_first() -> None:
    slots = Slots(1)
    slot, order = await had(slots), list[int]()

    async def have(number: int) -> None:
        async with slots.one(uuid.uuid4()):
            order.append(number)

    tasks = [asyncio.create_task(have(number)) for number in range(5)]
    await turn()
    slot.give_back()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    assert slots.free == 1


async def test_it_is_passed_on_with_a_run() -> None:
    slots = Slots(1)
    slot, (_, hold) = await had(slots), holding()
    first, second = slots.one(uuid.uuid4()), slots.one(uuid.uuid4())
    tasks = [waiting(first), waiting(second)]
    await turn()
    taken_out(slot, first).inherit(hold)
    slot.give_back()  # it is not this one's any more
    assert await tasks[0] is first
    assert first.hold is hold
    assert not tasks[1].done()
    first.give_back()
    assert (await tasks[1]).hold is None
    second.give_back()
    assert slots.free == 1


async def test_an_heir_that_is_put_back_is_the_first_again() -> None:
    slots = Slots(1)
    slot = await had(slots)
    first, second = slots.one(uuid.uuid4()), slots.one(uuid.uuid4())
    tasks = [waiting(first), waiting(second)]
    await turn()
    taken_out(slot, first).put_back()
    slot.give_back()
    assert await tasks[0] is first
    first.give_back()
    await tasks[1]
    second.give_back()
    assert slots.free == 1


async def test_spare_is_who_has_none_yet() -> None:
    slots = Slots(1)
    assert slots.promise() is None
    slot, (_, hold) = await had(slots), holding()
    first, second = slots.one(uuid.uuid4()), slots.one(uuid.uuid4())
    tasks = [waiting(first), waiting(second)]
    await turn()
    assert slots.spare == 2
    heir = taken_out(slot, first)
    assert slots.spare == 2
    heir.put_back()
    assert slots.spare == 2
    taken_out(slot, first).inherit(hold)
    assert slots.spare == 1
    (await tasks[0]).give_back()
    (await tasks[1]).give_back()
    assert slots.spare == 0


async def test_who_is_cancelled_does_not_wait() -> None:
    slots = Slots(1)
    slot, first = await had(slots), slots.one(uuid.uuid4())
    task = waiting(first)
    await turn()
    heir = taken_out(slot, first)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heir.gone
    heir.put_back()
    assert slots.spare == 0
    assert not slots.pressure.is_set()
    slot.give_back()
    assert slots.free == 1


async def test_pressure_goes_with_who_is_cancelled() -> None:
    slots = Slots(1)
    slot, task = await had(slots), waiting(slots.one(uuid.uuid4()))
    await turn()
    assert slots.pressure.is_set()
    task.cancel()
    await turn()
    assert not slots.pressure.is_set()
    assert slot.heir() is None
    slot.give_back()
    assert slots.free == 1


@pytest.mark.parametrize("with_run", [True, False])
async def test_what_was_granted_to_who_is_cancelled_goes_back(with_run: bool) -> None:
    slots = Slots(1)
    slot, (noted, hold) = await had(slots), holding()
    one = slots.one(uuid.uuid4())
    task = waiting(one)
    await turn()
    if with_run:
        taken_out(slot, one).inherit(hold)
    else:
        slot.give_back()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert noted.discarded is with_run
    assert slots.free == 1


async def test_who_has_none_passes_none_on() -> None:
    slots = Slots(1)
    slot = await had(slots)
    one = slots.one(uuid.uuid4())
    task = waiting(one)
    await turn()
    assert slots.one(uuid.uuid4()).heir() is None
    slot.give_back()  # its handler was detached
    assert slot.heir() is None
    await task
    one.give_back()
    assert slots.free == 1
