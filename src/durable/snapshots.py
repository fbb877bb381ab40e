"""What `status`, `list` and `history` show of a run: frozen values, made by ``store/read.py`` and by nobody else.

Results, inputs and the like are plain JSON values here (dicts, lists, strings, numbers), not the types of the workflow:
a snapshot can be read where the workflow is not registered.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from durable.values import Status, WaitingFor

T = TypeVar("T")

RunStatus: TypeAlias = Status

DERIVED: Final[Mapping[WaitingFor, str]] = {
    WaitingFor.START: "delayed",
    WaitingFor.RETRY: "retrying",
    WaitingFor.SLEEP: "sleeping",
    WaitingFor.SIGNAL: "waiting_for_signal",
    WaitingFor.RESUME: "waiting_for_resume",
    WaitingFor.CHILD: "waiting_for_child",
    WaitingFor.ROLLBACK: "waiting_for_rollback",
    WaitingFor.DEFINITION: "waiting_for_definition",
    WaitingFor.PERSON: "waiting_for_person",
}
"""What a parked run is called, by what it waits for; ``list(status=...)`` takes these beside the statuses."""

PARKED: Final = (Status.PENDING, Status.SUSPENDED)
"""The statuses that a derived one refines. A paused or compensating run may wait too; it still is called that."""

StepStatus: TypeAlias = Literal["completed", "failed", "suspended", "running", "waiting"]


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A recorded error. `kind`: error, critical, timeout, exhausted, interrupted or canceled."""

    type: str
    message: str
    kind: str = "error"
    step: str | None = None
    attempts: int = 1
    traceback: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


@dataclass(frozen=True, slots=True)
class StepSnapshot:
    """A node, a branch (``build/api``), an iteration (``poll[2]``) or an undo (``undo:ship``) that has begun.

    `attempt` is the one that ended the step, or the one that runs or comes next. `snapshot` is what a suspended step
    handed to ``Suspend``. `children` are the steps, branches or iterations in it, in the order in which they finished.
    """

    step_id: str
    kind: str
    status: StepStatus
    attempt: int = 1
    result: Any = None
    error: ErrorInfo | None = None
    snapshot: Any = None
    progress: Mapping[str, Any] | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    next_attempt_at: datetime | None = None
    children: tuple[StepSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run as it stood at one moment. Those of a `list` have no steps, results and children."""

    id: uuid.UUID
    workflow: str
    version: str
    status: Status
    cursor: int
    created_at: datetime
    total_steps: int | None = None
    waiting_for: WaitingFor | None = None
    waiting_name: str | None = None
    wake_at: datetime | None = None
    key: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    parent_id: uuid.UUID | None = None
    parent_step: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deadline: datetime | None = None
    input: Any = None
    results: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[StepSnapshot, ...] = ()
    error: ErrorInfo | None = None
    reason: str | None = None
    not_undone: tuple[str, ...] = ()
    children: tuple[RunSnapshot, ...] = ()
    retries: int = 0
    revision: int = 0
    """Raised by every change of the run."""
    predecessor: uuid.UUID | None = None
    """The run that went on as this one, by ``continue_as_new``."""
    successor: uuid.UUID | None = None
    """The run as which this one went on."""
    forked_from: uuid.UUID | None = None

    @property
    def derived(self) -> str:
        """The status, or more exactly what a parked run is doing: ``retrying``, ``sleeping`` ..."""
        if self.waiting_for is not None and self.status in PARKED:
            return DERIVED[self.waiting_for]
        return self.status.value

    @property
    def ended(self) -> bool:
        return self.status.ended


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One line of a run's history. `step` is the step's id, `parent` that of the node around it.

    `payload` is what a step returned, a wait was given or a message carried; `data` what a lifecycle event says more.
    """

    kind: str
    at: datetime
    step: str | None = None
    parent: str | None = None
    attempt: int | None = None
    error: ErrorInfo | None = None
    next_attempt_at: datetime | None = None
    payload: Any = None
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items and where the next page begins: hand `next` to the same call as ``after=``. None: this is the last."""

    items: tuple[T, ...]
    next: str | None = None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
