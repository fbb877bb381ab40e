"""What happens next to a run: requests first, then its status, then what its workflow says.

Answers a Call (user code to run), a Fanout (calls to run concurrently), a Transition (nothing to run, something to
write), or None (nothing to do now). `running` names the steps that this process executes at the moment. Only here do
the two kinds of workflow part: a builder's run looks at the node under its cursor, a function's drives its body.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from durable.core import control, graph, undo
from durable.core.finish import fail
from durable.core.functions import cancel
from durable.core.functions import plan as functions
from durable.core.moves import move, park
from durable.core.state import Failure, View
from durable.core.transition import Decision, Limits, Transition
from durable.values import Status, WaitingFor

NOTHING_RUNS: Final[frozenset[str]] = frozenset()


def plan(view: View, now: datetime, limits: Limits, running: frozenset[str] = NOTHING_RUNS) -> Decision:
    """What happens next to the run."""
    run = view.run
    if (asked := control.apply_next(view, now)) is not None:
        return asked
    if run.status is Status.COMPENSATING:
        return undo.plan(view, now, limits, running)
    if run.status.ended or run.status is Status.PAUSED:
        return None
    if run.ending is not None:
        return _canceled(view, now, limits, running)
    if run.pausing:
        return None if running else control.paused(view, now)
    if run.waiting_for is WaitingFor.START and run.wake_at is not None and run.wake_at > now:
        return None
    return _forward(view, now, limits, running)


def _forward(view: View, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    run, workflow = view.run, view.workflow
    if workflow is None:
        return park(view, now, WaitingFor.DEFINITION, name=f"{run.workflow}@{run.version}", mind_deadline=False)
    if workflow.body is None:
        if run.deadline is not None and run.deadline <= now and graph.divergence(view) is None:
            return None if running else fail(view, now, _out_of_time(view))
        return graph.forward(view, now, limits, running)
    if run.deadline is not None and run.deadline <= now:
        return None if running else fail(view, now, _out_of_time(view))
    return functions.forward(view, now, limits, running)


def _canceled(view: View, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    """A cancel ends the handlers; then the body cleans up; then the rollback begins, or the run ends."""
    run = view.run
    assert run.ending is not None
    if running and (run.ending.until is None or run.ending.until <= now):
        return None
    if not run.cleanup:
        return control.begin_rollback(view, now)
    if view.workflow is None:
        return park(view, now, WaitingFor.DEFINITION, name=f"{run.workflow}@{run.version}", mind_deadline=False)
    if run.ending.until is None:
        return cancel.begin(view, now)
    if run.ending.until <= now:
        return cancel.cleaned_up(view, now)
    return functions.forward(view, now, limits, running, canceling=True)


def go_on(view: View, now: datetime) -> Transition:
    """Nothing changes but the revision: the run is handed back to the queue."""
    return move(view, now, view.run.status, claim=None)


def _out_of_time(view: View) -> Failure:
    message = f"the run did not end within its deadline, {view.run.deadline:%Y-%m-%d %H:%M:%S %Z}"
    return Failure("TimeoutError", message, "timeout")
