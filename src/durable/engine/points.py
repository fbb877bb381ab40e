"""The instants at which a crash is put to the test: one enum, listed in the docs, hooked by the crash suite."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

from durable.core.state import View
from durable.values import Status


class Point(StrEnum):
    """Where a worker can be killed. Between two of them nothing becomes durable."""

    BEFORE_LOCK = "before_lock"  # the job is fetched, the run is not locked
    AFTER_LOCK = "after_lock"  # locked and loaded, nothing decided
    BEFORE_HANDLER = "before_handler"  # user code is about to run
    AFTER_HANDLER = "after_handler"  # it has ended, nothing is written
    BEFORE_CLAIM = "before_claim"  # about to detach: the claim is not committed
    AFTER_CLAIM = "after_claim"  # detached: the claim is committed
    BEFORE_OUTCOME = "before_outcome"  # a detached handler has ended, the row is not locked again
    BEFORE_COMMIT = "before_commit"  # decided, nothing is committed
    AFTER_COMMIT = "after_commit"  # committed; the job is not finished
    BEFORE_RERING = "before_rering"  # the row was busy; the job that found it so is not repeated yet
    BEFORE_FINISH = "before_finish"  # the job's work is over; the queue does not know
    IN_SWEEP = "in_sweep"  # a takeover is decided, not committed


Hook: TypeAlias = Callable[[Point, View | None], None]
"""Called with the point, and what was read of the run that is executing there, if one is."""


def nothing(point: Point, view: View | None) -> None:
    """The hook of every worker outside the crash suite."""


def executing(view: View | None) -> str:
    """What the run is at, for the crash suite: the kind of its node, ``function``, ``undo``, or ``-``."""
    if view is None:
        return "-"
    run, workflow = view.run, view.workflow
    if run.status is Status.COMPENSATING:
        return "undo"
    if workflow is not None and workflow.body is not None:
        return "function"
    if workflow is None or run.current_step >= len(workflow.nodes):
        return "-"
    return workflow.nodes[run.current_step].kind
