"""The world around the pure core, in memory: rows, jobs, messages, time, and workers that die.

It holds what the core's decisions are written to, refuses what the database would refuse, and wakes a run only by what
would wake it there: a continuation of its revision, a doorbell for a message that nobody has seen, a timer. So a lost
wake-up is a run that rests although `plan` has something to do; `World.drain` ends with that check.

User code is called by the engine's own scripts, without its event loop. It is no database: nothing runs at once.

Functions have bodies: with `keeps`, a worker keeps them from one transition to the next, as the engine does; without,
each decision is made by a replay. Either way every decision is also made by another body, new from the journal, and
must be the same. So it is with builders' journals, which a worker carries on from one step to the next.
"""

from __future__ import annotations

import inspect
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final, Literal, TypeAlias, cast

from durable.core import control
from durable.core.crash import claimed, died
from durable.core.functions.body import Body
from durable.core.functions.new import new_body
from durable.core.journal import Journal
from durable.core.plan import go_on, plan
from durable.core.settle import Ended, defer, settle
from durable.core.state import REQUESTS, Claim, Entry, Failure, Message, MessageKind, Run, View
from durable.core.transition import (
    Call,
    ChildStart,
    Decision,
    FailedAttempt,
    Fanout,
    Interrupted,
    Limits,
    Next,
    Outcome,
    Outgoing,
    Purpose,
    Successor,
    Transition,
)
from durable.define.builder import Builder
from durable.define.function import WorkflowFunction
from durable.define.payload import ANY
from durable.define.registry import Registry
from durable.engine.calls import _iteration, _single, failed_attempt
from durable.engine.context import StepContext
from durable.errors import StepTimeout
from durable.store import codec
from durable.store.codec import Payloads
from durable.values import MOVES, Status, WaitingFor

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
ROOM: Final = 3_000
"""Jobs that one drain may take: more is a run that never rests."""

_PLAIN = Payloads()
_TOP_LEVEL = frozenset({"step", "parallel", "route", "loop", "sleep", "signal", "child"})
AnyFlow: TypeAlias = Builder[Any] | WorkflowFunction[Any, Any]
_RUNNABLE = (Status.PENDING, Status.RUNNING, Status.COMPENSATING)


class Crash(BaseException):
    """The worker is killed."""


class Refused(AssertionError):
    """The database would refuse this write."""


