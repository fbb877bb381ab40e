"""Whether today's code agrees with what a run has passed.

A function's body is driven as far as the run's journal answers, and not a step further; a builder's nodes are compared
with those that the run has passed. No handler runs. Plain code of the body does, as in every replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from durable.core import graph
from durable.core.functions.answers import Guarding, Raised, Returned
from durable.core.functions.body import Body, Frontier
from durable.core.functions.context import Context
from durable.core.functions.errors import failure
from durable.core.state import Failure, Run, View
from durable.define.nodes import Workflow
from durable.define.registry import Registry
from durable.replaying.recording import Recording
from durable.values import ContinueAsNew, Status


class Fit(StrEnum):
    """How code and journal go together."""

    OK = "ok"
    DIVERGED = "diverged"  # the journal has what the code does not come to, or finds as something else
    FAULT = "fault"  # the code breaks a rule of bodies: the run would fail at once
    UNKNOWN = "unknown"  # the workflow is not known here in the run's version


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a replay. `failure` says why it does not fit."""

    run: Run
    fit: Fit
    failure: Failure | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it: an unknown workflow does not."""
        return self.fit in (Fit.OK, Fit.UNKNOWN)

    @property
    def expected(self) -> str | None:
        """What the journal has."""
        return self._detail("expected")

    @property
    def found(self) -> str | None:
        """What the code came to instead."""
        return self._detail("found")

    def _detail(self, name: str) -> str | None:
        details = (self.failure.details if self.failure is not None else None) or {}
        return details.get(name)


def replayed(recording: Recording, registry: Registry, guard: Guarding | None = None) -> Verdict:
    """Replay one run. `guard` surrounds every stretch of its body."""
    run = recording.run
    workflow = registry.find(run.workflow, run.version)
    if workflow is None:
        return Verdict(run, Fit.UNKNOWN)
    view = View(run, workflow, registry, recording.journal, ())
    if workflow.body is None:
        difference = graph.divergence(view)
        return Verdict(run, Fit.OK if difference is None else Fit.DIVERGED, difference)
    body = Past(workflow, run, registry, Context, guard)
    try:
        return _judged(body, body.drive(view, _last_moment(recording), canceling=_cleaned_up(run, workflow)))
    finally:
        body.close()


class Past(Body):
    """A body of which everything that it passes lies behind it: no `patched` is reached for the first time, nothing is
    logged."""

    def replaying(self, path: str) -> bool:
        return True


def _judged(body: Past, frontier: Frontier) -> Verdict:
    run = body.run
    if frontier.diverged is not None:
        return Verdict(run, Fit.DIVERGED, frontier.diverged)
    if body.faulted is not None:
        return _fault(run, failure(body.faulted))
    expected = _end_of(body)
    if expected is None or _ends_so(run, frontier):
        return Verdict(run, Fit.OK)
    return Verdict(run, Fit.DIVERGED, body.difference(expected, body.came_to()))


def _fault(run: Run, fault: Failure) -> Verdict:
    """A run that has failed by just that is replayed rightly."""
    as_before = run.status is Status.FAILED and run.error is not None and run.error.type == fault.type
    return Verdict(run, Fit.OK) if as_before else Verdict(run, Fit.FAULT, fault)


def _end_of(body: Past) -> str | None:
    """To what end the body has come; None: to none of its own."""
    if body.run.successor is not None:
        return "the end of the run, continued as new"
    return "the end of the run, with a result" if "run:result" in body.journal else None


def _ends_so(run: Run, frontier: Frontier) -> bool:
    match frontier.ended:
        case Returned():
            return run.successor is None
        case Raised(error):
            return run.successor is not None and isinstance(error, ContinueAsNew)
        case None:
            return False


def _cleaned_up(run: Run, workflow: Workflow) -> bool:
    """Whether its body was told of a cancel, and perhaps did something more."""
    asked = run.ending is not None and run.ending.status is Status.CANCELED
    return workflow.cleans_up and (run.status is Status.CANCELED or asked)


def _last_moment(recording: Recording) -> datetime:
    """A time at which nothing that it has begun is waited for any more: also a block that is tried again is looked
    into."""

    def times() -> Iterator[datetime | None]:
        run = recording.run
        yield from (run.started_at, run.finished_at)
        yield from (entry.finished_at for entry in recording.journal.values())
        yield from (begun.due for begun in run.frame.values())

    return max((time for time in times() if time is not None), default=recording.run.created_at)
