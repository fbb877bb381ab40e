"""An app that works itself: the worker that it opens, in the foreground or in the background of a block."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from durable.durable import AsyncDurable
    from durable.worker import Worker

log = logging.getLogger(__name__)


def new_worker(app: AsyncDurable, handlers_app: object, concurrency: int, *, dedicated: bool = False) -> Worker:
    """A worker for the queue of `app`; `handlers_app` is what handlers see as ``ctx.app``."""
    from durable.worker import Worker  # late: most apps never work themselves, and need no procrastinate

    return Worker(app, concurrency=concurrency, handlers_app=handlers_app, dedicated=dedicated)


async def work(app: AsyncDurable, handlers_app: object, concurrency: int, until_idle: bool) -> None:
    """Work until a signal comes, or until there is nothing to do."""
    worker = new_worker(app, handlers_app, concurrency, dedicated=True)
    with _stopped_by_signals(worker):
        await worker.run(until_idle=until_idle)


async def work_and_close(app: AsyncDurable, handlers_app: object, concurrency: int, until_idle: bool) -> None:
    """As `work`, on an event loop that ends with it."""
    try:
        await work(app, handlers_app, concurrency, until_idle)
    finally:
        await app.close()


async def work_in_background(
    app: AsyncDurable, handlers_app: object, concurrency: int, ready: threading.Event, stop: asyncio.Event
) -> None:
    """Work until `stop` is set, on an event loop that ends with it; `ready` is set once jobs are taken."""
    worker = new_worker(app, handlers_app, concurrency)
    working = in_background(worker)
    try:
        await until_started(worker, working)
        ready.set()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
    finally:
        worker.stop()
        await working


def in_background(worker: Worker) -> asyncio.Task[None]:
    """Let it work. If it fails the log says so at once; whoever awaits the task may be long in coming."""

    def ended(working: asyncio.Task[None]) -> None:
        if not working.cancelled() and (error := working.exception()) is not None:
            log.error("the worker has ended: %s: %s", type(error).__name__, error)

    working = asyncio.create_task(worker.run(), name="durable worker")
    working.add_done_callback(ended)
    return working


async def until_started(worker: Worker, working: asyncio.Task[None]) -> None:
    """Wait until the worker takes jobs. Raises what kept it from that."""
    started = asyncio.create_task(worker.started.wait())
    try:
        await asyncio.wait({working, started}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        started.cancel()
    if working.done():
        working.result()


@contextmanager
def _stopped_by_signals(worker: Worker) -> Iterator[None]:
    """SIGTERM and SIGINT stop the worker in order; a second SIGINT is an ordinary Ctrl-C. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop() -> None:
        worker.stop()
        give_back()

    def give_back() -> None:
        for number in numbers:
            if loop.remove_signal_handler(number):
                signal.signal(number, before[number])

    try:
        for number in numbers:
            loop.add_signal_handler(number, stop)
    except NotImplementedError:  # Windows: Ctrl-C ends the loop
        yield
        return
    try:
        yield
    finally:
        give_back()
