"""What a builder run does next: it looks at the node under the cursor."""

from __future__ import annotations

import json
from datetime import datetime
from typing import assert_never

from durable.core.attempt import Waits, attempt
from durable.core.children import plan_child
from durable.core.finish import complete, node_done, object_text
from durable.core.give_up import branches_failed, loop_limit_reached, step_failed
from durable.core.journal import Journal
from durable.core.loops import iterations, loop_result, next_item
from durable.core.moves import park
from durable.core.state import Begun, Entry, EntryKind, Failure, View
from durable.core.transition import Call, Decision, Fanout, Limits, Purpose, Transition
from durable.core.waits import plan_signal, plan_sleep
from durable.define.nodes import (
    ChildWorkflow,
    Loop,
    Node,
    Parallel,
    Route,
    Sleep,
    Step,
    WaitForSignal,
    Work,
)
from durable.values import WaitingFor


def forward(view: View, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    """What the node under the cursor needs next."""
    workflow = view.workflow
    assert workflow is not None
    if (difference := divergence(view)) is not None:
        name = difference.type.rpartition(".")[2]
        return park(view, now, WaitingFor.PERSON, name=name, error=difference, mind_deadline=False)
    if view.run.current_step == len(workflow.nodes):
        return _finish(view, now, limits, running)
    return _plan_node(view, workflow.nodes[view.run.current_step], now, limits, running)


def _plan_node(view: View, node: Node, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    match node:
        case Step(name, work):
            return _alone(view, now, limits, running, Call(name, Purpose.STEP, work))
        case Parallel():
            return _plan_parallel(view, node, now, limits, running)
        case Route():
            return _plan_route(view, node, now, limits, running)
        case Loop():
            return _plan_loop(view, node, now, limits, running)
        case Sleep():
            return _computed(view, now, limits, running, plan_sleep(view, node, now))
        case WaitForSignal():
            return _computed(view, now, limits, running, plan_signal(view, node, now))
        case ChildWorkflow():
            return _computed(view, now, limits, running, plan_child(view, node, now))
        case _:
            assert_never(node)


def _alone(view: View, now: datetime, limits: Limits, running: frozenset[str], call: Call) -> Decision:
    """A call that the whole run waits for."""
    if call.step_id in running:
        return None
    state = attempt(view, now, limits, call)
    match state:
        case Waits(begun):
            return park_for(view, now, call.step_id, begun)
        case Failure() as failure:
            return step_failed(view, now, call, failure)
        case _:
            return state


def _computed(view: View, now: datetime, limits: Limits, running: frozenset[str], decided: Decision) -> Decision:
    """A wait whose name, time or input the user's code computes is a call like any other until that is done."""
    return _alone(view, now, limits, running, decided) if isinstance(decided, Call) else decided


def _plan_parallel(view: View, node: Parallel, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    calls: list[Call] = []
    waits: list[tuple[str, Begun]] = []
    for branch, work in node.branches.items():
        step_id = f"{node.name}/{branch}"
        if step_id in running or _ended(view, step_id):
            continue
        call = Call(step_id, Purpose.BRANCH, work, shares=True)
        match attempt(view, now, limits, call):
            case Transition() as taken_up:
                return taken_up
            case Failure() as failure:
                return step_failed(view, now, call, failure)
            case Waits(begun):
                waits.append((step_id, begun))
            case Call() as ready:
                calls.append(ready)
    if calls:
        return Fanout(tuple(calls))
    if running:
        return None
    return _park_branches(view, now, waits) if waits else _join(view, node, now)


def _park_branches(view: View, now: datetime, waits: list[tuple[str, Begun]]) -> Transition | None:
    """No branch can move: the run parks until the first of them can, or for what the first of them waits for."""
    timed = [(begun.due, step_id, begun) for step_id, begun in waits if begun.due is not None]
    if timed:
        _, step_id, begun = min(timed, key=lambda wait: wait[:2])
        return park_for(view, now, step_id, begun)
    return park_for(view, now, *waits[0])


def _join(view: View, node: Parallel, now: datetime) -> Transition:
    entries = {branch: view.journal[f"{node.name}/{branch}"] for branch in node.branches}
    if any(entry.status == "failed" for entry in entries.values()):
        return branches_failed(view, now, node, entries)
    since = min(entry.started_at or now for entry in entries.values())
    value = object_text({branch: entry.result or "null" for branch, entry in entries.items()})
    done = Entry(node.name, EntryKind.PARALLEL, "completed", value, started_at=since, finished_at=now)
    return node_done(view, now, node, value, entries=(done,))


def _plan_route(view: View, node: Route, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    choice = view.journal.get(f"choice:{node.name}")
    if choice is None or choice.status != "completed":
        return _alone(view, now, limits, running, Call(f"choice:{node.name}", Purpose.CHOICE, node.selector))
    branch = json.loads(choice.result or "null")
    work: Work | None = node.branches.get(branch)
    if work is None:  # chosen under code that still had it
        gone = Failure(
            "durable.errors.HistoryDiverged",
            f"the run took branch {branch!r} of {node.name!r}, which the code no longer has; its branches: "
            f"{', '.join(node.branches)}. Put it back, or cancel the run.",
        )
        return park(view, now, WaitingFor.PERSON, name="HistoryDiverged", error=gone)
    return _alone(view, now, limits, running, Call(f"{node.name}/{branch}", Purpose.BRANCH, work))


def _plan_loop(view: View, node: Loop, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    done = iterations(view, node)
    count, last = len(done), done[-1] if done else None
    stopped = last is not None and bool((last.extra or {}).get("stop"))
    if stopped or (count >= node.max_iterations and not node.conditional):
        return node_done(view, now, node, loop_result(node, done))
    if count >= node.max_iterations and node.until is not None:
        return loop_limit_reached(view, now, node)
    call = Call(f"{node.name}[{count}]", Purpose.ITERATION, node.work, loop=node, iteration=count, item=next_item(last))
    return _alone(view, now, limits, running, call)


def _finish(view: View, now: datetime, limits: Limits, running: frozenset[str]) -> Decision:
    assert view.workflow is not None
    if view.workflow.result is None or _ended(view, "run:result"):
        return complete(view, now)
    return _alone(view, now, limits, running, Call("run:result", Purpose.RESULT, view.workflow.result))


def park_for(view: View, now: datetime, step_id: str, begun: Begun) -> Transition | None:
    """Park for what one step waits for."""
    waiting_for = begun.waits or WaitingFor.RETRY
    return park(view, now, waiting_for, name=begun.name or step_id, wake_at=begun.due)


def divergence(view: View) -> Failure | None:
    """What the code no longer agrees on with the nodes that the run has passed; None if all is well."""
    journal = view.journal
    if isinstance(journal, Journal) and journal.agrees_with is view.workflow:
        return None
    difference = _compared(view)
    if difference is None and isinstance(journal, Journal):
        journal.agrees_with = view.workflow
    return difference


def _compared(view: View) -> Failure | None:
    assert view.workflow is not None
    passed = view.workflow.nodes[: view.run.current_step]
    expected = [(node.name, node.kind) for node in passed]
    top_level = (e for e in view.journal.values() if e.parent is None and e.kind in _NODE_KINDS)
    found = [(e.step_id, e.kind.value) for e in top_level if e.status == "completed"][: view.run.current_step]
    if expected == found and len(passed) == view.run.current_step:
        return None
    message = (
        f"workflow {view.run.workflow!r} {view.run.version!r}: the run has passed {_listed(found)}, but the code "
        f"now begins with {_listed(expected)}. Deploy the old definition again and `retry` the run, or cancel it; "
        f"a changed workflow needs a new version."
    )
    details = {"expected": _listed(found), "found": _listed(expected)}
    return Failure("durable.errors.HistoryDiverged", message, "critical", details=details)


def _listed(nodes: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in nodes) or "nothing"


def _ended(view: View, step_id: str) -> bool:
    entry = view.journal.get(step_id)
    return entry is not None and entry.status != "suspended"


_NODE_KINDS = frozenset(kind.kind for kind in (Step, Parallel, Route, Loop, Sleep, WaitForSignal, ChildWorkflow))
