"""``durable worker``: a process that executes runs, or several of them.

The first SIGTERM or Ctrl-C ends it in order: no new work, a grace time for the steps in progress, then they are
interrupted and handed back. The second ends it at once; what it was doing is taken over as after a crash.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import Parameter

from durable import logs
from durable.cli import output
from durable.cli.options import Shared, connected, find_app
from durable.cli.problems import DONE, UsageError, printable
from durable.cli.processes import supervise
from durable.cli.reading import duration
from durable.durable import AsyncDurable

log = logging.getLogger("durable.worker")

Level = Literal["debug", "info", "warning", "error", "critical"]


async def worker(
    app: str | None = None,
    /,
    *,
    concurrency: int = 20,
    processes: int = 1,
    grace: str = "30s",
    log_format: logs.LogFormat = "text",
    log_level: Level = "info",
    lifeline: Annotated[int | None, Parameter(show=False)] = None,
    shared: Shared = Shared(),  # noqa: B008  # frozen
) -> int:
    """Execute the runs of MODULE:APP, or of the workflows in the modules of --import. Prints what it serves.

    SIGTERM or Ctrl-C ends it in order; a second one at once.

    Parameters
    ----------
    app
        MODULE:APP, a Durable or AsyncDurable of yours.
    concurrency
        Steps in flight at once, in each process.
    processes
        Run so many processes; one that dies is replaced.
    grace
        How long steps in progress may take after SIGTERM, before they are interrupted and handed back.
    log_format
        text, or json: one object a line. On standard error.
    log_level
        What is logged at least: debug, info, warning, error, critical.
    lifeline
        A file descriptor whose end means that the process that has started this one is gone.
    """
    if app is not None and shared.app is not None:
        raise UsageError(f"two apps are given, {app} and {shared.app}: name one")
    if processes < 1 or concurrency < 1:
        raise UsageError("--processes and --concurrency are at least 1")
    patience = duration(grace, "--grace")
    assert patience is not None
    logs.configure(log_format, log_level)
    place = app or shared.app
    found, as_it_is = find_app(shared, place)
    _must_serve_something(found)
    async with connected(found, shared, place):
        if lifeline is None:
            _print_workflows(found, as_json=shared.json)
        if processes > 1:
            return await supervise(_same_again(shared, place, concurrency, grace, log_format, log_level), processes,
                                   environment=_environment(shared))  # fmt: skip
        from durable.worker import Worker  # late: who only starts other processes needs no queue

        hand = Worker(
            found, concurrency=concurrency, grace=patience.total_seconds(), dedicated=True, handlers_app=as_it_is
        )
        with _ended_by_signals(hand.stop), _ended_with_parent(hand.stop, lifeline):
            log.info("process %d works on queue %r, %d steps at once", os.getpid(), found.queue, concurrency)
            await hand.run()
    return DONE


def _must_serve_something(app: AsyncDurable) -> None:
    if not len(app.registry):
        raise UsageError(
            "no workflow is registered: a worker would have nothing to do. Name the app that has them (`durable worker "
            "shop.app:app`), or their module (`--import shop.workflows`)"
        )


def _print_workflows(app: AsyncDurable, *, as_json: bool) -> None:
    for workflow in app.registry:
        if as_json:
            served: dict[str, Any] = {"workflow": workflow.name, "version": workflow.version}
            kind = "builder" if workflow.body is None else "function"
            output.print_json(served | {"kind": kind, "nodes": len(workflow.nodes) if workflow.body is None else None})
        else:
            print(f"serving {printable(workflow.name)}, version {printable(workflow.version)}")
    sys.stdout.flush()


def _same_again(shared: Shared, place: str | None, concurrency: int, grace: str, form: str, level: str) -> list[str]:
    """The command line of one process. The DSN is not in it: everybody may read that."""
    words = [sys.executable, "-m", "durable.cli", "worker", *([place] if place else ["--schema", shared.schema])]
    for module in shared.imports:
        words += ["--import", module]
    return [*words, "--concurrency", str(concurrency), "--grace", grace, "--log-format", form, "--log-level", level]


def _environment(shared: Shared) -> dict[str, str]:
    if shared.dsn is None:
        return dict(os.environ)
    return os.environ | {"DURABLE_DATABASE_URL": shared.dsn, "DURABLE_EMBEDDED": "auto"}


# ---------------------------------------------------------------- the end


@contextmanager
def _ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first signal stops in order. The second ends the process, also where a handler blocks the event loop: that is
    why these are Python's own handlers, and not the loop's."""
    loop, came = asyncio.get_running_loop(), False

    def handle(number: int, _: Any) -> None:
        nonlocal came
        if came:
            _exit_at_once(number)
        came = True
        loop.call_soon_threadsafe(_stop, f"{signal.Signals(number).name}: ending in order, again to end at once", stop)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ended_with_parent(stop: Callable[[], None], lifeline: int | None) -> Iterator[None]:
    """The pipe at `lifeline` ends when nobody holds its other side: also after a ``kill -9`` of who does."""
    if lifeline is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(lifeline)
        _stop("the process that has started this one is gone: ending in order", stop)

    loop.add_reader(lifeline, ended)
    try:
        yield
    finally:
        loop.remove_reader(lifeline)


def _stop(why: str, stop: Callable[[], None]) -> None:
    log.info(why)
    stop()


def _exit_at_once(number: int) -> NoReturn:
    os._exit(128 + number)
