"""What the hooks of an app are to be told of a transition: that the run's status changes, and each failure, once.

A failure is reported where it first comes to light: a failed attempt of a handler with the write that records it, an
error of the run itself when the run turns to its end. A run that fails *by* a failed attempt is no second failure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from durable.core.finish import failure_json
from durable.core.state import Entry, EntryKind, Failure, Run, View
from durable.core.transition import FailedAttempt, Report, ReportKind, Transition
from durable.define.nodes import ChildWorkflow, Loop, Parallel, Route, Sleep, Step, WaitForSignal, Work, Workflow
from durable.values import Status


def reports(view: View, transition: Transition, now: datetime, kinds: Collection[ReportKind]) -> tuple[Report, ...]:
    """What is to be told of `transition`, of the kinds that somebody listens to: first the errors, then the status that
    they lead to."""
    found: list[Report] = []
    if "error" in kinds:
        found += _errors(view, transition, now)
    if "status" in kinds and transition.before.status is not transition.after.status:
        found.append(_status(transition, now))
    return tuple(found)


def _status(transition: Transition, now: datetime) -> Report:
    before, after = transition.before, transition.after
    at = after.finished_at if transition.ends else now
    change = {"before": before.status, "status": after.status, "at": at, "reason": after.reason}
    return Report("status", {**_about(after), **change, "error": failure_json(after.error)})


def _errors(view: View, transition: Transition, now: datetime) -> Iterator[Report]:
    run, workflow = transition.after, view.workflow
    for attempt in transition.attempts:
        if attempt.kind == "failed" and attempt.error is not None:
            yield _attempt_failed(run, attempt, attempt.error, _limit(workflow, attempt.step_id, attempt.error))
    for entry in transition.entries:
        if entry.error is not None and _is_of_a_handler(workflow, entry):
            yield _step_failed(run, entry, entry.error, _limit(workflow, entry.step_id, entry.error), now)
    failure = _failure_of_run(transition)
    if failure is not None and not _is_told(failure, view, transition):
        yield _error(run, failure, now)


def _attempt_failed(run: Run, attempt: FailedAttempt, error: Failure, limit: int | None) -> Report:
    again = attempt.next_attempt_at
    delay = None if again is None else (again - attempt.finished_at).total_seconds()
    about: dict[str, Any] = {"step": attempt.step_id, "attempt": attempt.attempt, "limit": limit, "delay": delay}
    return _error(run, error, attempt.finished_at, **about, will_retry=again is not None)


def _step_failed(run: Run, entry: Entry, error: Failure, limit: int | None, now: datetime) -> Report:
    about: dict[str, Any] = {"step": entry.step_id, "attempt": entry.attempt, "limit": limit}
    return _error(run, error, entry.finished_at or now, **about)


def _error(run: Run, error: Failure, at: datetime, *, will_retry: bool = False, **about: Any) -> Report:
    return Report("error", {**_about(run), "at": at, "error": failure_json(error), "will_retry": will_retry, **about})


def _about(run: Run) -> dict[str, Any]:
    return {"workflow": run.workflow, "version": run.version, "key": run.key}


# ---------------------------------------------------------------- once per failure


_HANDLERS: Final = frozenset(
    {EntryKind.STEP, EntryKind.BRANCH, EntryKind.ITERATION, EntryKind.CHOICE, EntryKind.RESULT, EntryKind.UNDO}
)
_COMPUTED: Final = frozenset({EntryKind.SLEEP, EntryKind.SIGNAL})  # waits, whose time or name a handler may compute
_HANDLERS_OF_BODIES: Final = frozenset({EntryKind.STEP, EntryKind.UNDO})  # all else is the body's own code


def _is_of_a_handler(workflow: Workflow | None, entry: Entry) -> bool:
    """Whether this failed entry is the last attempt of a handler, and not a node that failed because of one."""
    if entry.status != "failed" or entry.error is None:
        return False
    if workflow is not None and workflow.body is not None:
        return entry.kind in _HANDLERS_OF_BODIES
    timed_out = entry.error.type == "durable.errors.SignalTimeout"
    return entry.kind in _HANDLERS or (entry.kind in _COMPUTED and not timed_out)


def _failure_of_run(transition: Transition) -> Failure | None:
    """What the run fails with, if this is the transition that decides it: its rollback only carries that out."""
    before, after = transition.before, transition.after
    if before.status in (Status.COMPENSATING, Status.FAILED):
        return None
    if after.status is Status.FAILED:
        return after.error
    rolls_back = after.status is Status.COMPENSATING and after.ending is not None and after.ending.to is None
    if rolls_back and after.ending is not None and after.ending.status is Status.FAILED:
        return after.ending.error
    return None


def _is_told(failure: Failure, view: View, transition: Transition) -> bool:
    """Whether all that the run fails with are failed attempts, which have been reported. An error of a body's own names
    no step."""
    if failure.step is None:
        return False
    entries = (*view.journal.values(), *transition.entries)
    failed = (entry.error for entry in entries if _is_of_a_handler(view.workflow, entry))
    told = {(error.type, error.message) for error in failed if error is not None}
    return told.issuperset(_causes({"type": failure.type, "message": failure.message, "details": failure.details}))


def _causes(failure: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Type and message of the failure, or of the branches' if it only sums those up."""
    branches = (failure.get("details") or {}).get("branches")
    if not branches:
        return {(failure["type"], failure["message"])}
    return {cause for branch in branches.values() for cause in _causes(branch)}


# ---------------------------------------------------------------- how many attempts there may be


_ITERATION: Final = re.compile(r"(.+)\[\d+\]")


def _limit(workflow: Workflow | None, step_id: str, failure: Failure) -> int | None:
    """How many attempts the step has, as far as that is known. A body's steps are not in its definition: settle says it
    in the failure."""
    if failure.details is not None and "limit" in failure.details:
        limit: int | None = failure.details["limit"]
        return limit
    work = _work(workflow, step_id) if workflow is not None else None
    return work.retry.max_attempts if work is not None else None


def _work(workflow: Workflow, step_id: str) -> Work | None:
    """What a step of a builder's workflow calls."""
    if step_id == "run:result":
        return workflow.result
    if step_id.startswith("undo:"):
        undone = _work(workflow, step_id.removeprefix("undo:"))
        return undone.compensate if undone is not None else None
    nodes = {node.name: node for node in workflow.nodes}
    prefix, _, rest = step_id.rpartition(":")
    name, _, branch = rest.partition("/")
    if (iteration := _ITERATION.fullmatch(name)) is not None:
        name = iteration[1]
    match prefix, nodes.get(name):
        case "", Step(work=work) | Loop(work=work):
            return work
        case "", Parallel(branches=branches) | Route(branches=branches):
            return branches.get(branch)
        case "", Sleep(until=Work() as work) | WaitForSignal(signal=Work() as work):
            return work
        case "choice", Route(selector=work) | ChildWorkflow(workflow=Work() as work):
            return work
        case "input", ChildWorkflow(map_input=work):
            return work
        case _:
            return None
