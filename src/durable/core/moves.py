"""How transitions are made: every one of them here, so that what must hold of all holds in one place.

A transition raises the revision by one. A run that ends lets go of claim, frame and waits. A run that stays runnable
and unclaimed has a continuation enqueued with the same write; one that parks, ends or is claimed has none, but for what
has been asked of it and not been done yet, whose doorbell has rung already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from durable.core.state import REQUESTS, Begun, Entry, EntryKind, MessageKind, Run, View
from durable.core.transition import ChildStart, Event, FailedAttempt, Next, Outgoing, Successor, Transition
from durable.values import ENDED, JsonText, Status, WaitingFor

if TYPE_CHECKING:
    from durable.core.functions.body import Body

NOT_BEGUN = Begun()


def move(
    view: View,
    now: datetime,
    status: Status,
    *,
    entries: tuple[Entry, ...] = (),
    attempts: tuple[FailedAttempt, ...] = (),
    events: tuple[Event, ...] = (),
    taken: Mapping[int, str | None] | None = None,
    outgoing: tuple[Outgoing, ...] = (),
    children: tuple[ChildStart, ...] = (),
    replies: Mapping[int, JsonText] | None = None,
    successor: Successor | None = None,
    prune: tuple[str, ...] = (),
    forget: tuple[str, ...] = (),
    wake: bool = False,
    **fields: Any,
) -> Transition:
    """The transition to `status`: what to write beside the run row, and the `fields` of that which change.

    `wake`: although the run is parked, its wait is to be looked at anew. It is due now, beside its continuation: should
    that get lost, the timers put it back.
    """
    before = view.run
    if view.body is not None:
        entries, prune = _with_body(before, view.body, entries, prune, fields)
    run: dict[str, Any] = {**_UNPARKED, **fields, "status": status, "revision": before.revision + 1}
    if status in _HEALTHY and not before.pausing:
        run.setdefault("error", None)
    if successor is not None:
        run["successor"] = successor.id
    if status in ENDED:
        run |= {**_UNPARKED, "finished_at": now, "frame": {}, "claim": None, "pausing": False}
    if before.started_at is None and status not in _NOT_STARTED:
        run["started_at"] = now
    after = before.changed(**run)
    wake = wake or (status is Status.SUSPENDED and (after.pausing or (after.ending is not None and not after.cleanup)))
    if wake and _may_wake(after):
        after = after.changed(wake_at=now)
    asked = bool(view.inbox) and _asks_more(view, after, taken or {})
    next_ = _next(after, wake=wake, asked=asked)
    return Transition(
        before, after, entries, attempts, events, taken, outgoing, children, replies, successor, prune, next_, forget
    )


def _with_body(
    run: Run, body: Body, entries: tuple[Entry, ...], prune: tuple[str, ...], fields: dict[str, Any]
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """What is written, and pruned, of a function run beside what was decided: entries that were deferred, or follow
    from others. What that makes of the run's own `fields` is added to them."""
    unwritten = body.unwritten
    gone = {*prune, *body.pruning}
    entries = (*body.deferred.values(), *entries, *unwritten.values())
    if gone:  # over before they were written
        entries = tuple(entry for entry in entries if entry.step_id not in gone)
        prune = tuple(sorted(gone))
    if len(entries) > 1:  # the run's own comes last
        entries = tuple(sorted(entries, key=lambda entry: entry.kind is EntryKind.RESULT))
    frame = fields.get("frame", run.frame)
    if frame and (ended := unwritten.keys() & frame.keys()):  # blocks that were retried, and are over
        fields["frame"] = {step_id: begun for step_id, begun in frame.items() if step_id not in ended}
    if passed := sum(map(_is_passed, entries)):
        fields["current_step"] = run.current_step + passed
    if run.started_at is None and body.workflow.cleans_up:
        fields["cleanup"] = True
    return entries, prune


def _is_passed(entry: Entry) -> bool:
    """Whether the cursor counts it."""
    return entry.parent is None and entry.status == "completed" and entry.kind in OPERATIONS


def park(
    view: View,
    now: datetime,
    waiting_for: WaitingFor,
    *,
    name: str | None = None,
    wake_at: datetime | None = None,
    mind_deadline: bool = True,
    **write: Any,
) -> Transition | None:
    """Leave the run waiting, with no job, no process, no connection; None if it waits for just that already.

    It is woken at `wake_at`, at its deadline, when its time to clean up is over, or by a message, whichever is first.
    Where the deadline could not act, `mind_deadline` is False: or the run would be due for ever. A pause or cancel that
    was asked for acts at once.
    """
    run = view.run
    status = Status.COMPENSATING if run.status is Status.COMPENSATING else Status.SUSPENDED
    minded = status is Status.SUSPENDED and mind_deadline
    clean_up = run.ending.until if run.ending is not None else None
    limits = [time for time in (wake_at, *((run.deadline, clean_up) if minded else ())) if time is not None]
    write = {
        "claim": None,
        "waiting_for": waiting_for,
        "waiting_name": name,
        "wake_at": min(limits, default=None),
    } | write
    after = run.changed(status=status, **{k: v for k, v in write.items() if k not in _BESIDE and k != "wake"})
    if after == run and not _BESIDE & write.keys():
        return None
    return move(view, now, status, **write)


def with_step(run: Run, step_id: str, begun: Begun) -> Mapping[str, Begun]:
    """The run's frame with what is now known of `step_id`."""
    return {**run.frame, step_id: begun}


def without(run: Run, *step_ids: str) -> Mapping[str, Begun]:
    """The run's frame without steps that have finished."""
    frame = run.frame  # most steps have never been in it
    return {step_id: begun for step_id, begun in frame.items() if step_id not in step_ids} if frame else frame


def _next(after: Run, *, wake: bool, asked: bool) -> Next | None:
    if after.claim is not None:
        return None
    rests = after.status in ENDED or after.status is Status.PAUSED or after.waiting_for is not None
    if rests and not asked and not (wake and _may_wake(after)):
        return None
    return Next.of(after.status)


def _may_wake(after: Run) -> bool:
    parked = after.waiting_for is not None and after.waiting_for is not WaitingFor.START  # a start has its time only
    return parked and after.status is not Status.PAUSED and after.claim is None


def _asks_more(view: View, after: Run, taken: Collection[int]) -> bool:
    """Whether the inbox holds a request, beside those taken now, that may still act on the run."""
    act = frozenset({MessageKind.ROLLBACK}) if after.status is Status.COMPLETED else REQUESTS
    may_act = not after.status.ended or after.status is Status.COMPLETED
    return may_act and any(m.kind in act and m.seq not in taken for m in view.inbox)


_UNPARKED: Final[Mapping[str, Any]] = {"waiting_for": None, "waiting_name": None, "wake_at": None}
_BESIDE = frozenset(Transition.__dataclass_fields__) - {"before", "after", "next"}
OPERATIONS: Final = frozenset(EntryKind) - {
    EntryKind.BRANCH, EntryKind.ITERATION, EntryKind.CHOICE, EntryKind.UNDO, EntryKind.RESULT, EntryKind.PATCH,
    EntryKind.ROLLBACK,
}  # fmt: skip
"""What the cursor counts, at the top level."""
_HEALTHY = frozenset({Status.RUNNING, Status.SUSPENDED, Status.COMPLETED})
_NOT_STARTED = frozenset({Status.PENDING, Status.PAUSED, Status.CANCELED})
