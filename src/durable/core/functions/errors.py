"""Failures of the journal as a body sees them: the same exception live and on replay, never the original class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from durable.core.failures import failure_of
from durable.core.finish import failure_json
from durable.core.functions.answers import Returned
from durable.core.functions.values import Result, TryFailure
from durable.core.state import Entry, EntryKind, Failure
from durable.define.payload import LOOSE
from durable.errors import (
    ChildFailed,
    DurableError,
    JoinFailed,
    RaceFailed,
    SignalTimeout,
    StepFailed,
    StepInterrupted,
    StepTimeout,
)
from durable.values import Rollback

_RECORD: Final = "_durable_failure"
_OTHERS: Final = "_durable_branches"


def raised(entry: Entry) -> BaseException:
    """What a failed entry raises in the body."""
    failure = entry.error or Failure("Error", "no error was recorded")
    match entry.kind:
        case EntryKind.STEP:
            error = _step_failed(entry.step_id, failure)
        case EntryKind.CHILD:
            child: Mapping[str, Any] = (failure.details or {}).get("child") or {}
            error = ChildFailed(
                step=entry.step_id,
                run_id=child.get("id"),
                status=child.get("status") or "failed",
                error=child.get("error") or failure_json(failure),
            )
        case EntryKind.SIGNAL if failure.kind == "timeout":
            error = SignalTimeout((entry.extra or {}).get("signal", ""), step=entry.step_id)
        case _:
            error = _step_failed(entry.step_id, failure)
    return remembering(error, failure, entry.step_id)


def _step_failed(step: str, failure: Failure) -> BaseException:
    told, attempts = failure_json(failure), failure.attempts
    match failure.kind:
        case "rollback":
            return Rollback((failure.details or {}).get("to"))
        case "timeout":
            return StepTimeout(step, attempts=attempts, error=told)
        case "interrupted":
            return StepInterrupted(step, crashes=attempts, attempts=attempts, error=told)
        case "error":  # final: it had no attempts left
            return StepFailed(step, kind="exhausted", attempts=attempts, error=told)
        case kind:
            return StepFailed(step, kind=kind, attempts=attempts, error=told)


def branches_failed(kind: EntryKind, key: str, failed: Mapping[str, BaseException], many: int) -> BaseException:
    """What a join or race raises of which these branches failed."""
    records = {name: failure(error) for name, error in failed.items()}
    told = {name: failure_json(record) or {} for name, record in records.items()}
    error = JoinFailed(key, told) if kind is not EntryKind.RACE else RaceFailed(key, told)
    first = next(iter(records.values()))
    details = {
        "branches": {
            name: {"type": r.type, "message": r.message, "kind": r.kind, "attempts": r.attempts}
            for name, r in records.items()
        }
    }
    type_ = f"durable.errors.{type(error).__name__}"
    record = Failure(type_, str(error), first.kind, key, first.attempts, first.traceback, details)
    remembering(error, record, key)
    setattr(error, _OTHERS, tuple(failed.values()))
    return error


def remembering(error: BaseException, record: Failure, key: str) -> BaseException:
    """`error`, with the failure and the entry that it stands for."""
    setattr(error, _RECORD, (record, key))
    return error


def failure(error: BaseException) -> Failure:
    """What is recorded of an error that left a body: of one that the engine raised in it, the original failure."""
    record: tuple[Failure, str] | None = getattr(error, _RECORD, None)
    if record is not None:
        return record[0]
    if isinstance(error, Rollback):
        return Failure("durable.Rollback", str(error), "rollback")
    return failure_of(error, "error")


def failed_entries(error: BaseException) -> list[str]:
    """The entries whose failure led to `error`: what a retry, of the run or of a block, takes up anew. Not those that
    the body was handling when another one failed: it has gone on from them."""
    found: list[str] = []
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        record: tuple[Failure, str] | None = getattr(current, _RECORD, None)
        if record is None:
            waiting += [current.__cause__, current.__context__]
        else:
            found.append(record[1])
            waiting += getattr(current, _OTHERS, ())
    return found


def led_to(step_id: str, causes: Iterable[str]) -> bool:
    """Whether a failed entry is one of these, or failed by what is in it."""
    return any(cause == step_id or cause.startswith((f"{step_id}/", f"{step_id}[")) for cause in causes)


def caught(error: BaseException, catch: frozenset[str], *, source: str) -> Returned | None:
    """`error` as the answer of a try, if its kind (of a step) or source (of a block) is to be caught; else None."""
    kind, origin = _kind(error), _source(error) if source == "block" else source
    if isinstance(error, Rollback):
        wanted = "rollback" in catch
    elif source == "step":
        wanted = kind in catch
    else:
        wanted = origin in catch
    if not wanted:
        return None
    record = failure(error)
    told = failure_json(record) or {}
    return Returned(Result(ok=False, failure=TryFailure(kind, origin, record.step, record.attempts, told)))


def _kind(error: BaseException) -> str:
    match error:
        case Rollback():
            return "rollback"
        case StepFailed():
            return error.kind
        case JoinFailed() | RaceFailed() | ChildFailed() | SignalTimeout():
            kind = failure(error).kind
            return "exhausted" if kind == "error" else kind
        case _:
            return "error"


def _source(error: BaseException) -> str:
    match error:
        case JoinFailed():
            return "join"
        case RaceFailed():
            return "race"
        case StepFailed() | ChildFailed() | SignalTimeout():
            return "step"
        case _:
            return "block"


def display(value: Any) -> str:
    """A composite's value for those who look at the run: JSON if it can be shown, else null. It is never read back."""
    try:
        return LOOSE.dump(value)
    except DurableError:
        return json.dumps(None)
