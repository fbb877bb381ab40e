"""Every error that durable raises, under one roof.

A message says what happened, where (workflow, run, step), and what to do. Classes whose message follows from facts take
the facts and build it; the facts stay on the error as attributes. All of them survive pickling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class DurableError(Exception):
    """The base of all errors of durable."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[DurableError], args: tuple[Any, ...], facts: dict[str, Any]) -> DurableError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


def _place(*parts: tuple[str, object]) -> str:
    """``workflow 'milestone', node 'build'`` of those parts that are known."""
    return ", ".join(f"{word} {str(value)!r}" for word, value in parts if value is not None)


def _at(place: str, message: str) -> str:
    return f"{place}: {message}" if place else message


def _text(error: Mapping[str, Any] | None) -> str:
    """``CardDeclined: no funds`` of a recorded error."""
    if not error:
        return "no error was recorded"
    kind, message = str(error.get("type", "error")).rpartition(".")[2], error.get("message")
    return f"{kind}: {message}" if message else kind


# ---------------------------------------------------------------- definitions and set-up


class DefinitionError(DurableError):
    """A workflow, a node or an option is defined wrongly. Found when the workflow is defined.

    `workflow` and `node`, where known, are put in front of the message.
    """

    def __init__(self, message: str, *, workflow: str | None = None, node: str | None = None) -> None:
        self.workflow, self.node = workflow, node
        super().__init__(_at(_place(("workflow", workflow), ("node", node)), message))


class DuplicateStepName(DefinitionError):
    """Two nodes of one workflow have the same name; the journal is keyed by it."""

    def __init__(self, name: str, *, workflow: str | None = None, kind: str | None = None) -> None:
        first = f" (a {kind})" if kind else ""
        super().__init__(f"the name is taken by an earlier node{first}: give each node its own", workflow=workflow,
                         node=name)  # fmt: skip


class ConfigurationError(DurableError):
    """A setting, a DSN or the environment is wrong."""


class SchemaMismatch(DurableError):
    """The database's schema is missing, too old or too new for this code. `found` and `needed` are revisions."""

    def __init__(self, message: str, *, found: str | None = None, needed: str | None = None) -> None:
        self.found, self.needed = found, needed
        super().__init__(message)


class WorkflowNotRegistered(DurableError):
    """No workflow of this name, or this version of it, is registered here. The message lists those that are.

    `known` are (name, version) pairs.
    """

    def __init__(self, name: str, version: str | None = None, *, known: Iterable[tuple[str, str]] = ()) -> None:
        self.name, self.version, self.known = name, version, sorted(known)
        versions = [v for n, v in self.known if n == name]
        what = _place(("workflow", name), ("version", version))
        if versions:
            there = f"known versions of it: {', '.join(versions)}"
        else:
            there = f"known workflows: {', '.join(sorted({n for n, _ in self.known})) or 'none'}"
        super().__init__(f"{what} is not registered in this process ({there}): register it, or import its module")


# ---------------------------------------------------------------- runs


class RunNotFound(DurableError):
    """There is no run with this id (or key)."""

    def __init__(self, run_id: object) -> None:
        self.run_id = run_id
        super().__init__(f"there is no run {str(run_id)!r} in this database: check the id, the DSN and the schema")


class RunExists(DurableError):
    """The id or key belongs to a run that was started differently. `what` names what differs: ``"input"`` ...

    The same workflow, version and input would have returned the existing run.
    """

    def __init__(
        self,
        *,
        run_id: object,
        workflow: str | None = None,
        key: str | None = None,
        what: str = "workflow, version or input",
    ) -> None:
        self.run_id, self.workflow, self.key, self.what = run_id, workflow, key, what
        taken = f"the key {key!r}" if key is not None else "the id"
        place = _place(("workflow", workflow), ("run", run_id))
        super().__init__(_at(place, f"{taken} is taken by this run, started with another {what}: use another one"))


class RunFailed(DurableError):
    """The run ended ``failed``; raised by ``result()``.

    `error` is the recorded failure: type, message, step, attempts, traceback. `not_undone` lists the steps whose
    compensators gave up.
    """

    def __init__(
        self,
        run_id: object,
        error: Mapping[str, Any] | None = None,
        not_undone: Sequence[str] = (),
        *,
        workflow: str | None = None,
    ) -> None:
        self.run_id, self.workflow = run_id, workflow
        self.error: dict[str, Any] = dict(error or {})
        self.not_undone = list(not_undone)
        place = _place(("workflow", workflow), ("run", run_id), ("step", self.error.get("step")))
        rest = f"; could not be undone: {', '.join(self.not_undone)}" if self.not_undone else ""
        super().__init__(f"{place} failed: {_text(self.error)}{rest} (`durable history {run_id}` shows every attempt)")


