"""A process that only works looks for garbage rarely, and as before when it has ended."""

from __future__ import annotations

import gc

import pytest

from durable.worker.garbage import THRESHOLDS, rarely_collected


def test_thresholds_and_what_was_loaded_come_back() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ValueError, match="in the middle"), rarely_collected():
        assert gc.get_threshold() == THRESHOLDS
        assert gc.get_freeze_count() > frozen
        raise ValueError("in the middle")
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_cycles_are_still_collected() -> None:
    with rarely_collected():
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1
