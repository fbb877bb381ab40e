"""Child workflows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.core.model import Sim, World, calls, once

from durable import errors
from durable.core.state import Message, MessageKind
from durable.define.builder import Builder, define
from durable.values import Status, WaitingFor, child_id


def family(child: Builder[Any], undo: Any = None, **more: Any) -> tuple[World, Sim]:
    parent = (
        define("parent")
        .step("setup", once(1), compensate=undo or once(None))
        .child_workflow("sub", child.name, **more)
        .step("after", lambda ctx: ctx.results["sub"])
    )
    world = World(parent, child)
    run = world.start(parent, {"n": 3})
    world.drain()
    return world, run


@pytest.mark.behaviour("SD-26", "SN-46")
def test_a_child_gets_the_input_and_its_result_is_the_nodes() -> None:
    child = define("kid").step("do", lambda ctx: {"from": ctx.input})
    world, run = family(child)
    assert run.result == {"setup": 1, "sub": {"do": {"from": {"n": 3}}}, "after": {"do": {"from": {"n": 3}}}}
    kid = world.child(run, "sub")
    assert kid.id == child_id(run.id, "sub", 0)
    assert (kid.run.parent_id, kid.run.parent_step, kid.status) == (run.id, "sub", Status.COMPLETED)
    assert run.journal["sub"].extra == {"child": str(kid.id)}


def test_while_the_child_runs_the_parent_waits_for_its_message_only() -> None:
    child = define("kid").wait_for_signal("w", "go")
    world, run = family(child)
    assert run.waits() == (WaitingFor.CHILD, "sub")
    assert run.run.wake_at is None
    run.signal("sub", "no answer of a child's")
    world.drain()
    assert run.has(Status.SUSPENDED)
    world.child(run, "sub").signal("go", 5)
    world.drain()
    assert run.result["sub"] == {"w": 5}


@pytest.mark.behaviour("SD-27", "SN-47")
def test_a_failed_child_fails_the_node_with_its_error() -> None:
    undo = once(None)
    world, run = family(define("kid").step("do", once(errors.NonRetryable("child boom"))), undo)
    assert run.has(Status.FAILED)
    assert run.error.startswith("ChildFailed: child workflow of 'sub'")
    assert "child boom" in run.error
    assert run.run.error is not None
    kid = (run.run.error.details or {})["child"]
    assert (kid["id"], kid["status"], kid["error"]["step"]) == (str(world.child(run, "sub").id), "failed", "do")
    assert calls(undo) == 1
    assert "after" not in run.journal


@pytest.mark.parametrize("reason", ["not needed", None])
def test_a_canceled_child_fails_the_node_with_the_reason(reason: str | None) -> None:
    world, run = family(define("kid").wait_for_signal("w", "go"))
    world.child(run, "sub").cancel(reason)
    world.drain()
    assert run.has(Status.FAILED)
    assert "was canceled" in run.error
    assert (reason or "no reason given") in run.error


def test_map_input_and_a_computed_workflow_are_journaled_before_the_start() -> None:
    child = define("kid", version="2").step("do", lambda ctx: ctx.input * 2)
    which, given = once(ValueError(), child), once(ValueError(), lambda ctx: ctx.results["setup"] + 20)
    parent = define("parent").step("setup", once(1)).child_workflow("sub", which, map_input=given)
    world = World(parent, child)
    run = world.start(parent)
    world.drive()
    assert run.result["sub"] == {"do": 42}
    assert run.keys() == ["setup", "choice:sub", "input:sub", "sub"]
    assert (calls(which), calls(given)) == (2, 2)
    assert world.child(run, "sub").run.version == "2"


def test_a_child_can_be_named_with_its_version() -> None:
    old, new = define("kid", version="1").step("do", once("old")), define("kid", version="2").step("do", once("new"))
    pinned = define("pinned").child_workflow("sub", old)
    latest = define("latest").child_workflow("sub", "kid")
    world = World(old, new, pinned, latest)
    runs = [world.start(pinned), world.start(latest)]
    world.drain()
    assert [run.result["sub"]["do"] for run in runs] == ["old", "new"]


def test_an_input_that_the_child_does_not_take_fails_the_node() -> None:
    child = define("kid", input=int).step("do", once(1))
    undo = once(None)
    world, run = family(child, undo)
    assert run.has(Status.FAILED)
    assert run.error.startswith("PayloadError: the input of child workflow 'kid' for 'sub'")
    assert [sim for sim in world.runs.values() if sim.run.parent_id] == []
    assert calls(undo) == 1


def test_an_unknown_child_workflow_parks_until_a_worker_knows_it() -> None:
    parent = define("parent").child_workflow("sub", "kid").child_workflow("other", "kid", version="7")
    world = World(parent)
    run = world.start(parent, timeout=100)
    world.drain()
    assert run.waits() == (WaitingFor.DEFINITION, "kid@")
    assert run.rest().total_seconds() == 100, "the deadline holds all the same"
    world.registry.add(define("kid", version="3").step("do", once(1)))
    world.put_back_known()
    world.drain()
    assert run.waits() == (WaitingFor.DEFINITION, "kid@7")
    world.skip(100)
    assert run.has(Status.FAILED)


def test_a_retry_starts_a_new_child() -> None:
    child = define("kid").step("do", once(errors.NonRetryable("boom"), 5))
    parent = define("parent").child_workflow("sub", "kid")
    world = World(parent, child)
    run = world.start(parent)
    world.drain()
    assert run.has(Status.FAILED)
    assert run.retry() == "accepted"
    world.drain()
    assert run.result == {"sub": {"do": 5}}
    assert world.child(run, "sub").id == child_id(run.id, "sub", 1) != child_id(run.id, "sub", 0)


def test_a_child_of_before_the_retry_answers_in_vain() -> None:
    child = define("kid").wait_for_signal("w", "go")
    parent = define("parent").child_workflow("sub", "kid")
    world = World(parent, child)
    run = world.start(parent)
    world.drain()
    first = world.child(run, "sub")
    first.cancel()
    world.drain()
    run.retry()
    world.drain()
    stale = json.dumps({"run": str(first.id), "status": "completed", "result": "stale"})
    world.send(run.id, MessageKind.CHILD, "sub", stale)
    world.drain()
    assert run.waits() == (WaitingFor.CHILD, "sub")
    world.child(run, "sub").signal("go", 1)
    world.drain()
    assert run.result == {"sub": {"w": 1}}


def test_cancel_pause_and_resume_reach_the_children() -> None:
    grandchild = define("grandkid").wait_for_signal("w", "go")
    child = define("kid").child_workflow("deep", "grandkid")
    world, run = family(child)
    world.registry.add(grandchild)
    world.put_back_known()
    world.drain()
    tree = [run, world.child(run, "sub"), world.child(world.child(run, "sub"), "deep")]
    run.pause()
    world.drain()
    assert [sim.status for sim in tree] == [Status.PAUSED] * 3
    run.resume()
    world.drain()
    assert [sim.status for sim in tree] == [Status.SUSPENDED] * 3
    run.cancel("enough")
    world.drain()
    assert [sim.status for sim in tree] == [Status.CANCELED] * 3
    assert {sim.run.reason for sim in tree} == {"enough"}


def test_the_deadline_of_a_parent_is_its_childrens_and_cancels_those_that_still_run() -> None:
    undo = once(None)
    child = define("kid").step("a", once(1), compensate=undo).wait_for_signal("w", "go")
    parent = define("parent").child_workflow("sub", "kid")
    world = World(parent, child)
    run = world.start(parent, timeout=60)
    world.drain()
    assert world.child(run, "sub").run.deadline == run.run.deadline
    world.skip(60)
    assert run.has(Status.FAILED)
    assert world.child(run, "sub").has(Status.FAILED) or world.child(run, "sub").has(Status.CANCELED)
    assert calls(undo) == 1


# ---------------------------------------------------------------- rolling back


def saga(after: Any = None, *, child_undo: Any = None, compensate: bool = True) -> tuple[World, Sim, list[str]]:
    told: list[str] = []

    def undo(name: str) -> Any:
        def undo_it(ctx: Any) -> None:
            told.append(f"{name}:{ctx.output}")
            if child_undo is not None and name == "x":
                raise child_undo

        return undo_it

    child = define("kid").step("x", once("cx"), compensate=undo("x")).step("y", once("cy"), compensate=undo("y"))
    parent = (
        define("parent")
        .step("setup", once(1), compensate=undo("setup"))
        .child_workflow("sub", "kid", compensate=compensate)
        .step("after", after or once(errors.NonRetryable("late")))
    )
    world = World(parent, child)
    run = world.start(parent)
    return world, run, told


def test_a_completed_child_is_rolled_back_through_its_own_journal() -> None:
    world, run, told = saga()
    world.drive()
    assert told == ["y:cy", "x:cx", "setup:1"]
    kid = world.child(run, "sub")
    assert (kid.status, kid.run.reason) == (Status.CANCELED, "rolled back")
    assert kid.statuses == ["pending", "running", "completed", "compensating", "canceled"]
    assert run.undone() == ["sub", "setup"]
    assert run.error == "NonRetryable: late"
    assert run.not_undone == []


def test_without_compensate_a_completed_child_stays() -> None:
    world, run, told = saga(compensate=False)
    world.drive()
    assert told == ["setup:1"]
    assert world.child(run, "sub").has(Status.COMPLETED)


def test_what_a_child_could_not_undo_is_told_by_the_parent() -> None:
    world, run, told = saga(child_undo=errors.NonRetryable("stuck"))
    world.drive()
    assert told == ["y:cy", "x:cx", "setup:1"]
    assert run.has(Status.FAILED)
    assert run.not_undone == ["sub"]
    assert run.journal["undo:sub"].status == "failed"
    assert world.child(run, "sub").not_undone == ["x"]


def test_a_parent_waits_for_the_rollback_of_its_child() -> None:
    world, run, told = saga(child_undo=ValueError("busy"))
    world.drain()
    assert run.waits() == (WaitingFor.ROLLBACK, "undo:sub")
    assert run.has(Status.COMPENSATING)
    run.signal("x")
    world.drain()
    assert run.waits() == (WaitingFor.ROLLBACK, "undo:sub")
    world.drive()
    assert told[-1] == "setup:1"


def test_canceling_with_compensation_awaits_the_open_child_first() -> None:
    told: list[str] = []
    child = define("kid").step("x", once(1), compensate=lambda ctx: told.append("x")).wait_for_signal("w", "go")
    parent = define("parent").step("a", once(1), compensate=lambda ctx: told.append("a")).child_workflow("sub", "kid")
    world = World(parent, child)
    run = world.start(parent)
    world.drain()
    run.cancel("stop", compensate=True)
    assert run.has(Status.COMPENSATING)
    world.drain()
    assert told == ["x", "a"]
    assert run.has(Status.CANCELED)
    assert world.child(run, "sub").has(Status.CANCELED)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("deadline", [True, False])
def test_a_child_that_was_faster_than_the_cancel_is_undone_if_it_is_to_be(compensate: bool, deadline: bool) -> None:
    told: list[str] = []
    child = define("kid").step("x", once(1), compensate=lambda ctx: told.append("x")).wait_for_signal("w", "go")
    parent = define("parent").child_workflow("sub", "kid", compensate=compensate)
    world = World(parent, child)
    run = world.start(parent, timeout=60 if deadline else None)
    world.drain()
    kid = world.child(run, "sub")
    kid.signal("go")
    world._work(world.jobs.pop())  # the child has ended; nobody has read what it told its parent
    assert kid.has(Status.COMPLETED)
    if deadline:  # it is looked at without its inbox having been read, as if the message came just after
        answer, run.inbox = run.inbox, []
        world.jobs.clear()
        world.now = run.run.deadline or world.now
        world.put_back_due()
        world._work(world.jobs.pop())
        run.inbox = answer
        world.recover()
    else:
        run.cancel(compensate=True)
    world.drain()
    assert told == (["x"] if compensate else [])
    assert run.has(Status.FAILED if deadline else Status.CANCELED)
    if deadline:
        assert run.retry() == ("undone" if compensate else "accepted")
        world.drain()
        assert compensate or run.waits() == (WaitingFor.CHILD, "sub")


def test_a_failed_or_canceled_child_has_nothing_to_be_undone() -> None:
    ends: list[Callable[[Sim], bool]] = [lambda kid: kid.cancel(), lambda kid: kid.signal("go", 1)]
    for end in ends:
        child = define("kid").wait_for_signal("w", "go", type=str)
        undo = once(None)
        world, run = family(child, undo, compensate=True)
        end(world.child(run, "sub"))
        world.drain()
        assert run.undone() == ["setup"]


def test_a_rollback_that_comes_twice_or_to_one_that_has_ended_otherwise_changes_nothing() -> None:
    world, run, told = saga()
    world.drive()
    kid = world.child(run, "sub")
    ask = json.dumps(None)
    assert world.send(kid.id, MessageKind.ROLLBACK, "undo:sub", ask, "undo:sub") == "duplicate"
    kid.inbox.append(_rollback(world))
    before = kid.run
    world._take_further(kid)
    assert kid.run.revision == before.revision + 1
    assert world.outgoing[-1].run_id == run.id, "the parent must hear it all the same"
    assert told == ["y:cy", "x:cx", "setup:1"]


def test_a_rollback_of_a_run_without_a_parent_that_failed_is_ignored() -> None:
    flow = define("alone").step("a", once(errors.NonRetryable("x")))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    run.inbox.append(_rollback(world))
    world._take_further(run)
    assert (run.status, run.inbox, world.outgoing) == (Status.FAILED, [], [])


def _rollback(world: World) -> Message:
    world.seq += 1
    return Message(world.seq, MessageKind.ROLLBACK, "undo:sub", None, world.now)