class RetryRefused(DurableError):
    """``retry`` can't take the run up again: it has not failed, or entries of it were undone."""


class RunCanceled(DurableError):
    """The run was canceled; raised by ``result()``. `reason` is what ``cancel`` was given."""

    def __init__(self, reason: str | None = None, *, run_id: object = None, workflow: str | None = None) -> None:
        self.reason, self.run_id, self.workflow = reason, run_id, workflow
        place = _place(("workflow", workflow), ("run", run_id)) or "the run"
        super().__init__(f"{place} was canceled" + (f": {reason}" if reason else ""))


class HistoryDiverged(DurableError):
    """What a run has passed is no longer in the code; the run is parked until the code fits or a person decides."""

    def __init__(self, difference: str, *, workflow: str | None = None, run_id: object = None) -> None:
        self.difference, self.workflow, self.run_id = difference, workflow, run_id
        place = _place(("workflow", workflow), ("run", run_id))
        cure = "bring back the nodes it has passed, or define a new version for new runs, then `durable retry`"
        super().__init__(_at(place, f"the journal and the code differ: {difference}; {cure}"))


# ---------------------------------------------------------------- payloads


class PayloadError(DurableError):
    """A value can't be stored as it is, or stored text does not match the declared type.

    `why` says what is wrong, `path` where in the value (``.items[2].price``), `where` in which payload ("the result
    of step 'charge'"); whoever knows that adds it with :meth:`at`.
    """

    def __init__(self, why: str, *, path: str = "", where: str | None = None) -> None:
        self.why, self.path, self.where = why, path, where
        super().__init__(_at(where or "", _at(f"at {path}" if path else "", why)))

    def at(self, where: str) -> PayloadError:
        """The same error with the name of the payload in front; an error that has one keeps it."""
        return self if self.where else type(self)(self.why, path=self.path, where=where)


# ---------------------------------------------------------------- what user code meets


class NonRetryable(DurableError):
    """Raise it (or a subclass) in a handler: the step fails at once, whatever its Retry says."""


