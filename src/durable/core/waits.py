"""A builder's sleeps and waits for signals. A wait's time is written once, when it begins."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from durable.core import progress
from durable.core.finish import node_done
from durable.core.give_up import node_failed
from durable.core.moves import park, with_step
from durable.core.progress import Progress
from durable.core.state import Begun, View
from durable.core.transition import Call, Decision, Purpose, Transition
from durable.define.nodes import ChildWorkflow, Sleep, WaitForSignal, Work
from durable.values import WaitingFor


def plan_sleep(view: View, node: Sleep, now: datetime) -> Decision:
    """Begin the sleep, go on with it, or end it."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.waits is WaitingFor.SLEEP:
        return carry(view, node, now, progress.sleep(node.name, begun, now))
    if isinstance(node.until, Work):
        return Call(node.name, Purpose.CHOICE, node.until)
    return begin_sleep(view, node, now, node.until)


def begin_sleep(view: View, node: Sleep, now: datetime, until: float | timedelta | datetime) -> Transition | None:
    """Its end is fixed now; one that lies in the past is over at once."""
    return carry(view, node, now, progress.sleep(node.name, progress.begin_sleep(until, now), now))


def plan_signal(view: View, node: WaitForSignal, now: datetime) -> Decision:
    """Begin the wait, go on with it, or end it: by a message, else by its timeout."""
    begun = view.run.frame.get(node.name)
    if begun is not None and begun.waits is WaitingFor.SIGNAL:
        return _await_signal(view, node, now, begun)
    if isinstance(node.signal, Work):
        return Call(node.name, Purpose.CHOICE, node.signal)
    return begin_wait(view, node, now, node.signal)


def begin_wait(view: View, node: WaitForSignal, now: datetime, name: str) -> Transition | None:
    """From now on the run waits for `name`; a message that came before is taken at once."""
    return _await_signal(view, node, now, progress.begin_wait(now, node.timeout, name=name))


def _await_signal(view: View, node: WaitForSignal, now: datetime, begun: Begun) -> Transition | None:
    came = progress.wait(node.name, begun, now, view.inbox, node.payload, node.timeout, node.on_timeout)
    return carry(view, node, now, came)


def carry(view: View, node: Sleep | WaitForSignal | ChildWorkflow, now: datetime, came: Progress) -> Transition | None:
    """The transition that a wait's progress makes of the run whose cursor is on it."""
    begun, entry = came.begun, came.entry
    if begun is not None:
        assert begun.waits is not None
        children: dict[str, Any] = {"children": (came.child,)} if came.child is not None else {}
        wake_at = begun.due or begun.deadline
        frame = with_step(view.run, node.name, begun)
        return park(view, now, begun.waits, name=begun.name or node.name, wake_at=wake_at, frame=frame, **children)
    assert entry is not None
    taken: dict[str, Any] = {"taken": dict.fromkeys(came.taken, node.name)} if came.taken else {}
    if entry.error is not None:
        return node_failed(view, now, node, entry.error, entries=(entry,), **taken)
    return node_done(view, now, node, entry.result or "null", entries=(entry,), **taken)
