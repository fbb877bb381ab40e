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
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from durable import logs
from durable.cli import output, processes
from durable.cli.options import Shared, load_app, make_app
from durable.cli.problems import DONE, UsageError, say
from durable.durable import AsyncDurable
from durable.worker import Worker

log = logging.getLogger("durable.worker")


async def worker(
    app: str | None = None,
    /,
    *,
    concurrency: int = 20,
    processes: Annotated[int, Parameter(name="--processes")] = 1,
    log_format: Literal["text", "json"] = "text",
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info",
    grace: str = "30s",
    lifeline: Annotated[int | None, Parameter(show=False)] = None,
    shared: Shared = Shared(),  # noqa: B008  # frozen
) -> int:
    """Execute the runs of MODULE:APP, or of the workflows in the modules of --import.

    Parameters
    ----------
    app
        MODULE:APP, a Durable or AsyncDurable of yours.
    concurrency
        Steps in flight at once, in each process.
    processes
        Run so many processes; one that dies is replaced.
    log_format
        text, or one JSON object a line.
    log_level
        What is logged at least.
    grace
        How long steps in progress may take after SIGTERM, before they are interrupted.
    lifeline
        A file descriptor: its end means that the parent has died.
    """
    raise NotImplementedError