class StepFailed(DurableError):
    """A step has failed for good.

    `kind`: error, critical, timeout, exhausted, interrupted, canceled. `error` is the recorded error: type, message,
    traceback. The original exception class is never raised again: ask :meth:`caused_by`.
    """

    def __init__(
        self,
        step: str,
        *,
        kind: str = "error",
        attempts: int = 1,
        error: Mapping[str, Any] | None = None,
        workflow: str | None = None,
        run_id: object = None,
        message: str | None = None,
    ) -> None:
        self.step, self.kind, self.attempts = step, kind, attempts
        self.error: dict[str, Any] = dict(error or {})
        place = _place(("workflow", workflow), ("run", run_id), ("step", step))
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        super().__init__(_at(place, message or f"failed after {tries} ({kind}): {_text(self.error)}"))

    def caused_by(self, cls: type[BaseException]) -> bool:
        """Whether the recorded error is of the class `cls` itself. Compared by name: subclasses do not count."""
        return self.error.get("type") in (cls.__name__, cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")


class StepTimeout(StepFailed, TimeoutError):
    """An attempt took longer than the step's `timeout` seconds. Final, unless ``Retry(retry_on_timeout=True)``."""

    def __init__(
        self,
        step: str,
        *,
        timeout: float | None = None,
        attempts: int = 1,
        error: Mapping[str, Any] | None = None,
        workflow: str | None = None,
        run_id: object = None,
    ) -> None:
        self.timeout = timeout
        limit = "its time limit" if timeout is None else f"{timeout:g} s"
        message = f"attempt {attempts} took longer than {limit}: raise timeout=, or allow Retry(retry_on_timeout=True)"
        super().__init__(step, kind="timeout", attempts=attempts, error=error, workflow=workflow, run_id=run_id,
                         message=message)  # fmt: skip


class StepInterrupted(StepFailed):
    """The worker died during an ``at_most_once`` step, or too often during any other. `crashes` is how often."""

    def __init__(
        self,
        step: str,
        *,
        crashes: int = 1,
        attempts: int = 1,
        error: Mapping[str, Any] | None = None,
        workflow: str | None = None,
        run_id: object = None,
    ) -> None:
        self.crashes = crashes
        often = "once" if crashes == 1 else f"{crashes} times"
        message = f"the worker died {often} while it ran, so it is not run again: look at what it did, then `retry`"
        super().__init__(step, kind="interrupted", attempts=attempts, error=error, workflow=workflow, run_id=run_id,
                         message=message)  # fmt: skip


class UnknownBranch(DurableError):
    """A route's selector answered a branch that the route does not have. The message lists those it has."""

    def __init__(self, branch: object, branches: Iterable[str], *, node: str, workflow: str | None = None) -> None:
        self.branch, self.branches, self.node, self.workflow = branch, list(branches), node, workflow
        place = _place(("workflow", workflow), ("node", node))
        super().__init__(_at(place, f"there is no branch {branch!r}: it has {', '.join(map(repr, self.branches))}"))


class LoopLimitExceeded(DurableError):
    """A loop with a condition needed an iteration more than `limit` (``max_iterations``)."""

    def __init__(self, node: str, limit: int, *, workflow: str | None = None) -> None:
        self.node, self.limit, self.workflow = node, limit, workflow
        place = _place(("workflow", workflow), ("node", node))
        super().__init__(_at(place, f"the condition did not end the loop within max_iterations={limit}: raise it"))


class SignalTimeout(DurableError, TimeoutError):
    """The signal did not come within the wait's `timeout` seconds, and the wait has no ``on_timeout``."""

    def __init__(
        self, signal: str, *, step: str | None = None, timeout: float | None = None, workflow: str | None = None
    ) -> None:
        self.signal, self.step, self.timeout, self.workflow = signal, step, timeout, workflow
        limit = "in time" if timeout is None else f"within {timeout:g} s"
        place = _place(("workflow", workflow), ("step", step))
        super().__init__(_at(place, f"the signal {signal!r} did not come {limit}: on_timeout= gives a value instead"))


class RequestTimeout(DurableError, TimeoutError):
    """The run did not reply to a request within `timeout` seconds. The request stays in its inbox, and may be answered
    still: asking again with the same `id` waits for that reply, and sends nothing."""

    def __init__(
        self, name: str, *, run_id: object = None, timeout: float | None = None, workflow: str | None = None
    ) -> None:
        self.name, self.run_id, self.timeout, self.workflow = name, run_id, timeout, workflow
        limit = "in time" if timeout is None else f"within {timeout:g} s"
        place = _place(("workflow", workflow), ("run", run_id))
        cure = "is a worker running, and does the run receive it? timeout= waits longer"
        super().__init__(_at(place, f"no reply to the request {name!r} {limit}: {cure}"))


class ChildFailed(DurableError):
    """A child run failed or was canceled (`status`). `error` is the child's recorded error, `run_id` its id."""

    def __init__(
        self,
        *,
        step: str,
        run_id: object = None,
        status: str = "failed",
        error: Mapping[str, Any] | None = None,
        child: str | None = None,
        workflow: str | None = None,
    ) -> None:
        self.step, self.run_id, self.status, self.child, self.workflow = step, run_id, status, child, workflow
        self.error: dict[str, Any] = dict(error or {})
        place = _place(("workflow", workflow), ("step", step))
        what = _place(("child", child), ("run", run_id)) or "the child"
        super().__init__(_at(place, f"{what} ended {status}" + (f": {_text(error)}" if error else "")))


class JoinFailed(DurableError):
    """Branches of a parallel (or join) failed. `failures` maps each failed branch to its recorded error."""

    def __init__(self, step: str, failures: Mapping[str, Mapping[str, Any]], *, workflow: str | None = None) -> None:
        self.step, self.workflow = step, workflow
        self.failures: dict[str, Mapping[str, Any]] = dict(failures)
        place = _place(("workflow", workflow), ("step", step))
        told = "; ".join(f"{branch!r}: {_text(error)}" for branch, error in self.failures.items())
        many = "a branch" if len(self.failures) == 1 else f"{len(self.failures)} branches"
        super().__init__(_at(place, f"{many} failed: {told}"))


class RaceFailed(DurableError):
    """Every branch of a race failed. `failures` maps each to its recorded error."""

    def __init__(self, step: str, failures: Mapping[str, Mapping[str, Any]], *, workflow: str | None = None) -> None:
        self.step, self.workflow = step, workflow
        self.failures: dict[str, Mapping[str, Any]] = dict(failures)
        place = _place(("workflow", workflow), ("step", step))
        told = "; ".join(f"{branch!r}: {_text(error)}" for branch, error in self.failures.items())
        super().__init__(_at(place, f"every branch failed: {told}"))
