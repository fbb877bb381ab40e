"""The few shapes that every room shares: the life of a run, payload text, identifiers.

A payload travels through the engine as JSON *text*: it is made from a Python value once, where user code ends, and
turned back into one where user code begins. Nothing in between parses it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

JsonText = str
"""A JSON document as text: what a payload column holds."""


class Status(StrEnum):
    """Where a run is in its life. The legal moves are in :data:`MOVES`, and nowhere else."""

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    PAUSED = "paused"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def ended(self) -> bool:
        """Whether a run in this status has come to its end (``failed`` can be taken up again by ``retry``)."""
        return self in ENDED


_S = Status
MOVES: Final[Mapping[Status, frozenset[Status]]] = {
    # The first transition of a run carries it through `running`, so it may leave `pending` to where that leads.
    _S.PENDING: frozenset({_S.RUNNING, _S.SUSPENDED, _S.PAUSED, _S.COMPENSATING, _S.COMPLETED, _S.FAILED, _S.CANCELED}),
    _S.RUNNING: frozenset({_S.SUSPENDED, _S.PAUSED, _S.COMPENSATING, _S.COMPLETED, _S.FAILED, _S.CANCELED}),
    _S.SUSPENDED: frozenset({_S.RUNNING, _S.PAUSED, _S.COMPENSATING, _S.COMPLETED, _S.FAILED, _S.CANCELED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.SUSPENDED, _S.COMPENSATING, _S.FAILED, _S.CANCELED}),
    _S.COMPENSATING: frozenset({_S.FAILED, _S.CANCELED, _S.RUNNING}),
    _S.FAILED: frozenset({_S.RUNNING}),
    _S.COMPLETED: frozenset({_S.COMPENSATING}),
    _S.CANCELED: frozenset(),
}
"""Every legal move from one status to another. The database's check and the diagram in the docs are made from it."""

ENDED: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELED})


class WaitingFor(StrEnum):
    """What a parked run waits for; the ``waiting_for`` column."""

    START = "start"  # the delay given at start
    RETRY = "retry"
    SLEEP = "sleep"
    SIGNAL = "signal"
    RESUME = "resume"  # a step that returned Suspend waits for resume() on its own name
    CHILD = "child"
    ROLLBACK = "rollback"  # a child that is being rolled back
    DEFINITION = "definition"  # a worker that knows the workflow and version
    PERSON = "person"  # journal and code disagree


@dataclass(frozen=True, slots=True)
class Suspend:
    """Return it from a handler to park the run on the step's own name until ``resume(run_id, step_name, data)``.

    ``snapshot`` (any storable value) is journaled, shown in ``status``, and handed back as ``ctx.snapshot``.
    """

    snapshot: Any = None


def child_id(parent: uuid.UUID, step_id: str, retries: int) -> uuid.UUID:
    """The id of the run that `step_id` of `parent` starts: the same whenever the same start is repeated."""
    return uuid.uuid5(parent, f"{step_id}@{retries}" if retries else step_id)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Break(Generic[T]):
    """Return it from the body of ``ctx.loop``: the loop ends, and yields `value`."""

    value: T = None  # type: ignore[assignment]  # Break() ends a loop that yields nothing


class Canceled(BaseException):
    """Raised in a workflow's body, at the current await, when its run is canceled.

    No ``except Exception`` swallows it. Steps with ``on_cancel=True`` may still be awaited, for ``cancel_timeout``
    seconds; any other operation raises it again.
    """


class Rollback(BaseException):
    """Raise it in a workflow's body: what was done is undone, newest first.

    ``Rollback()`` undoes everything, and the run fails. ``Rollback(to=name)`` undoes what was done since that
    checkpoint, and the body goes on from there. No ``except Exception`` swallows it.
    """

    def __init__(self, to: str | None = None) -> None:
        self.to = to
        super().__init__("roll back everything" if to is None else f"roll back to checkpoint {to!r}")


class ContinueAsNew(BaseException):
    """What ``ctx.continue_as_new`` raises: this run ends, and its successor begins with `input`."""

    def __init__(self, given: Any) -> None:
        self.input = given
        super().__init__("continue as new")
