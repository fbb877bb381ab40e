"""What the core answers: a call to user code, or a transition to be written; and what a call can lead to.

Three values, none of which touches the run. ``engine/calls.py`` turns a :class:`Call` into an outcome; ``store`` writes
a :class:`Transition`; nobody else does either.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from durable.core.frozen import value
from durable.core.state import Entry, EntryKind, Failure, MessageKind, Run
from durable.define.nodes import Loop, Work
from durable.define.payload import ANY, Schema
from durable.values import JsonText, Status


class Purpose(StrEnum):
    """Why user code is called: what settle makes of its value depends on it."""

    STEP = "step"
    BRANCH = "branch"
    ITERATION = "iteration"
    CHOICE = "choice"  # a route's selector, a computed duration, signal name or child
    RESULT = "result"  # `result=fn` of the workflow
    UNDO = "undo"  # a compensator


@value(frozen=True, slots=True)
class Call:
    """User code to run: `work.handler` with a context made of these facts and the view.

    `deadline` is when the attempt must have ended at the latest (its own timeout is in `work`); `attempt` is 1-based.
    """

    step_id: str
    purpose: Purpose
    work: Work
    attempt: int = 1
    crashes: int = 0
    deadline: datetime | None = None
    loop: Loop | None = None  # ITERATION: whose conditions are evaluated around the handler
    iteration: int | None = None
    item: JsonText | None = None  # ITERATION and its UNDO; None at iteration 0: map_input or the run's input
    snapshot: JsonText | None = None
    resume_data: JsonText | None = None
    resumed: bool = False  # re-entry after Suspend: resume_data counts, even when it is null
    output: JsonText | None = None  # UNDO: what the step returned
    output_type: Schema = ANY
    undoes: str | None = None  # UNDO: the entry's step id
    kind: EntryKind | None = None  # of its entry; None: what the node says
    parent: str | None = None
    extra: Mapping[str, Any] | None = None  # of its entry
    shares: bool = False  # others run, or wait, beside it under the same claim: it outlasts this call
    ephemeral: bool = False  # its entry may travel with the next write

    @property
    def claims_first(self) -> bool:
        """Whether it never runs under the lock: it is to be long, or its attempt must be on record before it runs."""
        return self.work.transactional is False or self.work.at_most_once

    @property
    def calls(self) -> tuple[Call, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Fanout:
    """Branches that may all run now, concurrently, under one claim."""

    calls: tuple[Call, ...]


@value(frozen=True, slots=True)
class Succeeded:
    """The handler returned; its value is storable and stands here as JSON text."""

    value: JsonText


@dataclass(frozen=True, slots=True)
class Iterated:
    """A loop's conditions and handler ran. `value` is None if `while_` said stop before the handler ran."""

    value: JsonText | None
    stop: bool
    next_item: JsonText | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed. `retryable`: the work's Retry takes this kind of error; `delay`: what a backoff *function* of
    the user's answered, in seconds (None: the policy computes it)."""

    failure: Failure
    retryable: bool
    delay: float | None = None


@dataclass(frozen=True, slots=True)
class Suspended:
    """The handler returned ``Suspend`` or an object of its shape."""

    snapshot: JsonText


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The handler was ended from outside before it had an outcome. `by`: ``cancel`` (a request in the inbox),
    ``shutdown`` (handed back, not counted), ``crash`` (the connection that it was lent is gone, and with it what it
    wrote: counted as the death of a worker is)."""

    by: Literal["cancel", "shutdown", "crash"]


Outcome: TypeAlias = Succeeded | Iterated | Failed | Suspended | Interrupted


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One row of the attempts table."""

    step_id: str
    attempt: int
    kind: Literal["failed", "interrupted"]
    error: Failure | None
    started_at: datetime | None
    finished_at: datetime
    next_attempt_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the run's events: a lifecycle transition (`kind` as in HistoryEvent.kind) or a discarded branch. `at`:
    if that was not now."""

    kind: str
    step_id: str | None = None
    data: Mapping[str, Any] | None = None
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to another run: goes into its inbox, with its doorbell, in this transaction."""

    run_id: uuid.UUID
    kind: MessageKind
    name: str | None = None
    body: JsonText | None = None
    id: str | None = None  # the same id is delivered once


@dataclass(frozen=True, slots=True)
class ChildStart:
    """A run to be started in this transaction."""

    id: uuid.UUID
    workflow: str
    version: str
    input: JsonText
    parent_step: str


@dataclass(frozen=True, slots=True)
class Successor:
    """The run that goes on in this one's place: it takes key, tags, priority, parent, deadline and unread messages."""

    id: uuid.UUID
    version: str
    input: JsonText


ReportKind: TypeAlias = Literal["status", "error"]


@dataclass(frozen=True, slots=True)
class Report:
    """What hooks are to be told of a transition, as JSON-able fields; one row of the deliveries table."""

    kind: ReportKind
    body: Mapping[str, Any]


class Next(StrEnum):
    """The continuation that a transition enqueues."""

    ADVANCE = "advance"
    COMPENSATE = "compensate"

    @classmethod
    def of(cls, status: Status) -> Next:
        """What takes a run in this status further."""
        return cls.COMPENSATE if status is Status.COMPENSATING else cls.ADVANCE


@value(frozen=True, slots=True)
class Transition:
    """What is to be written, all of it in one transaction, guarded by ``before.revision``.

    `after` carries the new revision already. `next` is None for a run that parks, ends, or is claimed.
    `taken` maps the seq of each message taken to the step that took it (None: a control request).
    """

    before: Run
    after: Run
    entries: tuple[Entry, ...] = ()
    attempts: tuple[FailedAttempt, ...] = ()
    events: tuple[Event, ...] = ()
    taken: Mapping[int, str | None] | None = None
    outgoing: tuple[Outgoing, ...] = ()
    children: tuple[ChildStart, ...] = ()
    replies: Mapping[int, JsonText] | None = None  # by the seq of the message that is completed
    successor: Successor | None = None  # continue_as_new
    prune: tuple[str, ...] = ()  # step ids of a loop's old iterations, deleted from the journal
    next: Next | None = None
    forget: tuple[str, ...] = ()  # step ids whose `failed` journal rows are deleted: retry takes them up anew
    reports: tuple[Report, ...] = ()  # for the hooks of the process that writes this

    def of_row(self, row: Run) -> Transition:
        """The same, to be written to `row`: it was decided for a run that was ahead of it."""
        return self if self.before is row else replace(self, before=row)

    @property
    def ends(self) -> bool:
        """Whether the run comes to its end by this."""
        return self.after.status.ended and not self.before.status.ended


Decision: TypeAlias = Transition | Call | Fanout | None
"""What planning answers; None: there is nothing to do now."""


@value(frozen=True, slots=True)
class Limits:
    """What the engine, not the workflow, allows. `chance` is a fresh random number in [0, 1) for the jitter.

    `watching`: this process executes a step that was running in crashes. So that it is not charged with another's, no
    body that may have been the killer is driven meanwhile.
    """

    max_crashes: int = 5
    chance: float = 0.5
    watching: bool = False
