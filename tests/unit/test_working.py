"""A worker in the foreground: what stops it."""

from __future__ import annotations

import asyncio
import signal
from typing import cast

import pytest

from durable.worker import Worker
from durable.working import _stopped_by_signals


class Stopped(Exception):
    """What ends the block, as Ctrl-C does."""


async def test_where_the_loop_hears_no_signals_they_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: Ctrl-C ends the block by its exception."""
    asked = list[int]()

    def refuse(number: int, *_: object) -> None:
        asked.append(number)
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped), _stopped_by_signals(cast(Worker, None)):
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        raise Stopped
    assert asked == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
