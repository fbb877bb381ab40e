"""What a function run does next: its body is driven to where the journal ends, and what it waits for there is begun,
called, or ended. The counterpart of ``core/graph.py``; both give the same decisions.

Whatever needs no user code (a sleep that is over, a message that is there, a child that has ended) is done at once, and
the body driven on, until only calls and waits are left: one transition holds it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from durable.core import progress
from durable.core.attempt import Waits, attempt
from durable.core.charge import charge
from durable.core.control import parting
from durable.core.finish import complete, fail
from durable.core.functions import cancel, ending
from durable.core.functions.answers import Raised, Returned
from durable.core.functions.blocks import BlockCommand
from durable.core.functions.body import SUSPECT, Frontier
from durable.core.functions.commands import (
    CheckpointCommand,
    ChildCommand,
    Operation,
    ReceiveCommand,
    ReplyCommand,
    SignalCommand,
    SleepCommand,
    StepCommand,
)
from durable.core.functions.errors import failed_entries, led_to
from durable.core.functions.errors import failure as failure_of
from durable.core.functions.maps import MapCommand
from durable.core.functions.new import new_body
from durable.core.give_up import entry_of
from durable.core.moves import move, park, with_step, without
from durable.core.progress import Progress
from durable.core.state import Begun, Entry, EntryKind, Failure, MessageKind, View
from durable.core.transition import (
    Call,
    ChildStart,
    Decision,
    Event,
    FailedAttempt,
    Fanout,
    Limits,
    Outgoing,
    Purpose,
    Transition,
)
from durable.errors import PayloadError
from durable.values import Status, WaitingFor

NOT_BESIDE: Final = timedelta(seconds=1)
"""How long a body waits that may be a killer, while another suspect is watched."""
ROUNDS: Final = 200
"""How often a body is driven on within one transition."""


def with_body(view: View) -> View:
    """`view` with a body: a new one, unless it has one."""
    if view.body is not None:
        return view
    assert view.workflow is not None
    return replace(view, body=new_body(view.workflow, view.run, view.registry))


def forward(view: View, now: datetime, limits: Limits, running: frozenset[str], *, canceling: bool = False) -> Decision:
    """What the run does next."""
    view = with_body(view)
    assert view.body is not None
    ready, view.body.ready = view.body.ready, None
    if ready is not None and ready[0] == view.run.revision and not view.inbox and not canceling:
        return ready[1]
    suspect = view.run.frame.get(SUSPECT)
    if suspect is None:
        return Planning(view, now, limits, running, canceling=canceling).decide()
    if suspect.crashes >= limits.max_crashes:
        return fail(view, now, _killer(view, suspect), frame=without(view.run, SUSPECT))
    if suspect.due is not None and suspect.due > now:
        return park(view, now, WaitingFor.RETRY, name=SUSPECT, wake_at=suspect.due)
    if limits.watching:
        later = replace(suspect, due=now + NOT_BESIDE, waits=WaitingFor.RETRY)
        return park(
            view, now, WaitingFor.RETRY, name=SUSPECT, wake_at=later.due, frame=with_step(view.run, SUSPECT, later)
        )
    return _cleared(view, now, limits, running, canceling=canceling)


def _cleared(view: View, now: datetime, limits: Limits, running: frozenset[str], *, canceling: bool) -> Decision:
    """The body came through: it is not what killed the worker. The step that it is at may be."""
    free = view.ahead(view.run.changed(frame=without(view.run, SUSPECT)))
    decided = Planning(free, now, limits, running, canceling=canceling).decide()
    if isinstance(decided, Call) and not decided.claims_first:
        decided = charge(free, now, limits, [decided.step_id])
    elif not isinstance(decided, Transition):
        decided = move(free, now, Status.RUNNING)
    return decided.of_row(view.run)


def _killer(view: View, suspect: Begun) -> Failure:
    message = (
        f"workflow {view.run.workflow!r}: the worker died {suspect.crashes} times while the body itself ran, between "
        "two operations: move what it does there into a step"
    )
    return Failure("durable.errors.StepInterrupted", message, "interrupted", None, suspect.crashes)


class Planning:
    """One decision in the making: the view as it becomes, and what is to be written for that."""

    def __init__(self, view: View, now: datetime, limits: Limits, running: frozenset[str], *, canceling: bool) -> None:
        assert view.body is not None
        self._view, self._body, self._before = view, view.body, view.run
        self._now, self._limits, self._running, self._canceling = now, limits, running, canceling
        self._entries: list[Entry] = []
        self._attempts: list[FailedAttempt] = []
        self._events: list[Event] = []
        self._taken: dict[int, str | None] = {}
        self._replies: dict[int, str] = {}
        self._children: list[ChildStart] = []
        self._outgoing: list[Outgoing] = []
        self._prune: list[str] = []
        self._forget: list[str] = []
        self._calls: list[Call] = []
        self._waits: list[tuple[str, Begun]] = []
        self._unknown: str | None = None  # the definition of a child
        self._changed = False
        self._full = False
        self._again = False  # a block is taken up anew: the body must be replayed

    def decide(self) -> Decision:
        frontier = self._drive()
        if frontier.diverged is not None:
            return self._diverged(frontier.diverged)
        if self._body.wants_start and self._before.started_at is None:
            return move(self._as_before(), self._now, Status.RUNNING)
        if frontier.ended is not None:
            return self._ended(frontier.ended)
        if self._calls:
            return self._call()
        if self._changed or self._body.overfull:
            full = self._full or self._body.overfull  # enough for one transition
            return self._go_on() if self._running or full or self._again else self._park()
        return None if self._running else self._park()

    # ---------------------------------------------------------------- driving

    def _drive(self) -> Frontier:
        """Drive the body on until nothing moves but by calls and by time."""
        rounds = 0
        while True:
            self._calls, self._waits, self._unknown = [], [], None
            frontier = self._body.drive(self._view, self._now, canceling=self._canceling)
            self._end_lost()
            if frontier.ended is not None or frontier.diverged is not None or self._body.overfull:
                return frontier
            rounds += 1
            self._full = rounds > ROUNDS
            if self._full:
                return frontier
            leaves = frontier.leaves if len(frontier.leaves) < 2 else sorted(frontier.leaves, key=self._since)
            moved = [self._look_at(leaf) for leaf in leaves]
            if not any(moved) or self._again:
                return frontier

    def _since(self, leaf: Operation[Any]) -> datetime:
        """The wait that began first gets the message."""
        frame = self._view.run.frame
        keys = [leaf.item(place) for place in leaf.started] if isinstance(leaf, MapCommand) else [leaf.key]
        times = [frame[key].since for key in keys if key in frame]
        return min((time for time in times if time is not None), default=self._now)

    def _look_at(self, leaf: Operation[Any]) -> bool:
        """What can be made of an operation now. Whether there is an answer to it."""
        match leaf:
            case StepCommand():
                return self._step(leaf)
            case SleepCommand():
                begun = self._begun(leaf) or progress.begin_sleep(leaf.until, self._now)
                return self._carry(leaf, progress.sleep(leaf.key, begun, self._now))
            case SignalCommand():
                begun = self._begun(leaf) or progress.begin_wait(self._now, leaf.timeout, name=leaf.signal)
                came = progress.wait(
                    leaf.key, begun, self._now, self._inbox(), leaf.payload, leaf.timeout, leaf.on_timeout
                )
                return self._carry(leaf, came)
            case ReceiveCommand():
                begun = self._begun(leaf) or progress.begin_wait(self._now, leaf.timeout, names=leaf.names)
                came = progress.receive(
                    leaf.key, begun, self._now, self._inbox(), leaf.payload, leaf.limit, completable=leaf.completable
                )
                if leaf.completable and came.entry is not None:  # another branch must not get it meanwhile
                    self._body.reserved.update((came.entry.extra or {}).get("messages", ()))
                return self._carry(leaf, came)
            case ReplyCommand():
                self._replies[leaf.message] = leaf.reply
                return self._at_once(leaf, leaf.reply, {"message": leaf.message})
            case CheckpointCommand():
                return self._at_once(leaf, "null")
            case ChildCommand():
                return self._child(leaf, leaf.key, leaf.given)
            case MapCommand():
                return self._map(leaf)
            case BlockCommand():
                return self._retry_block(leaf)
            case _:
                raise AssertionError(f"{leaf!r} has an answer or parts of its own")

    def _begun(self, leaf: Operation[Any]) -> Begun | None:
        return self._view.run.frame.get(leaf.key)

    def _inbox(self) -> list[Any]:
        gone = self._taken.keys() | self._replies.keys() | self._body.reserved
        return [message for message in self._view.inbox if message.seq not in gone]

    # ---------------------------------------------------------------- operations

    def _step(self, leaf: StepCommand[Any]) -> bool:
        key = leaf.key
        if key in self._running:
            return False
        extra = {"undo": True} if leaf.work.compensate is not None else None
        call = Call(
            key, Purpose.STEP, leaf.work, kind=EntryKind.STEP, parent=leaf.parent, extra=extra, ephemeral=leaf.ephemeral
        )
        match attempt(self._view, self._now, self._limits, call):
            case Call() as ready:
                asked = self._before.ending
                if asked is not None and self._canceling:
                    ready = replace(ready, deadline=asked.until)
                self._calls.append(ready)
            case Transition() as taken_up:
                self._taken |= taken_up.taken or {}
                self._frame(taken_up.after.frame)
                return self._step(leaf)
            case Waits(begun):
                self._waits.append((key, begun))
            case Failure() as failure:
                self._end(entry_of(self._view, call, self._now, "failed", error=failure))
                return True
        return False

    def _child(self, leaf: Operation[Any], key: str, given: Any) -> bool:
        assert isinstance(leaf, ChildCommand | MapCommand)
        begun = self._view.run.frame.get(key)
        if begun is None:
            return self._start_child(leaf, key, given)
        about = dict(zip(("workflow", "version"), (begun.name or "").rsplit("@", 1), strict=False))
        told = progress.answer(replace(self._view, inbox=tuple(self._inbox())), key, begun.child)
        came = progress.child(self._view, key, begun, self._now, told, tuple(about.items()))
        if begun.undo and came.entry is not None:
            came = replace(came, entry=replace(came.entry, extra={**(came.entry.extra or {}), "undo": True}))
        return self._carry(leaf, came, key)

    def _start_child(self, leaf: ChildCommand[Any] | MapCommand[Any], key: str, given: Any) -> bool:
        name, version = leaf.workflow, leaf.version
        registry = self._view.registry
        workflow = registry.find(name, version) if version else registry.latest(name)
        if workflow is None:
            self._unknown = f"{name}@{version or ''}"
            return False
        try:
            text = workflow.input.dump(given)
        except PayloadError as error:
            failure = progress.child_refused(key, name, error)
            self._end(Entry(key, EntryKind.CHILD, "failed", error=failure, finished_at=self._now), leaf, key)
            return True
        came = progress.begin_child(self._view, key, workflow, text, self._now)
        assert came.begun is not None
        undo = isinstance(leaf, ChildCommand) and leaf.compensate
        about = replace(came.begun, name=f"{workflow.name}@{workflow.version}", undo=undo)
        return self._carry(leaf, replace(came, begun=about), key)

    def _map(self, leaf: MapCommand[Any]) -> bool:
        moved = False
        for place in [*leaf.started, *leaf.startable]:
            moved = self._child(leaf, leaf.item(place), leaf.items[place]) or moved
        return moved

    def _at_once(self, leaf: Operation[Any], result: str, extra: Mapping[str, Any] | None = None) -> bool:
        now = self._now
        self._end(Entry(leaf.key, leaf.kind, "completed", result, started_at=now, finished_at=now, extra=extra), leaf)
        return True

    def _retry_block(self, leaf: BlockCommand[Any]) -> bool:
        """A block that failed is taken up anew: what it failed by is forgotten, and the body is replayed."""
        begun = self._view.run.frame.get(leaf.key)
        if leaf.failed is None:
            assert begun is not None
            self._waits.append((leaf.key, begun))
            return False
        retry, number = leaf.retry, leaf.attempt
        assert retry is not None
        custom = retry.custom_delay(number)
        due = self._now + timedelta(seconds=retry.delay(number, self._limits.chance) if custom is None else custom)
        began = begun.since if begun is not None else None
        failure = replace(failure_of(leaf.failed), step=leaf.key)
        self._attempts.append(FailedAttempt(leaf.key, number, "failed", failure, began, self._now, due))
        causes = failed_entries(leaf.failed)
        known = {**self._body.unwritten, **self._view.journal}
        newest = max((entry.seq for entry in self._view.journal.values()), default=0)
        since = newest
        for key, entry in known.items():
            if key.startswith(f"{leaf.key}/") and entry.status == "failed" and led_to(key, causes):
                since = min(since, entry.seq or newest)
                self._forget_failed(entry)
        if since < newest or self._body.deferred:
            self._entries.append(parting(f"{leaf.key}:{newest}", since, self._now))
        self._body.stale = self._again = True
        again = Begun(attempts=number, since=began or self._now, due=due, waits=WaitingFor.RETRY)
        outside = {k: b for k, b in self._view.run.frame.items() if not k.startswith(f"{leaf.key}/")}
        self._frame({**outside, leaf.key: again})
        return False

    def _forget_failed(self, entry: Entry) -> None:
        """From the journal it moves to the failed attempts; or goes there at once, if it was not written yet."""
        if entry.seq:
            self._forget.append(entry.step_id)
            return
        self._body.unwritten.pop(entry.step_id, None)
        self._entries = [e for e in self._entries if e.step_id != entry.step_id]
        if self._body.deferred.pop(entry.step_id, None) is not None and entry.finished_at is not None:
            began, ended = entry.started_at, entry.finished_at
            self._attempts.append(FailedAttempt(entry.step_id, entry.attempt, "failed", entry.error, began, ended))

    def _carry(self, leaf: Operation[Any], came: Progress, key: str | None = None) -> bool:
        key = leaf.key if key is None else key
        if came.entry is not None:
            self._taken |= dict.fromkeys(came.taken, key)
            self._end(came.entry, leaf, key)
            return True
        begun = came.begun
        assert begun is not None
        if came.child is not None:
            self._children.append(came.child)
        if self._view.run.frame.get(key) != begun:
            self._frame({**self._view.run.frame, key: begun})
        self._waits.append((key, begun))
        return False

    def _end(self, entry: Entry, leaf: Operation[Any] | None = None, key: str | None = None) -> None:
        """An operation has ended: its entry is to be written, and the body may be driven on with it."""
        if leaf is not None:
            entry = replace(entry, parent=leaf.parent if key is None or key == leaf.key else leaf.key)
        self._entries.append(entry)
        run = self._view.run.changed(frame=without(self._view.run, entry.step_id))
        self._view = self._view.ahead(run, {**self._view.journal, entry.step_id: entry})
        self._changed = True

    def _frame(self, frame: Mapping[str, Begun]) -> None:
        self._view = self._view.ahead(self._view.run.changed(frame=frame))
        self._changed = True

    def _end_lost(self) -> None:
        """Of branches that lost a race nothing is left: their handlers are ended, their children canceled, their
        entries deleted, unless something in them is to be undone."""
        for path in self._body.lost:
            under = (f"{path}/", f"{path}[")
            for key, begun in [(k, b) for k, b in self._view.run.frame.items() if k == path or k.startswith(under)]:
                if begun.child is not None:
                    self._outgoing.append(ending.cancel_message(begun.child, "another branch was faster"))
                if begun.running:
                    self._events.append(Event("branch_discarded", key))
                self._frame(without(self._view.run, key))
            entries = {k: e for k, e in self._view.journal.items() if k == path or k.startswith(under)}
            if not any((entry.extra or {}).get("undo") for entry in entries.values()) and not self._is_map(path):
                self._prune += entries
        self._body.lost.clear()

    def _is_map(self, path: str) -> bool:
        entry = self._view.journal.get(path) or self._body.unwritten.get(path)
        return entry is not None and entry.kind is EntryKind.MAP

    # ---------------------------------------------------------------- decisions

    def _call(self) -> Decision:
        if self._changed:
            return self._go_on()
        if len(self._calls) == 1 and not self._running and not self._waits and self._unknown is None:
            return self._calls[0]
        return Fanout(tuple(replace(call, shares=True) for call in self._calls))

    def _go_on(self) -> Transition:
        """Write what has happened; there is more to do."""
        status = Status.RUNNING if self._before.claim is None else self._before.status
        return self._made(move(self._view, self._now, status, waiting_for=None, **self._writes()))

    def _park(self) -> Transition | None:
        """Nothing can move: park until the first wait is over."""
        if self._unknown is not None and not any(begun.due for _, begun in self._waits):
            return self._parked(WaitingFor.DEFINITION, self._unknown, None)
        if not self._waits:
            raise AssertionError(f"run {self._before.id}: the body waits for nothing")
        timed = [(due, key, begun) for key, begun in self._waits if (due := begun.due or begun.deadline) is not None]
        wake_at = min((due for due, _, _ in timed), default=None)
        key, begun = next(((k, b) for due, k, b in timed if due == wake_at and b.due), self._waits[0])
        name = begun.name if begun.waits is not WaitingFor.CHILD else key
        return self._parked(begun.waits or WaitingFor.RETRY, name or ", ".join(begun.names or ()) or key, wake_at)

    def _parked(self, waiting_for: WaitingFor, name: str, wake_at: datetime | None) -> Transition | None:
        frame = self._view.run.frame
        if not self._changed:
            return park(self._view, self._now, waiting_for, name=name, wake_at=wake_at)
        parked = park(
            self._view.ahead(self._view.run.changed(waiting_for=None)),
            self._now,
            waiting_for,
            name=name,
            wake_at=wake_at,
            frame=frame,
            **self._writes(),
        )
        assert parked is not None
        return self._made(parked)

    def _ended(self, ended: Returned | Raised) -> Decision:
        if self._canceling:
            if self._running:
                return self._go_on() if self._changed else None
            return self._made(cancel.cleaned_up(self._view, self._now, **self._writes()))
        if isinstance(ended, Raised):
            if self._running:  # what is undone must not be executing
                return self._go_on() if self._changed else None
            return self._made(ending.failed(self._view, self._now, ended.error, **self._writes()))
        assert self._view.workflow is not None
        try:
            text = self._view.workflow.output.dump(ended.value)
        except PayloadError as error:
            where = error.at(f"the result of workflow {self._before.workflow!r}")
            return self._made(ending.failed(self._view, self._now, where, **self._writes()))
        entry = Entry("run:result", EntryKind.RESULT, "completed", text, finished_at=self._now)
        self._entries.append(entry)
        return self._made(complete(self._view, self._now, claim=None, **self._writes()))

    def _diverged(self, difference: Failure) -> Transition | None:
        """Journal and code disagree: the run is parked for a person, with nothing written of what was tried."""
        view = self._as_before()
        return park(view, self._now, WaitingFor.PERSON, name="HistoryDiverged", error=difference, mind_deadline=False)

    def _as_before(self) -> View:
        """The view that planning began with: nothing counts that the body derived, but the step that has just ended."""
        self._body.unwritten.clear()
        self._body.stale = True
        return self._view.ahead(self._before)

    def _writes(self) -> dict[str, Any]:
        gathered: dict[str, Sequence[Any] | Mapping[int, Any]] = {
            "entries": tuple(self._entries),
            "attempts": tuple(self._attempts),
            "events": tuple(self._events),
            "taken": self._taken,
            "replies": self._replies,
            "children": tuple(self._children),
            "outgoing": tuple(self._outgoing),
            "prune": tuple(self._prune),
            "forget": tuple(self._forget),
        }
        return {name: what for name, what in gathered.items() if what}

    def _made(self, transition: Transition) -> Transition:
        return transition.of_row(self._before)


def suspect(view: View, now: datetime, limits: Limits) -> Transition | None:
    """A worker died while it held this run's row: by its body, or by the step that the body is at. Which of them shows
    when the body is driven: not here, where it would kill again. None if nothing of it was executing."""
    run = view.run
    due = run.wake_at is not None and run.wake_at <= now
    heard = any(message.fresh for message in view.inbox if message.kind is not MessageKind.ROLLBACK)
    if run.waiting_for is not None and not due and not heard:
        return None
    if SUSPECT in run.frame:
        return charge(view, now, limits, [SUSPECT], "its worker died while the body ran")
    frame = {**run.frame, SUSPECT: Begun(crashes=1, since=now)}
    return move(view, now, Status.RUNNING, frame=frame)
