"""The bridge from blocking code to an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from durable.errors import ConfigurationError
from durable.portal import Portal


@pytest.fixture
def portal() -> Iterator[Portal]:
    portal = Portal("test portal")
    yield portal
    portal.close()


async def where() -> tuple[asyncio.AbstractEventLoop, str]:
    return asyncio.get_running_loop(), threading.current_thread().name


def test_it_starts_with_the_first_call_and_keeps_its_loop(portal: Portal) -> None:
    assert not portal.running
    first = portal.call(where)
    assert portal.running
    assert first[1] == "test portal"
    assert portal.call(where) == first


def test_what_the_call_returns_and_raises(portal: Portal) -> None:
    async def add(a: int, *, b: int) -> int:
        if b < 0:
            raise ValueError("negative")
        return a + b

    assert portal.call(add, 1, b=2) == 3
    with pytest.raises(ValueError, match="negative"):
        portal.call(add, 1, b=-2)


def test_many_threads_share_it(portal: Portal) -> None:
    with ThreadPoolExecutor(16) as threads:
        loops = {threads.submit(portal.call, where).result(10)[0] for _ in range(64)}
    assert len(loops) == 1


async def test_it_refuses_inside_a_running_loop(portal: Portal) -> None:
    with pytest.raises(ConfigurationError, match="use AsyncDurable"):
        portal.call(where)  # a coroutine that was made and never awaited would be a warning, and so an error
    assert not portal.running


def test_who_gives_up_waiting_cancels_the_call(portal: Portal) -> None:
    began, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    future = portal.submit(forever)
    assert began.wait(10)
    future.cancel()
    assert cancelled.wait(10)


def test_close_awaits_the_last_words_and_ends_what_runs(portal: Portal) -> None:
    said: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            said.append("cancelled")

    async def last() -> None:
        said.append("last")

    future = portal.submit(forever)
    thread = portal.call(where)[1]
    portal.close(last)
    assert said == ["last", "cancelled"]
    assert future.cancelled()
    assert thread not in {one.name for one in threading.enumerate()}
    portal.close(last)  # idempotent
    assert said == ["last", "cancelled"]


def test_a_call_after_close_starts_another_loop(portal: Portal) -> None:
    first, _ = portal.call(where)
    portal.close()
    assert first.is_closed()
    second, _ = portal.call(where)
    assert second is not first


def test_it_is_not_closed_from_within(portal: Portal) -> None:
    async def suicide() -> None:
        portal.close()

    with pytest.raises(ConfigurationError, match="from the thread that it would end"):
        portal.call(suicide)


def test_post_reaches_only_a_running_loop(portal: Portal) -> None:
    posted = threading.Event()
    portal.post(posted.set)
    assert not posted.is_set()
    portal.call(where)
    portal.post(posted.set)
    assert posted.wait(10)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: it has threads, and forks
def test_a_forked_child_starts_its_own(portal: Portal) -> None:
    portal.call(where)
    portal._lock.acquire()  # as another thread may have at the moment of the fork
    child = os.fork()
    if child == 0:
        try:
            fresh = not portal.running
            portal.call(where)
            os._exit(0 if fresh else 1)
        except BaseException:
            os._exit(2)
    portal._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert portal.call(where)[1] == "test portal"