@dataclass
class Sim:
    """One run: its row and all that belongs to it."""

    world: World
    run: Run
    journal: dict[str, Entry] = field(default_factory=dict)
    inbox: list[Message] = field(default_factory=list)
    taken: dict[int, str | None] = field(default_factory=dict)
    message_ids: set[str] = field(default_factory=set)
    replies: dict[int, str] = field(default_factory=dict)
    attempts: list[FailedAttempt] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    busy: bool = False  # its row is locked

    @property
    def id(self) -> uuid.UUID:
        return self.run.id

    @property
    def status(self) -> Status:
        return self.run.status

    def has(self, status: Status) -> bool:
        """``run.status is status``, without telling the type checker that it stays so."""
        return self.run.status is status

    @property
    def statuses(self) -> list[str]:
        """The statuses that it went through."""
        went = [Status.PENDING, *(t.after.status for t in self.transitions)]
        return [now.value for before, now in zip([None, *went], went, strict=False) if before is not now]

    @property
    def result(self) -> Any:
        """What ``run.result()`` gives, as plain JSON: read from the message that a parent would get."""
        assert self.status is Status.COMPLETED, (self.status, self.run.error)
        computed = self.journal.get("run:result")
        if computed is not None:
            return json.loads(computed.result or "null")
        workflow = self.view.workflow
        assert workflow is not None
        return {node.name: self.value(node.name) for node in workflow.nodes}

    @property
    def error(self) -> str:
        """``JoinFailed: ...``"""
        assert self.run.error is not None
        return f"{self.run.error.type.rpartition('.')[2]}: {self.run.error.message}"

    @property
    def not_undone(self) -> list[str]:
        assert self.run.error is not None
        return list((self.run.error.details or {}).get("not_undone", ()))

    @property
    def view(self) -> View:
        workflow = self.world.registry.find(self.run.workflow, self.run.version)
        return View(self.run, workflow, self.world.registry, dict(self.journal), tuple(self.inbox))

    def value(self, step_id: str) -> Any:
        return json.loads(self.journal[step_id].result or "null")

    def waits(self) -> tuple[WaitingFor | None, str | None]:
        return self.run.waiting_for, self.run.waiting_name

    def keys(self, status: str = "completed") -> list[str]:
        return [entry.step_id for entry in self.journal.values() if entry.status == status]

    def undone(self) -> list[str]:
        return [key.removeprefix("undo:") for key in self.journal if key.startswith("undo:")]

    def rest(self) -> timedelta:
        """How long it still waits."""
        assert self.run.wake_at is not None
        return self.run.wake_at - self.world.now

    # -- what app code does

    def signal(self, name: str, body: Any = None, *, id: str | None = None) -> bool:  # noqa: A002  # the facade's word
        text = None if body is None else ANY.dump(body)
        return self.world.send(self.id, MessageKind.SIGNAL, name, text, id) == "sent"

    def resume(self, name: str | None = None, data: Any = None) -> bool:
        """Strict, with a name; without one the other half of pause."""
        if name is None:
            return self._ask(MessageKind.RESUME)
        if self.busy or not (self.status in (Status.SUSPENDED, Status.PAUSED) or self.run.claim is not None):
            return False
        waiting = [b for b in self.run.frame.values() if b.waits in (WaitingFor.SIGNAL, WaitingFor.RESUME)]
        there = [m for m in self.inbox if m.kind is MessageKind.SIGNAL and m.name == name]
        return len([b for b in waiting if b.name == name]) > len(there) and self.signal(name, data)

    def pause(self) -> bool:
        return self._ask(MessageKind.PAUSE)

    def cancel(self, reason: str | None = None, *, compensate: bool = False) -> bool:
        return self._ask(MessageKind.CANCEL, json.dumps({"reason": reason, "compensate": compensate}))

    def retry(self) -> str:
        if self.status is Status.FAILED and control.was_undone(self.view):
            return "undone"
        transition = control.retry(self.view, self.world.now)
        if transition is None:
            return "refused"
        self.apply(transition)
        return "accepted"

    def _ask(self, kind: MessageKind, body: str | None = None) -> bool:
        if self.busy or any(message.kind in REQUESTS for message in self.inbox):
            return self.world.send(self.id, kind, None, body) == "sent"
        if not control.takes_effect(self.run, kind):
            return False
        request = Message(0, kind, None, body, self.world.now)
        self.apply(control.apply(self.view, request, self.world.now))
        return True

    # -- what the database does

    def apply(self, transition: Transition, view: View | None = None) -> None:
        """Write `transition`, decided from `view`."""
        before, after = self.run, transition.after
        self._check_move(transition)
        for step_id in transition.forget:
            if self.journal[step_id].status == "failed":
                del self.journal[step_id]
        for step_id in transition.prune:
            self.journal.pop(step_id, None)
        for entry in transition.entries:
            self._write(entry)
        self._take(transition, view)
        self.attempts += transition.attempts
        self.run = after
        self.transitions.append(transition)
        self._check_row()
        self._check_next(transition, before)
        if transition.successor is not None:
            self.world.continue_as(self, transition.successor)
        for message in transition.outgoing:
            self.world.outgoing.append(message)
            self.world.send(message.run_id, message.kind, message.name, message.body, message.id)
        for child in transition.children:
            self.world.start_child(self.run, child)
        if transition.next is not None:
            self.world.jobs.append(Job(self.id, transition.next, after.revision))
        self.world.check_invariants(self)

    def _check_move(self, transition: Transition) -> None:
        before, after = transition.before, transition.after
        _holds(before.revision == self.run.revision, "stale revision")
        _holds(after.revision == before.revision + 1, "the revision is raised by one")
        row = replace(self.run, claim=before.claim, frame=before.frame)  # without an ephemeral step that has ended
        _holds(before == row and before.claim in (None, self.run.claim), "before is the row as it stands")
        moved = after.status is before.status or after.status in MOVES[before.status]
        _holds(moved, f"no move from {before.status} to {after.status}")
        fixed = ("id", "workflow", "version", "input", "queue", "created_at", "parent_id", "parent_step", "key", "tags")
        _holds(all(getattr(before, name) == getattr(after, name) for name in fixed), "facts never change")

    def _write(self, entry: Entry) -> None:
        _holds(entry.seq == 0, "seq is the database's")
        _holds(entry.status != "failed" or entry.error is not None, "a failed entry says why")
        existing = self.journal.get(entry.step_id)
        _holds(existing is None or existing.status == "suspended", f"{entry.step_id} has an entry already")
        _holds(entry.extra is None or json.loads(json.dumps(entry.extra)) == entry.extra, "extra is JSON")
        for text in (entry.result, (entry.extra or {}).get("next")):
            _holds(text is None or json.loads(text) is not Ellipsis, "JSON")
        self.journal.pop(entry.step_id, None)
        self.world.seq += 1
        self.journal[entry.step_id] = replace(entry, seq=self.world.seq)

    def _take(self, transition: Transition, view: View | None) -> None:
        taken, replies = transition.taken or {}, transition.replies or {}
        there = {message.seq for message in self.inbox}
        _holds(set(taken) | set(replies) <= there, "a message is taken once")
        self.taken |= taken
        self.replies |= replies
        seen = {message.seq for message in view.inbox} if view is not None else set()
        self.inbox = [
            replace(message, fresh=message.fresh and message.seq not in seen)
            for message in self.inbox
            if message.seq not in taken and message.seq not in replies
        ]

    def _check_row(self) -> None:
        run = self.run
        ended = run.status.ended
        _holds(ended == (run.finished_at is not None), "finished_at")
        _holds(run.status is not Status.SUSPENDED or run.waiting_for is not None, "suspended says why")
        _holds(not ended or (run.wake_at is None and run.waiting_for is None), "ended waits not")
        _holds(run.claim is None or run.status in _RUNNABLE, "claimed is active")
        _holds(run.status is not Status.COMPENSATING or run.ending is not None, "compensating says how it ends")
        _holds(codec.frame(codec.frame_text(run.frame, _PLAIN), _PLAIN) == run.frame, "the frame is stored as it is")
        _holds(codec.ending(codec.ending_text(run.ending, _PLAIN), _PLAIN) == run.ending, "so is the ending")

    def _check_next(self, transition: Transition, before: Run) -> None:
        after = transition.after
        asked = any(message.kind in REQUESTS for message in self.inbox)
        if after.claim is not None:
            return _holds(transition.next is None, "a claimed run is its owner's")
        if after.status in _RUNNABLE and after.waiting_for is None:
            return _holds(transition.next is Next.of(after.status), "a runnable run has a continuation")
        if after.status.ended or after.status is Status.PAUSED:
            return _holds(transition.next is None or asked, "a run that rests has none")
        woken = self.inbox or after.pausing or before.pausing or after.ending or before.status is Status.PAUSED
        return _holds(transition.next is None or bool(woken), "a parked run has none")


