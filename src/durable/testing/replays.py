"""Replay recorded runs in a test: does today's code still agree with what they have passed?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from durable.define.registry import AnyWorkflow, Registry
from durable.engine.guard import Guard
from durable.errors import ConfigurationError, DefinitionError, HistoryDiverged, WorkflowNotRegistered
from durable.replaying import Fit, Verdict, read_recordings, replayed

if TYPE_CHECKING:
    from durable.durable import AsyncDurable, Durable


def replay(workflows: Durable | AsyncDurable | Iterable[AnyWorkflow], path: Path | str) -> int:
    """Replay the runs that ``durable replay --export`` has written to a file; returns how many there were.

    `workflows`: an app, or workflows. No handler is executed, no database is needed.
    Raises HistoryDiverged with what differs for the first run that does not fit, with a note for each further one;
    DefinitionError if its body breaks a rule; WorkflowNotRegistered; ConfigurationError if there is nothing to replay.
    """
    registry, guard = _registry(workflows), Guard()
    count, errors = 0, []
    try:
        for recording in read_recordings(path):
            count += 1
            if (error := _error(replayed(recording, registry, guard), registry)) is not None:
                errors.append(error)
    finally:
        guard.close()
    if not count:
        raise ConfigurationError(f"{path} has no recordings in it")
    if errors:
        first, *others = errors
        for other in others:
            first.add_note(f"and {other}")
        raise first
    return count


def _registry(workflows: Durable | AsyncDurable | Iterable[AnyWorkflow]) -> Registry:
    known = getattr(workflows, "registry", None)
    if isinstance(known, Registry):
        return known
    registry = Registry()
    for workflow in workflows:  # type: ignore[union-attr]  # it is no app
        registry.add(workflow)
    return registry


def _error(verdict: Verdict, registry: Registry) -> Exception | None:
    run, failure = verdict.run, verdict.failure
    match verdict.fit:
        case Fit.OK:
            return None
        case Fit.UNKNOWN:
            return WorkflowNotRegistered(run.workflow, run.version, known=registry.known())
        case Fit.DIVERGED:
            difference = f"the journal has {verdict.expected}, but the code came to {verdict.found}"
            return HistoryDiverged(difference, workflow=run.workflow, run_id=run.id)
        case Fit.FAULT:
            assert failure is not None
            return DefinitionError(f"run {run.id}: {failure.message}")
