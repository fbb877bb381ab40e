"""Sleeps and waits for signals: when they begin, what ends them. A wait's time is written once, when it begins."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from durable.core.attempt import signal
from durable.core.finish import node_done
from durable.core.give_up import node_failed
from durable.core.moves import park, with_step
from durable.core.state import Begun, Entry, EntryKind, Failure, Message, View
from durable.core.transition import Call, Decision, Purpose, Transition
from durable.define.nodes import RAISE, Sleep, WaitForSignal, Work
from durable.errors import PayloadError
from durable.values import WaitingFor


def plan_sleep(view: View, node: Sleep, now: datetime) -> Decision:
    """Begin the sleep, go on with it, or end it."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.waits is WaitingFor.SLEEP:
        return wake(view, node, now, begun)
    if isinstance(node.until, Work):
        return Call(node.name, Purpose.CHOICE, node.until)
    return begin_sleep(view, node, now, node.until)


def begin_sleep(view: View, node: Sleep, now: datetime, until: float | timedelta | datetime) -> Transition | None:
    """Its end is fixed now; one that lies in the past is over at once."""
    if isinstance(until, (int, float)):
        until = timedelta(seconds=until)
    due = now + until if isinstance(until, timedelta) else until
    return wake(view, node, now, Begun(since=now, due=due, waits=WaitingFor.SLEEP))


def wake(view: View, node: Sleep, now: datetime, begun: Begun) -> Transition | None:
    """The sleep is over, or is parked for what is left of it."""
    if begun.due is not None and begun.due > now:
        frame = with_step(view.run, node.name, begun)
        return park(view, now, WaitingFor.SLEEP, name=node.name, wake_at=begun.due, frame=frame)
    done = Entry(node.name, EntryKind.SLEEP, "completed", "null", started_at=begun.since, finished_at=now)
    return node_done(view, now, node, "null", entries=(done,))


def plan_signal(view: View, node: WaitForSignal, now: datetime) -> Decision:
    """Begin the wait, go on with it, or end it: by a message, else by its timeout."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.waits is WaitingFor.SIGNAL:
        return await_signal(view, node, now, begun)
    if isinstance(node.signal, Work):
        return Call(node.name, Purpose.CHOICE, node.signal)
    return begin_wait(view, node, now, node.signal)


def begin_wait(view: View, node: WaitForSignal, now: datetime, name: str) -> Transition | None:
    """From now on the run waits for `name`; a message that came before is taken at once."""
    deadline = now + node.timeout if node.timeout is not None else None
    begun = Begun(since=now, waits=WaitingFor.SIGNAL, name=name, deadline=deadline)
    return await_signal(view, node, now, begun)


def await_signal(view: View, node: WaitForSignal, now: datetime, begun: Begun) -> Transition | None:
    """Take the oldest message of the name, time out, or park."""
    assert begun.name is not None
    message = signal(view, begun.name, until=begun.deadline)
    if message is not None:
        return _satisfied(view, node, now, begun, message)
    if begun.deadline is not None and begun.deadline <= now:
        return _timed_out(view, node, now, begun)
    frame = with_step(view.run, node.name, begun)
    return park(view, now, WaitingFor.SIGNAL, name=begun.name, wake_at=begun.deadline, frame=frame)


def _satisfied(view: View, node: WaitForSignal, now: datetime, begun: Begun, message: Message) -> Transition:
    body = message.body or "null"
    taken = {message.seq: node.name}
    try:
        node.payload.load(body)
    except PayloadError as error:
        text = f"signal {begun.name!r} for {node.name!r}: {error}"
        refused = Failure("durable.errors.PayloadError", text, "critical", node.name)
        return node_failed(view, now, node, refused, taken=taken)
    done = Entry(node.name, EntryKind.SIGNAL, "completed", body, started_at=begun.since, finished_at=now)
    done = replace(done, extra={"signal": begun.name})
    return node_done(view, now, node, body, entries=(done,), taken=taken)


def _timed_out(view: View, node: WaitForSignal, now: datetime, begun: Begun) -> Transition:
    extra = {"signal": begun.name, "timed_out": True}
    entry = Entry(node.name, EntryKind.SIGNAL, "completed", started_at=begun.since, finished_at=now, extra=extra)
    if node.on_timeout is not RAISE:
        return node_done(view, now, node, node.on_timeout, entries=(replace(entry, result=node.on_timeout),))
    message = f"no signal {begun.name!r} came to {node.name!r} within {node.timeout}"
    failure = Failure("durable.errors.SignalTimeout", message, "timeout", node.name)
    return node_failed(view, now, node, failure, entries=(replace(entry, status="failed", error=failure),))