@dataclass(frozen=True)
class Job:
    run_id: uuid.UUID
    kind: Next | None  # None: a doorbell
    revision: int | None = None


class World:
    """All runs, the queue, the clock, one worker."""

    def __init__(
        self,
        *workflows: AnyFlow,
        max_crashes: int = 5,
        chance: float = 0.5,
        interrupts: bool = True,
        order: Callable[[list[str]], int] = lambda flights: 0,
        pick: Callable[[list[Job]], int] = lambda jobs: 0,
        keeps: bool = True,
        doubts: bool = True,
    ) -> None:
        self.registry = Registry()
        for workflow in workflows:
            self.registry.add(workflow)
        self.limits = Limits(max_crashes, chance)
        self.interrupts = interrupts  # async handlers: a cancel ends them
        self.order = order  # which of the flights of a claim ends next
        self.pick = pick  # which job is taken up next
        self.keeps = keeps  # bodies, while the worker lives
        self.doubts = doubts  # what they decide, and asks another one
        self.bodies: dict[uuid.UUID, tuple[int, Body]] = {}  # and the revision of their run
        self.journals: dict[uuid.UUID, tuple[int, Journal]] = {}  # of builders' runs, likewise
        self.held: list[Body] = []  # those of the transaction that is open
        self.now = START
        self.seq = 0
        self.runs: dict[uuid.UUID, Sim] = {}
        self.jobs: list[Job] = []
        self.outgoing: list[Outgoing] = []
        self.points = 0
        self.crash_at: set[int] = set()
        self.crashes = 0
        self.dies = False  # at the next point: set by a body that kills its worker
        self.at_point: Callable[[], object] | None = None
        self.job: Job | None = None  # that is worked on
        self.effects: list[Callable[[], object]] = []  # of a step that was lent the connection: they go with its entry

    # -- what starts and wakes runs

    def start(
        self,
        workflow: str | AnyFlow,
        input: Any = None,  # noqa: A002  # the facade's word
        *,
        version: str | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        id: uuid.UUID | None = None,  # noqa: A002
    ) -> Sim:
        name = workflow if isinstance(workflow, str) else workflow.name
        definition = self.registry.latest(name)
        text = ANY.dump(input) if definition is None else definition.input.dump(input)
        version = version or (definition.version if definition else "1")
        id_ = id or uuid.uuid5(uuid.NAMESPACE_OID, str(len(self.runs)))
        begins = self.now + timedelta(seconds=delay or 0)
        run = Run(id_, name, version, Status.PENDING, 0, 0, text, "default", self.now)
        if timeout is not None:
            run = replace(run, deadline=begins + timedelta(seconds=timeout))
        if delay:
            run = replace(run, waiting_for=WaitingFor.START, wake_at=begins)
        return self._insert(run)

    def start_child(self, parent: Run, child: ChildStart) -> None:
        if child.id in self.runs:
            raise Refused("the child's id is taken")
        run = Run(child.id, child.workflow, child.version, Status.PENDING, 0, 0, child.input, "default", self.now)
        self._insert(replace(run, parent_id=parent.id, parent_step=child.parent_step, deadline=parent.deadline))

    def _insert(self, run: Run) -> Sim:
        self.runs[run.id] = sim = Sim(self, run)
        if run.waiting_for is None:
            self.jobs.append(Job(run.id, Next.ADVANCE, 0))
        return sim

    def continue_as(self, sim: Sim, successor: Successor) -> None:
        """Another run goes on in the place of this one, with what nobody has taken."""
        before = sim.run
        own = (Status.PENDING, 0, 0, successor.input, "default", self.now)
        run = Run(successor.id, before.workflow, successor.version, *own)
        link: dict[str, Any] = {n: getattr(before, n) for n in ("parent_id", "parent_step", "deadline", "key", "tags")}
        run = replace(run, chain=before.chain or before.id, predecessor=before.id, **link)
        heir = self._insert(run)
        handed = [message for message in sim.inbox if message.kind is not MessageKind.CHILD]
        heir.inbox = [replace(message, fresh=True) for message in handed]
        heir.message_ids = sim.message_ids
        sim.inbox = [message for message in sim.inbox if message not in handed]

    def child(self, parent: Sim, step: str) -> Sim:
        """The newest child of a step."""
        return [sim for sim in self.runs.values() if sim.run.parent_id == parent.id and sim.run.parent_step == step][-1]

    def send(
        self, run_id: uuid.UUID, kind: MessageKind, name: str | None, body: str | None, id_: str | None = None
    ) -> Literal["sent", "duplicate", "finished", "unknown"]:
        sim = self.runs.get(run_id)
        if sim is None:
            return "unknown"
        if sim.run.successor is not None and kind is not MessageKind.CHILD:
            return self.send(sim.run.successor, kind, name, body, id_)
        rollback = sim.status is Status.COMPLETED and kind is MessageKind.ROLLBACK
        if sim.status.ended and not rollback:
            return "duplicate" if id_ in sim.message_ids else "finished"
        if id_ is not None and id_ in sim.message_ids:
            return "duplicate"
        if id_ is not None:
            sim.message_ids.add(id_)
        self.seq += 1
        sim.inbox.append(Message(self.seq, kind, name, body, self.now, id=id_))
        self.jobs.append(Job(run_id, None))
        return "sent"

    def skip(self, seconds: float = 0, **units: float) -> None:
        """Move the clock, put back what falls due, and drain."""
        self.now += timedelta(seconds=seconds, **units)
        self.drain()

    def put_back_due(self) -> None:
        for sim in self.runs.values():
            run = sim.run
            waits = run.status in (Status.PENDING, Status.SUSPENDED, Status.COMPENSATING) and run.claim is None
            if waits and run.wake_at is not None and run.wake_at <= self.now and not self._has_job(run):
                self.jobs.append(Job(run.id, Next.of(run.status), run.revision))

    def put_back_known(self) -> None:
        """What a worker that knows more does for runs that were parked for want of a definition."""
        for sim in self.runs.values():
            if sim.run.waiting_for is WaitingFor.DEFINITION and sim.status is not Status.PAUSED:
                self.jobs.append(Job(sim.id, Next.of(sim.status), sim.run.revision))

    def recover(self) -> None:
        """The sweep, after a crash."""
        for sim in self.runs.values():
            run = sim.run
            if any(message.fresh for message in sim.inbox) and not run.status.ended:
                self.jobs.append(Job(run.id, None))
            free = run.status in _RUNNABLE and run.waiting_for is None and run.claim is None
            if free and not self._has_job(run):
                self.jobs.append(Job(run.id, Next.of(run.status), run.revision))

    def lose_jobs(self) -> None:
        """Every row of the queue is deleted, and the sweep comes. (What was asked of a paused run, was seen, and waits
        behind what was asked before it is known to its continuation alone.)"""
        if not any(sim.status is Status.PAUSED and sim.inbox for sim in self.runs.values()):
            self.jobs.clear()
            self.recover()

    def _has_job(self, run: Run) -> bool:
        return any(job.run_id == run.id and job.revision == run.revision for job in self.jobs)

    # -- the worker

    def drain(self, jobs: int = ROOM) -> None:
        """Run everything that can run now; with `jobs`, stop after so many, as a worker that is stopped would."""
        stop_early = jobs < ROOM
        for _ in range(jobs):
            if not self.jobs:
                self.put_back_due()
            if not self.jobs:
                return self.check_rest()
            self._work(self.jobs.pop(self.pick(self.jobs)))
        if not stop_early:
            raise AssertionError("it never rests")

    def drive(self, times: int = 60) -> None:
        """Drain, moving the clock on to each run's time, until nothing waits for a time any more."""
        for _ in range(times):
            self.drain()
            active = [sim.run for sim in self.runs.values() if sim.status is not Status.PAUSED]
            wakes = [run.wake_at for run in active if run.wake_at is not None]
            if not wakes:
                return
            self.now = max(self.now, min(wakes))
        raise AssertionError("it is due for ever")

    def _work(self, job: Job) -> None:
        sim, self.job = self.runs[job.run_id], job
        try:
            self._point()
            if job.kind is None:
                self._deliver(sim)
            elif sim.run.revision == job.revision and sim.run.claim is None:
                self._take_further(sim)
        except Crash:
            self.die()
        self.job = None

    def die(self) -> None:
        """The worker is gone, with all that it had in its memory, and the sweep finds that out."""
        assert self.job is not None
        self.crashes += 1
        for body in [*self.held, *(body for _, body in self.bodies.values())]:
            body.close()
        self.held.clear()
        self.bodies.clear()
        self.journals.clear()
        sim = self.runs[self.job.run_id]
        sim.busy = False
        self._take_over(sim, self.job)
        self.recover()

    def _deliver(self, sim: Sim) -> None:
        if any(message.fresh for message in sim.inbox):
            self._take_further(sim)

    def _take_further(self, sim: Sim) -> None:
        view: View | None = self.lock(sim)
        while view is not None:
            match self.plan(view):
                case Transition() as transition:
                    return self._commit(sim, transition, view)
                case Call(claims_first=False) as call:
                    view = self._execute(sim, view, call)
                case Call() | Fanout() as work:
                    return self._own(sim, view, work)
                case None:
                    return self._release(sim, view)

    def lock(self, sim: Sim) -> View:
        """The run, and its body: the one that was kept for this revision, else a new one."""
        view = sim.view
        if view.workflow is None or view.workflow.body is None:
            return replace(view, journal=self._carried(sim))
        revision, body = self.bodies.pop(sim.id, (None, None))
        if body is None or revision != sim.run.revision:
            if body is not None:
                body.close()
            body = new_body(view.workflow, view.run, view.registry)
        self.held.append(body)
        return replace(view, body=body)

    def _carried(self, sim: Sim) -> Journal:
        """The journal as this worker knows it since its last step, else as it is loaded."""
        revision, journal = self.journals.pop(sim.id, (None, Journal()))
        if revision != sim.run.revision:
            return Journal(sim.journal)
        assert list(journal.items()) == list(sim.journal.items()), "a carried journal is what was written"
        return journal

    def _in_place_of(self, view: View) -> Body | None:
        """Another body, not driven yet."""
        if view.body is None:
            return None
        assert view.workflow is not None
        fresh = new_body(view.workflow, view.run, view.registry)
        fresh.deferred |= view.body.deferred
        self._let_go(self.runs[view.run.id], view.body, keep=False)
        self.held.append(fresh)
        return fresh

    def _let_go(self, sim: Sim, body: Body | None, *, keep: bool) -> None:
        if body is None:
            return
        self.held.remove(body)
        if keep and self.keeps and not body.stale:
            self.bodies[sim.id] = sim.run.revision, body
        else:
            body.close()

    def _release(self, sim: Sim, view: View) -> None:
        """There was nothing to do."""
        sim.inbox = [replace(message, fresh=False) for message in sim.inbox]
        self._let_go(sim, view.body, keep=view.body is not None and not view.body.deferred)

    def plan(self, view: View, running: frozenset[str] = frozenset()) -> Decision:
        """What is to be done; the same question has the same answer, also by a body that is new."""
        decided = plan(view, self.now, self.limits, running)
        if view.body is None:
            assert self._replayed(view, running) == decided
        elif self.doubts and not view.body.deferred:
            assert _told(self._replayed(view, running)) == _told(decided), "a replay decides the same"
        return decided

    def _replayed(self, view: View, running: frozenset[str] = frozenset()) -> Decision:
        """What is decided by a body that is new."""
        if view.workflow is None or view.workflow.body is None:
            return plan(replace(view, journal=dict(view.journal)), self.now, self.limits, running)
        fresh = new_body(view.workflow, view.run, view.registry)
        decided = plan(replace(view, body=fresh), self.now, self.limits, running)
        fresh.close()
        return decided

    def _commit(self, sim: Sim, transition: Transition, view: View) -> None:
        self._point()
        sim.apply(transition, view)
        for effect in self.effects:
            effect()
        self.effects.clear()
        ends = transition.forget or transition.after.status.ended or transition.after.ending is not None
        if view.body is not None:
            view.body.written(transition.entries, transition.prune)
        elif isinstance(view.journal, Journal):
            written = [sim.journal[entry.step_id] for entry in transition.entries]
            after = view.journal.after(written, {*transition.forget, *transition.prune})
            self.journals[sim.id] = sim.run.revision, after
        self._let_go(sim, view.body, keep=not ends)
        self._point()

    def _execute(self, sim: Sim, view: View, call: Call) -> View | None:
        """Under the lock. With an ephemeral step the lock goes on, and its entry is not written yet."""
        started = self.now
        with self._locked(sim):
            outcome = self.call(call, view)
            self._point()
            ended = Ended(call, outcome, started, self.now)
            if (deferred := defer(view, ended)) is not None:
                return deferred
            transition = settle(view, ended, self.limits)
            if transition.ends and (inbox := tuple(sim.inbox)) != view.inbox:  # what was decided without it is void
                view = replace(view, inbox=inbox, body=self._in_place_of(view))
                transition = settle(view, ended, self.limits)
            self._commit(sim, transition, view)
            return None

    @contextmanager
    def _locked(self, sim: Sim) -> Iterator[None]:
        sim.busy = True
        try:
            yield
        finally:
            sim.busy = False

    def _own(self, sim: Sim, view: View, work: Call | Fanout) -> None:
        """A claim, and all that happens under it."""
        claim = Claim(1, uuid.uuid5(sim.id, str(sim.run.revision)))
        self._commit(sim, claimed(view, self.now, claim, work.calls), view)
        flights = {call.step_id: (call, sim.view, self.now) for call in work.calls}
        while sim.run.claim == claim:
            view = self.lock(sim)
            match self.plan(view, frozenset(flights)):
                case Transition() as transition:
                    self._commit(sim, transition, view)
                case Call() if not flights:  # what was side by side has ended: it goes on as any other run
                    self._commit(sim, go_on(view, self.now), view)
                case Call() | Fanout() as more:
                    self._commit(sim, claimed(view, self.now, claim, more.calls), view)
                    flights |= {call.step_id: (call, sim.view, self.now) for call in more.calls}
                case None:
                    assert flights, "an owner with nothing to do lets go"
                    self._release(sim, view)
                    step_id = list(flights)[self.order(list(flights))]
                    self._land(sim, claim, *flights[step_id])
                    del flights[step_id]

    def _land(self, sim: Sim, claim: Claim, call: Call, view: View, started: datetime) -> None:
        lost = call.step_id not in sim.run.frame  # its branch lost a race
        canceled = lost or (sim.run.ending is not None and sim.status is not Status.COMPENSATING)
        outcome: Outcome = Interrupted("cancel") if canceled and self.interrupts else self.call(call, view)
        self._point()
        if sim.run.claim != claim or lost:
            self.effects.clear()
            return  # discarded
        view = self.lock(sim)
        self._commit(sim, settle(view, Ended(call, outcome, started, self.now), self.limits), view)

    def _take_over(self, sim: Sim, job: Job) -> None:
        """What the sweep makes of the death of the worker that had `job`."""
        run = sim.run
        if run.claim is None and self._has_job(run) and job.revision != run.revision:
            return  # it had enqueued what follows
        view = sim.view
        transition = died(view, self.now, self.limits)
        if transition is not None:
            sim.apply(transition, view)

    def hand_back(self, sim: Sim) -> None:
        """The owner ends in order, between two steps."""
        sim.apply(go_on(sim.view, self.now), sim.view)

    # -- user code

    def call(self, call: Call, view: View) -> Outcome:
        """Run one attempt."""
        self.effects.clear()
        self._point()
        ctx: StepContext[Any] = StepContext(
            call, view, lending=cast(Any, _Lending()), cancelled=threading.Event(), app=_App(self)
        )
        limits = [call.work.timeout] if call.work.timeout is not None else []
        if call.deadline is not None:
            limits.append(max(0.0, (call.deadline - self.now).total_seconds()))
        limit, began = min(limits, default=None), self.now
        if limit == 0:
            return self._timed_out(call, limit)
        outcome = _play(call, ctx)
        if limit is not None and self.now - began > timedelta(seconds=limit):
            return self._timed_out(call, limit)
        return outcome

    def _timed_out(self, call: Call, limit: float) -> Outcome:
        return failed_attempt(call, StepTimeout(call.step_id, timeout=limit, attempts=call.attempt), kind="timeout")

    def _point(self) -> None:
        self.points += 1
        if self.at_point is not None:
            self.at_point()
        if self.dies or self.points in self.crash_at:
            self.dies = False
            raise Crash

    # -- what must hold

    def check_rest(self) -> None:
        """No job is left: no run has anything to do, and none is due for ever."""
        for sim in self.runs.values():
            assert sim.run.claim is None
            assert sim.status is not Status.PENDING or sim.run.waiting_for is WaitingFor.START
            assert sim.status is not Status.RUNNING
            if sim.status.ended and not any(message.kind is MessageKind.ROLLBACK for message in sim.inbox):
                continue  # what crossed its end is not for it any more
            decided = self._replayed(sim.view)
            assert decided is None, f"a wake-up was lost: {sim.run.workflow} {sim.status} {sim.waits()} -> {decided}"
            due = sim.run.wake_at is not None and sim.run.wake_at <= self.now
            assert not due or sim.status is Status.PAUSED, f"due for ever: {sim.waits()}"

    def check_invariants(self, sim: Sim) -> None:
        run, journal = sim.run, sim.journal.values()
        function = sim.view.workflow is not None and sim.view.workflow.body is not None
        top = [e for e in journal if e.parent is None and e.kind.value in _TOP_LEVEL and e.status == "completed"]
        undoes = run.status in (Status.COMPENSATING, Status.FAILED, Status.CANCELED)
        late = 1 if undoes else 0  # a child that ended when its end was not wanted any more
        passed = function or run.current_step <= len(top) <= run.current_step + late
        assert passed, "the cursor counts the nodes that were passed"
        if run.status.ended:
            assert not run.frame, "terminal: nothing pending"
            assert run.claim is None
            assert not run.pausing
        for undone in _rollbacks(sim):
            seqs = [sim.journal[key].seq for key in undone]
            assert seqs == sorted(seqs, reverse=True), "undone in reverse order"
        if run.status is Status.SUSPENDED:
            awaits = run.waiting_for not in (WaitingFor.RETRY, WaitingFor.SLEEP, WaitingFor.START)
            assert run.wake_at is not None or awaits, "it waits for a time, or for a message or a person"


