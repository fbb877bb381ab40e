"""A canceled body may clean up: ``Canceled`` is raised in it where it waits, and steps with ``on_cancel`` still run."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from durable.core.control import begin_rollback
from durable.core.finish import end
from durable.core.moves import move
from durable.core.state import View
from durable.core.transition import Transition
from durable.values import Status


def begin(view: View, now: datetime) -> Transition:
    """From now on it has ``cancel_timeout``."""
    run, workflow = view.run, view.workflow
    assert run.ending is not None
    assert workflow is not None
    until = now + timedelta(seconds=workflow.cancel_timeout)
    return move(view, now, Status.RUNNING, ending=replace(run.ending, until=until))


def cleaned_up(view: View, now: datetime, **write: Any) -> Transition:
    """The body has ended, or its time is over: the run is canceled, or rolled back first."""
    run = view.run
    assert run.ending is not None
    if not run.ending.compensate:
        return end(view, now, Status.CANCELED, reason=run.ending.reason, error=None, cleanup=False, **write)
    free = view.ahead(run.changed(cleanup=False))
    return begin_rollback(free, now, **write).of_row(run)
