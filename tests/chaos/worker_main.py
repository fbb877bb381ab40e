"""The worker processes of the crash suite, real ones, to be killed.

Run as ``python -m tests.chaos.worker_main`` this is a nursery: it has everything imported, and forks a worker for
each line of JSON (the fields of `Settings`) on stdin; so a worker starts in milliseconds instead of a second. It
answers with a line ``{"pid": ...}``, and tells the end of each with ``{"pid": ..., "code": ...}``. When stdin closes,
it kills what it has forked and ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import select
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.chaos import functions, workflows

from durable.core.state import View
from durable.durable import AsyncDurable
from durable.engine import advance, liveness, loops, recover
from durable.engine.points import Point, executing
from durable.worker import Worker, watchdog
from durable.worker import worker as worker_module

ANY: Final = "*"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """One worker. `kill`: the point and what is executing there (or ``*``) at whose `nth` hit it kills itself. Times
    are short, so that the suite need not wait for what the engine does once a second."""

    dsn: str
    folder: str
    kill: tuple[str, str] | None = None
    nth: int = 1
    burst: int | None = None
    fetch_batch: int | None = None
    detach_after: float = 0.05
    max_crashes: int = 5
    concurrency: int = 20
    pool_size: int = 10
    grace: float = 30.0
    silence: str = "20s"
    says_something: float = 5.0
    stood: float = 0.1
    tick: float = 0.1
    suspect_retry: float = 0.1
    patience: float | None = None  # of a watchdog


class Killer:
    """The hook: reports every cell that is hit, and kills its own process at one of them."""

    def __init__(self, settings: Settings) -> None:
        self._kill, self._left = settings.kill, settings.nth
        self._seen: set[tuple[Point, str]] = set()
        self._hits = os.open(Path(settings.folder) / "hits", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, point: Point, view: View | None) -> None:
        workflows.witness(point, view)
        what = executing(view)
        if (point, what) not in self._seen:
            self._seen.add((point, what))
            os.write(self._hits, f"{point} {what}\n".encode())
        if self._kill is None or self._kill[0] != point or self._kill[1] not in (what, ANY):
            return
        self._left -= 1
        if self._left <= 0:
            os.write(self._hits, f"killed {point} {what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


async def work(settings: Settings) -> None:
    """Be a worker until SIGTERM."""
    app = AsyncDurable(
        settings.dsn,
        workflows=(*workflows.ALL, *functions.ALL),
        embedded="never",
        pool_size=settings.pool_size,
        detach_after=settings.detach_after,
        max_crashes=settings.max_crashes,
    )
    worker = Worker(
        app,
        concurrency=settings.concurrency,
        grace=settings.grace,
        burst_steps=settings.burst,
        fetch_batch=settings.fetch_batch,
        dedicated=settings.patience is not None,
        at=Killer(settings),
    )

    def end() -> None:
        worker.stop()
        workflows.witness.told_to_end.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    try:
        await worker.run()
    finally:
        await app.close()


def be_worker(settings: Settings) -> None:
    """In a fresh fork: never returns."""
    code = 1
    try:
        folder = Path(settings.folder)
        output = os.open(folder / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", force=True
        )
        logging.getLogger("procrastinate").setLevel(logging.WARNING)
        random.seed()
        workflows.folder = folder
        _adjust(settings)
        asyncio.run(work(settings))
        code = 0
    except BaseException:
        log.exception("the worker failed")
    finally:
        os._exit(code)


def _adjust(settings: Settings) -> None:
    """The engine's constants, made shorter for the suite."""
    for module, name, value in (
        (liveness, "SILENCE", settings.silence),
        (liveness, "SAY_SOMETHING", settings.says_something),
        (recover, "STOOD", settings.stood),
        (loops, "TICK", settings.tick),
        (advance, "SUSPECT_RETRY", settings.suspect_retry),
        (worker_module, "Watchdog", partial(watchdog.Watchdog, patience=settings.patience or watchdog.PATIENCE)),
    ):
        assert hasattr(module, name)
        setattr(module, name, value)


def nursery() -> None:
    """Fork workers until stdin closes."""
    children: set[int] = set()
    lines = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            chunk = os.read(0, 65536)
            if not chunk:
                break
            *whole, lines = (lines + chunk).split(b"\n")
            for line in whole:
                values = json.loads(line)
                kill = values.pop("kill")
                settings = Settings(**values, kill=tuple(kill) if kill else None)
                pid = os.fork()
                if pid == 0:
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                    be_worker(settings)
                children.add(pid)
                _say({"pid": pid})
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            children.discard(pid)
            _say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
    for pid in children:  # those that have been reaped are not among them
        os.kill(pid, signal.SIGKILL)


def _say(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the suite's: it closes stdin
    from tests.chaos import worker_main  # not as __main__: once more, with handlers that pickle by their right names

    worker_main.nursery()