def _play(call: Call, ctx: StepContext[Any]) -> Outcome:
    """The engine's script of what is called in which order, played in this thread."""
    script = _iteration(call, ctx) if call.purpose is Purpose.ITERATION else _single(call, ctx)
    try:
        ask = next(script)
        while True:
            answer = ask.fn(*ask.args)
            ask = script.send(_awaited(answer) if inspect.iscoroutine(answer) else answer)
    except StopIteration as done:
        return cast(Outcome, done.value)
    except Crash:
        raise
    except BaseException as error:
        return failed_attempt(call, error)


def _awaited(coroutine: Any) -> Any:
    """What an async handler returns; it awaits nothing but what is there at once."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


class _Lending:
    async def async_connection(self) -> None:
        """The run's own transaction: what is done by it is in `World.effects`."""


class _App:
    """What ``ctx.start`` and ``ctx.send`` ask of the app: done with the step's own entry, or not at all."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(self, workflow: str, given: Any, *, version: str | None, id: uuid.UUID, **_: None) -> Any:  # noqa: A002
        world = self._world
        definition = world.registry.require(workflow, version)
        text = definition.input.dump(given)
        run = Run(id, workflow, definition.version, Status.PENDING, 0, 0, text, "default", world.now)
        assert id not in world.runs, "it is started once"
        world.effects.append(lambda: world._insert(run))
        return SimpleNamespace(id=id)

    async def signal(self, run_id: Any, name: str, payload: Any, *, id: str, connection: None) -> bool:  # noqa: A002
        world, to = self._world, uuid.UUID(str(run_id))
        world.effects.append(lambda: world.send(to, MessageKind.SIGNAL, name, ANY.dump(payload), id))
        return not world.runs[to].status.ended


def _rollbacks(sim: Sim) -> list[list[str]]:
    """What each rollback of a run has undone, in that order."""
    found: list[list[str]] = [[]]
    for entry in sorted(sim.journal.values(), key=lambda entry: entry.seq):
        if entry.kind.value == "rollback":
            found.append([])
        elif entry.kind.value == "undo":
            found[-1].append(entry.step_id.removeprefix("undo:"))
    return found


def _told(decided: Decision) -> Any:
    """A decision as what can be compared: functions and tracebacks of two bodies are not the same."""
    match decided:
        case Transition():
            entries = [replace(e, error=_without_traceback(e.error)) for e in decided.entries]
            attempts = [replace(a, error=_without_traceback(a.error)) for a in decided.attempts]
            after = replace(decided.after, error=_without_traceback(decided.after.error))
            if after.ending is not None:
                after = replace(after, ending=replace(after.ending, error=_without_traceback(after.ending.error)))
            outgoing = [replace(m, body=None) for m in decided.outgoing]
            return replace(
                decided, after=after, entries=tuple(entries), attempts=tuple(attempts), outgoing=tuple(outgoing)
            )
        case Call() | Fanout():
            return [replace(call, work=cast(Any, None)) for call in decided.calls]
        case None:
            return None


def _without_traceback(failure: Failure | None) -> Failure | None:
    return None if failure is None else replace(failure, traceback=None)


def _holds(fact: bool, what: str) -> None:
    if not fact:
        raise Refused(what)


def once(*outcomes: Any) -> Callable[[Any], Any]:
    """A handler that answers these one by one (the last again and again); exceptions are raised. `calls` counts."""
    state: dict[str, int] = {"calls": 0}

    def handler(ctx: Any) -> Any:
        outcome = outcomes[min(state["calls"], len(outcomes) - 1)]
        state["calls"] += 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome(ctx) if callable(outcome) else outcome

    handler.state = state  # type: ignore[attr-defined]
    return handler


def calls(handler: Any) -> int:
    """How often a handler of `once` was called."""
    return cast(Mapping[str, int], handler.state)["calls"]
