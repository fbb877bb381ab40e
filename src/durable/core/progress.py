"""What comes of a wait: it begins, goes on, or ends. The same for a builder's nodes and a body's operations.

Nothing here knows what a wait is part of: it is told its journal key, and answers a :class:`Progress`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from durable.core.state import Begun, Entry, EntryKind, Failure, Message, MessageKind, View
from durable.core.transition import ChildStart
from durable.define.nodes import RAISE, Workflow
from durable.define.payload import Schema
from durable.errors import PayloadError
from durable.values import JsonText, Status, WaitingFor, child_id


@dataclass(frozen=True, slots=True)
class Progress:
    """`entry`: it has ended; `begun`: it goes on like this. `taken`: the messages that it has taken; `child`: a run to
    be started."""

    entry: Entry | None = None
    begun: Begun | None = None
    taken: tuple[int, ...] = ()
    child: ChildStart | None = None


# ---------------------------------------------------------------- sleeps


def begin_sleep(until: float | timedelta | datetime, now: datetime) -> Begun:
    """Its end is fixed now."""
    if isinstance(until, (int, float)):
        until = timedelta(seconds=until)
    due = now + until if isinstance(until, timedelta) else until
    return Begun(since=now, due=due, waits=WaitingFor.SLEEP)


def sleep(key: str, begun: Begun, now: datetime) -> Progress:
    """Over once its end has come; one that lies in the past is over at once."""
    if begun.due is not None and begun.due > now:
        return Progress(begun=begun)
    return Progress(Entry(key, EntryKind.SLEEP, "completed", "null", started_at=begun.since, finished_at=now))


# ---------------------------------------------------------------- messages


def begin_wait(
    now: datetime, timeout: timedelta | None, *, name: str | None = None, names: tuple[str, ...] | None = None
) -> Begun:
    """From now on it waits; its deadline is fixed now."""
    deadline = now + timeout if timeout is not None else None
    return Begun(since=now, waits=WaitingFor.SIGNAL, name=name, names=names, deadline=deadline)


def wait(
    key: str,
    begun: Begun,
    now: datetime,
    inbox: Iterable[Message],
    payload: Schema,
    timeout: timedelta | None,
    on_timeout: Any,
) -> Progress:
    """A wait for one signal: by the oldest message of its name, else by its timeout. `on_timeout`: JSON text, or
    RAISE."""
    found = _deliverable(inbox, (begun.name,) if begun.name else (), begun.deadline)
    entry = Entry(
        key, EntryKind.SIGNAL, "completed", started_at=begun.since, finished_at=now, extra={"signal": begun.name}
    )
    if found:
        return _satisfied(entry, found[0], payload)
    if begun.deadline is None or begun.deadline > now:
        return Progress(begun=begun)
    entry = replace(entry, extra={"signal": begun.name, "timed_out": True})
    if on_timeout is not RAISE:
        return Progress(replace(entry, result=on_timeout))
    message = f"no signal {begun.name!r} came to {key!r} within {timeout}"
    return Progress(
        replace(entry, status="failed", error=Failure("durable.errors.SignalTimeout", message, "timeout", key))
    )


def _satisfied(entry: Entry, message: Message, payload: Schema) -> Progress:
    body = message.body or "null"
    try:
        payload.load(body)
    except PayloadError as error:
        text = f"signal {message.name!r} for {entry.step_id!r}: {error}"
        refused = Failure("durable.errors.PayloadError", text, "critical", entry.step_id)
        return Progress(replace(entry, status="failed", error=refused), taken=(message.seq,))
    return Progress(replace(entry, result=body), taken=(message.seq,))


def receive(
    key: str, begun: Begun, now: datetime, inbox: Iterable[Message], payload: Schema, limit: int, *, completable: bool
) -> Progress:
    """A wait for up to `limit` messages: those that are there, once there is one; none, at its timeout.

    What is to be completed is not taken, only noted: until then it stays in the inbox."""
    found = _deliverable(inbox, begun.names or (), begun.deadline)[:limit]
    timed_out = begun.deadline is not None and begun.deadline <= now
    if not found and not timed_out:
        return Progress(begun=begun)
    extra: dict[str, Any] = {"messages": [message.seq for message in found]}
    if begun.names:
        extra["names"] = list(begun.names)
    if not found:
        extra["timed_out"] = True
    entry = Entry(key, EntryKind.RECEIVE, "completed", started_at=begun.since, finished_at=now, extra=extra)
    taken = () if completable else tuple(message.seq for message in found)
    for message in found:
        try:
            payload.load(message.body or "null")
        except PayloadError as error:
            text = f"message {message.name!r} for {key!r}: {error}"
            refused = Failure("durable.errors.PayloadError", text, "critical", key)
            return Progress(replace(entry, status="failed", error=refused), taken=tuple(m.seq for m in found))
    return Progress(replace(entry, result="[" + ",".join(map(_message_text, found)) + "]"), taken=taken)


def _message_text(message: Message) -> JsonText:
    told = {"id": message.id or str(message.seq), "name": message.name, "sent_at": message.sent_at.isoformat()}
    return f'{json.dumps(told, ensure_ascii=False)[:-1]}, "body": {message.body or "null"}}}'


def _deliverable(inbox: Iterable[Message], names: Collection[str], until: datetime | None) -> list[Message]:
    """The signals that a wait may take, oldest first. One that was sent after its deadline came too late."""
    signals = (message for message in inbox if message.kind is MessageKind.SIGNAL)
    named = (message for message in signals if not names or message.name in names)
    return [message for message in named if until is None or message.sent_at <= until]


# ---------------------------------------------------------------- children


def begin_child(view: View, key: str, workflow: Workflow, given: JsonText, now: datetime) -> Progress:
    """Start it: in this transaction, with an id of which there is one: another for each try of a block around it."""
    around = sorted((k, begun.attempts) for k, begun in view.run.frame.items() if key.startswith(f"{k}/"))
    tries = "".join(f" {block}:{attempts}" for block, attempts in around if attempts)
    child = child_id(view.run.id, f"{key}{tries}", view.run.retries)
    start = ChildStart(child, workflow.name, workflow.version, given, key)
    return Progress(begun=Begun(since=now, waits=WaitingFor.CHILD, child=child), child=start)


def child_refused(key: str, name: str, error: PayloadError) -> Failure:
    """Its input is not what it declares."""
    text = f"the input of child workflow {name!r} for {key!r}: {error}"
    return Failure("durable.errors.PayloadError", text, "critical", key)


def child(
    view: View, key: str, begun: Begun, now: datetime, told: Message | None, more: Sequence[tuple[str, Any]] = ()
) -> Progress:
    """Over once it has told of its end. `more`: what the entry is to remember beside its id."""
    if told is None:
        return Progress(begun=begun)
    body: dict[str, Any] = json.loads(told.body or "{}")
    entry = Entry(
        key,
        EntryKind.CHILD,
        "completed",
        started_at=begun.since,
        finished_at=now,
        extra={"child": str(begun.child), **dict(more)},
    )
    if body.get("status") == Status.COMPLETED:
        result = json.dumps(body.get("result"), ensure_ascii=False, separators=(",", ":"))
        return Progress(replace(entry, result=result), taken=(told.seq,))
    failure = _child_failed(key, body, begun)
    return Progress(replace(entry, status="failed", error=failure), taken=(told.seq,))


def _child_failed(key: str, body: dict[str, Any], begun: Begun) -> Failure:
    error = body.get("error") or {}
    how = "was canceled" if body.get("status") == Status.CANCELED else "failed"
    why = f"{error['type']}: {error['message']}" if error else body.get("reason") or "no reason given"
    message = f"child workflow of {key!r} ({begun.child}) {how}: {why}"
    details = {"child": {"id": str(begun.child), "status": body.get("status"), "error": error or None}}
    return Failure("durable.errors.ChildFailed", message, "error", key, details=details)


def answer(view: View, key: str, child: uuid.UUID | None) -> Message | None:
    """What `child`, or the run that goes on in its place, told of its end. A child of before a retry may answer late:
    that is not heard."""
    told = (m for m in view.inbox if m.kind is MessageKind.CHILD and m.name == key)
    return next((m for m in told if json.loads(m.body or "{}").get("run") == str(child)), None)
