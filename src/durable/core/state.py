"""What the core looks at: the locked run, its journal and its inbox, as frozen values.

Read this file first, then :mod:`durable.core.transition` (what the core answers), then ``engine/advance.py``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from durable.core.frozen import value
from durable.define.nodes import Workflow
from durable.define.registry import Registry
from durable.values import JsonText, Status, WaitingFor

if TYPE_CHECKING:
    from durable.core.functions.body import Body


class EntryKind(StrEnum):
    """What a journal row records; the ``kind`` column."""

    STEP = "step"
    PARALLEL = "parallel"
    ROUTE = "route"
    LOOP = "loop"
    SLEEP = "sleep"
    SIGNAL = "signal"
    CHILD = "child"  # also one item of a map: `map[i]`
    BRANCH = "branch"  # of a parallel, a route, a join or a race: `node/branch`
    ITERATION = "iteration"  # of a loop: `node[i]`
    CHOICE = "choice"  # a computed value that must never be computed anew: `choice:node`
    UNDO = "undo"  # a compensator that ended: `undo:<the entry's id>`
    RESULT = "result"  # the value of `result=fn`, or of a body: `run:result`
    BLOCK = "block"
    JOIN = "join"
    RACE = "race"
    MAP = "map"
    RECEIVE = "receive"
    REPLY = "reply"  # a message that was completed
    CHECKPOINT = "checkpoint"
    ROLLBACK = "rollback"  # the run went back to a checkpoint: `rollback:<epoch>`
    PATCH = "patch"  # the run's path parts from the journal's: `patch:<id>`, or after a retry `patch:retry:<...>`


EntryStatus: TypeAlias = Literal["completed", "failed", "suspended"]


@value(frozen=True, slots=True)
class Entry:
    """One journal row: a (sub-)node that finished, or one that returned ``Suspend`` (status ``suspended``).

    `seq` is 0 until the entry is written; its order is that in which the run's entries were written.
    `extra` holds what the engine must remember beside the result (JSON-able, small: a loop's next item is JSON text).
    """

    step_id: str
    kind: EntryKind
    status: EntryStatus
    result: JsonText | None = None
    error: Failure | None = None
    attempt: int = 1
    started_at: datetime | None = None
    finished_at: datetime | None = None
    parent: str | None = None  # the step id of the enclosing node
    extra: Mapping[str, Any] | None = None
    seq: int = 0

    def placed(self, seq: int) -> Entry:
        """The same as it stands in the journal, once it has been written."""
        return Entry(
            self.step_id,
            self.kind,
            self.status,
            self.result,
            self.error,
            self.attempt,
            self.started_at,
            self.finished_at,
            self.parent,
            self.extra,
            seq,
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the journal keeps it. `kind`: ``error`` (may be retried), ``critical`` (NonRetryable and the like),
    ``timeout``, ``exhausted``, ``interrupted`` (crashes), ``canceled``."""

    type: str
    message: str
    kind: str = "error"
    step: str | None = None
    attempts: int = 1
    traceback: str | None = None
    details: Mapping[str, Any] | None = None  # failed branches, the child's error, what was not undone ...


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a step that has begun and has not finished. Kept in the run row's ``frame``, by step id."""

    attempts: int = 0  # attempts that failed
    crashes: int = 0  # attempts whose worker died
    since: datetime | None = None  # when it began
    due: datetime | None = None  # the time of the next attempt, or a sleep's end
    waits: WaitingFor | None = None  # None: it can run, or is running
    name: str | None = None  # the signal waited for
    deadline: datetime | None = None  # of a wait for a signal
    names: tuple[str, ...] | None = None  # of a receive: the signals that it takes; empty: any
    child: uuid.UUID | None = None
    undo: bool = False  # of a body's child: it is rolled back with this run
    resume_data: JsonText | None = None  # what resume() brought; the next attempt gets it
    running: bool = False  # a claim's owner executes it


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's hold on a run that it executes without holding the row. The token fences late results."""

    worker: int
    token: uuid.UUID


class MessageKind(StrEnum):
    """What lies in an inbox; the ``kind`` column."""

    SIGNAL = "signal"
    CANCEL = "cancel"  # body: {"reason": str | null, "compensate": bool}
    PAUSE = "pause"
    RESUME = "resume"  # the other half of pause
    ROLLBACK = "rollback"  # from a parent to its completed child; name: the step to answer to
    CHILD = "child"  # a child's end; name: the parent's step id; body: {"status", "result" | "error"}


REQUESTS: Final = frozenset({MessageKind.CANCEL, MessageKind.PAUSE, MessageKind.RESUME, MessageKind.ROLLBACK})
"""What is asked of the run itself, whatever it waits for."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the inbox that nobody has taken yet. `fresh`: no lock holder has seen it before."""

    seq: int
    kind: MessageKind
    name: str | None
    body: JsonText | None
    sent_at: datetime
    fresh: bool = True
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a compensating run ends once the rollback is over."""

    status: Literal[Status.FAILED, Status.CANCELED]
    error: Failure | None = None
    reason: str | None = None
    answer_to: str | None = None  # the parent's step id, where a parent rolls this run back
    to: str | None = None  # the checkpoint from which the run then goes on, instead of ending
    compensate: bool = False  # a cancel that lets the body clean up first: whether a rollback follows
    until: datetime | None = None  # how long the body may clean up
    stop: bool = False  # cancel during the rollback: end after the current compensator


@dataclass(frozen=True)  # without slots: so it is copied at once, see `changed`
class Run:
    """The locked run row, whole. A transition says what it becomes."""

    id: uuid.UUID
    workflow: str
    version: str
    status: Status
    revision: int
    current_step: int
    input: JsonText
    queue: str
    created_at: datetime
    key: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    parent_id: uuid.UUID | None = None
    parent_step: str | None = None
    frame: Mapping[str, Begun] = field(default_factory=dict)
    waiting_for: WaitingFor | None = None
    waiting_name: str | None = None
    wake_at: datetime | None = None
    deadline: datetime | None = None
    claim: Claim | None = None
    pausing: bool = False  # a pause was asked for while the run is claimed
    ending: Ending | None = None
    undo_cursor: int | None = None  # the journal seq down to which the rollback has come
    retries: int = 0  # how often `retry` took it up again
    cleanup: bool = False  # its body may have something to do when it is canceled: a worker must do it
    seed: uuid.UUID | None = None  # of its random numbers; None: its own id
    chain: uuid.UUID | None = None  # the first run of its chain of continue_as_new; None: itself
    predecessor: uuid.UUID | None = None
    successor: uuid.UUID | None = None
    error: Failure | None = None
    reason: str | None = None  # why it was canceled
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @cached_property
    def id_text(self) -> str:
        """The id as text, which is asked for at each step."""
        return str(self.id)

    def changed(self, **fields: Any) -> Run:
        """This run with other values in `fields`: ``dataclasses.replace``, which sets each field by itself, at a
        fraction of the cost. Raises TypeError for what is no field."""
        if not fields.keys() <= Run.__dataclass_fields__.keys():
            raise TypeError(f"no fields of a run: {', '.join(fields.keys() - Run.__dataclass_fields__.keys())}")
        other = object.__new__(Run)
        object.__setattr__(other, "__dict__", vars(self) | fields)
        return other


@value(frozen=True, slots=True)
class View:
    """All that a decision may depend on."""

    run: Run
    workflow: Workflow | None  # None: this process does not know the run's workflow in its version
    registry: Registry
    journal: Mapping[str, Entry]
    inbox: tuple[Message, ...]
    body: Body | None = None  # of a function: its coroutine, as far as the journal has driven it

    def ahead(self, run: Run, journal: Mapping[str, Entry] | None = None) -> View:
        """The same with what is decided and not written yet: the run as it becomes, and its journal."""
        journal = self.journal if journal is None else journal
        return View(run, self.workflow, self.registry, journal, self.inbox, self.body)
