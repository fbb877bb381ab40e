"""The hooks of an app: functions of its own that are told what becomes of its runs, and what they are told."""

from __future__ import annotations

import inspect
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from durable.core.reports import reports
from durable.core.state import View
from durable.core.transition import Report, ReportKind, Transition
from durable.errors import DefinitionError
from durable.snapshots import ErrorInfo
from durable.store.deliveries import Delivery
from durable.store.history import error_info
from durable.values import JsonText, Status


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A run's status has changed. `id` is the same whenever the same change is told; `at` is the database's time.

    `error` is that of a failed run, or of one that failed and rolls back now; `reason` why it was canceled.
    """

    id: str
    run_id: uuid.UUID
    workflow: str
    version: str
    key: str | None
    before: Status
    status: Status
    at: datetime
    error: ErrorInfo | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An attempt of a step has failed, or a run has failed by something else: then `step` and `attempt` are None.

    `id` is the same whenever the same failure is told; `at` is the database's time. `limit` is how many attempts the
    step has (None: no limit, or not known); `delay` the seconds until the next one, if there is one.
    """

    id: str
    run_id: uuid.UUID
    workflow: str
    version: str
    key: str | None
    step: str | None
    attempt: int | None
    limit: int | None
    will_retry: bool
    delay: float | None
    at: datetime
    error: ErrorInfo

    @property
    def kind(self) -> str:
        """Of the error: error, critical, timeout, exhausted or interrupted."""
        return self.error.kind

    @property
    def remaining(self) -> int | None:
        """How many attempts are left: 0 if there is no next one, None if they have no limit."""
        if not self.will_retry:
            return 0
        return None if self.limit is None or self.attempt is None else max(0, self.limit - self.attempt)


Hook: TypeAlias = Callable[[Any], object]
"""Takes one report. A sync one is called in a thread, an async one is awaited on the worker's event loop."""


class Hooks:
    """The hooks of one app, by what they are told. Hooks may be added at any time."""

    def __init__(self) -> None:
        self._hooks: dict[ReportKind, tuple[Hook, ...]] = {}

    @property
    def kinds(self) -> tuple[ReportKind, ...]:
        """What somebody listens to."""
        return tuple(self._hooks)

    def add(self, kind: ReportKind, hook: Hook) -> None:
        """The same one again changes nothing. Raises DefinitionError for what can't be called with one report."""
        _check(hook)
        hooks = self._hooks.get(kind, ())
        if hook not in hooks:
            self._hooks[kind] = (*hooks, hook)

    def of(self, kind: ReportKind, refused: Mapping[str, str] | None = None) -> tuple[Hook, ...]:
        """The hooks that are to be told; with `refused`, only those that raised when they were told before."""
        hooks = self._hooks.get(kind, ())
        return hooks if refused is None else tuple(hook for hook in hooks if name_of(hook) in refused)

    def reports(self, view: View, transition: Transition, now: datetime) -> tuple[Report, ...]:
        """What they are to be told of a transition."""
        return reports(view, transition, now, self._hooks)


def name_of(hook: Hook) -> str:
    """How a delivery, and the log, call a hook."""
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"


def report_of(delivery: Delivery, body: JsonText) -> StatusChange | ErrorReport:
    """What hooks are handed. `body` is the delivery's, decoded."""
    raw: dict[str, Any] = json.loads(body)
    common: dict[str, Any] = {
        "id": f"{delivery.run_id}:{delivery.seq}",
        "run_id": delivery.run_id,
        "workflow": raw["workflow"],
        "version": raw["version"],
        "key": raw["key"],
        "at": datetime.fromisoformat(raw["at"]),
    }
    error = error_info(raw["error"])
    if delivery.kind == "status":
        before, status = Status(raw["before"]), Status(raw["status"])
        return StatusChange(**common, before=before, status=status, error=error, reason=raw["reason"])
    assert error is not None
    about: dict[str, Any] = {name: raw.get(name) for name in ("step", "attempt", "limit", "delay")}
    return ErrorReport(**common | about, will_retry=raw["will_retry"], error=error)


def _check(hook: Hook) -> None:
    if not callable(hook):
        raise DefinitionError(f"{hook!r} is no function: a hook is called with what it is told")
    try:
        signature = inspect.signature(hook)
    except ValueError:
        return  # built in: it says nothing of itself
    try:
        signature.bind(None)
    except TypeError:
        raise DefinitionError(
            f"hook {name_of(hook)}{signature} must take one argument, which is what it is told"
        ) from None
