"""The rollback."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.core.model import World, calls, once

from durable import errors
from durable.core.state import MessageKind
from durable.core.undo import next_target
from durable.define.builder import Builder, define
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.values import Status, WaitingFor

BOOM = errors.NonRetryable("boom")


class Undo:
    """Compensators that tell in which order they were called, with what."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, name: str, *outcomes: Any) -> Any:
        work = once(*outcomes) if outcomes else once(None)

        def undo(ctx: Any) -> Any:
            work(ctx)
            self.told.append(name)
            self.seen.append((ctx.output, ctx.step_id, ctx.iteration, ctx.item))
            return object()  # what a compensator returns is dropped

        return undo


@pytest.mark.behaviour("SN-32", "SW-13")
def test_compensators_run_newest_first_and_get_what_their_step_returned() -> None:
    undo = Undo()
    flow = (
        define("saga")
        .step("reserve", once({"id": 1}), compensate=undo("reserve"))
        .step("charge", once("paid"), compensate=undo("charge"))
        .step("plain", once(1))
        .step("ship", once(BOOM), compensate=undo("ship"))
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert undo.told == ["charge", "reserve"]
    assert [seen[0] for seen in undo.seen] == ["paid", {"id": 1}]
    assert run.statuses == ["pending", "running", "compensating", "failed"]
    assert run.error == "NonRetryable: boom"
    assert run.not_undone == []
    assert run.run.current_step == 3


@pytest.mark.behaviour("SW-16")
def test_with_nothing_to_undo_a_failed_run_just_fails() -> None:
    flow = define("plain").step("a", once(1)).step("b", once(BOOM))
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.statuses == ["pending", "running", "failed"]


@pytest.mark.behaviour("SW-14")
def test_branches_iterations_and_routes_are_undone_too_also_of_the_failing_node() -> None:
    undo = Undo()
    flow = (
        define("saga")
        .parallel("p", {"x": branch(once(1), compensate=undo("x")), "y": branch(once(2), compensate=undo("y"))})
        .route("r", once("a"), {"a": branch(once(3), compensate=undo("a")), "b": branch(once(4), compensate=undo("b"))})
        .loop("n", once(5, 6, BOOM), compensate=undo("n"), max_iterations=3)
    )
    world = World(flow)
    run = world.start(flow, "in")
    world.drain()
    assert undo.told == ["n", "n", "a", "y", "x"]
    assert run.undone() == ["n[1]", "n[0]", "r/a", "p/y", "p/x"]
    assert undo.seen[:3] == [(6, "undo:n[1]", 1, 5), (5, "undo:n[0]", 0, "in"), (3, "undo:r/a", None, None)]
    assert run.journal["undo:n[1]"].parent == "n"


@pytest.mark.behaviour("SD-29")
def test_a_rollback_goes_on_where_it_was_interrupted() -> None:
    undo = Undo()
    flow = (
        define("saga")
        .step("a", once(1), compensate=undo("a"))
        .step("b", once(2), compensate=undo("b"))
        .step("c", once(BOOM))
    )
    world = World(flow)
    run = world.start(flow)
    world.drain(jobs=4)
    assert (run.status, undo.told) == (Status.COMPENSATING, ["b"])
    assert run.run.undo_cursor == run.journal["b"].seq
    world.jobs.clear()
    world.recover()
    world.drain()
    assert (run.status, undo.told) == (Status.FAILED, ["b", "a"])


def test_a_compensator_is_retried_and_waits_without_a_job() -> None:
    undo = Undo()
    flow = (
        define("saga")
        .step("a", once(1), compensate=undo("a"))
        .step("b", once(2), compensate=undo("b", ValueError("busy"), None))
        .step("c", once(BOOM))
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.has(Status.COMPENSATING)
    assert run.waits() == (WaitingFor.RETRY, "undo:b")
    assert run.rest().total_seconds() == 0.75
    assert undo.told == []
    world.drive()
    assert undo.told == ["b", "a"]
    assert run.journal["undo:b"].attempt == 2


@pytest.mark.behaviour("SW-15")
def test_one_that_gives_up_is_recorded_and_the_rest_run() -> None:
    undo = Undo()
    stuck = step(retry=Retry(max_attempts=2, on_exhausted="pause"))(undo("b", ValueError("stuck")))
    flow = (
        define("saga")
        .step("a", once(1), compensate=undo("a"))
        .step("b", once(2), compensate=stuck)
        .step("c", once(BOOM))
    )
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert undo.told == ["a"]
    assert run.has(Status.FAILED)
    assert run.error == "NonRetryable: boom"
    assert run.not_undone == ["b"]
    assert run.journal["undo:b"].status == "failed"
    assert [record.step_id for record in run.attempts] == ["undo:b"]
    assert run.retry() == "undone"


def test_a_compensator_has_no_deadline_but_its_own_limit() -> None:
    undo = once(None)
    flow = define("saga").step("a", once(1), compensate=undo).sleep("nap", 100)
    world = World(flow)
    run = world.start(flow, timeout=10)
    world.drive()
    assert calls(undo) == 1
    assert run.journal["undo:a"].status == "completed"
    assert run.has(Status.FAILED)


def compensating(*more: Any, third: Any = None) -> tuple[World, Any, Undo]:
    """A run that waits for its second compensator's retry."""
    undo = Undo()
    flow = (
        define("saga")
        .step("a", once(1), compensate=undo("a"))
        .step("b", once(2), compensate=undo("b", ValueError("busy"), *more, None))
        .step("c", once(3), compensate=third or undo("c"))
        .step("d", once(BOOM))
    )
    world = World(flow)
    run = world.start(flow)
    world.drain()
    return world, run, undo


def test_cancel_stops_a_rollback_and_lists_what_was_not_undone() -> None:
    world, run, undo = compensating()
    assert run.cancel("leave it")
    assert run.has(Status.COMPENSATING)
    world.drain()
    assert run.has(Status.CANCELED)
    assert undo.told == ["c"]
    assert run.not_undone == ["b", "a"]
    assert run.error == "NonRetryable: boom"
    assert run.run.reason == "leave it"
    assert not run.cancel()


def test_cancel_with_compensation_lets_a_rollback_go_on() -> None:
    world, run, undo = compensating()
    assert run.cancel("why", compensate=True)
    world.drive()
    assert run.has(Status.CANCELED)
    assert undo.told == ["c", "b", "a"]
    assert run.run.reason == "why"


def test_a_stopped_rollback_is_not_set_going_again() -> None:
    world, run, undo = compensating()
    run.cancel()
    run.cancel(compensate=True)
    world.drive()
    assert undo.told == ["c"]


def test_cancel_during_a_compensator_ends_after_it() -> None:
    def third(ctx: Any) -> None:
        run_of.append(world_of[0].runs[ctx.run_id].cancel())

    run_of: list[bool] = []
    world_of: list[World] = []
    undo = once(None)
    flow = define("saga").step("a", once(1), compensate=undo).step("b", once(2), compensate=third).step("c", once(BOOM))
    world = World(flow)
    world_of.append(world)
    run = world.start(flow)
    world.drain()
    assert run_of == [True]
    assert run.has(Status.CANCELED)
    assert (run.undone(), run.not_undone, calls(undo)) == (["b"], ["a"], 0)


def test_a_canceled_run_with_an_undone_rest_says_so() -> None:
    flow = define("saga").step("a", once(1), compensate=once(BOOM)).sleep("nap", 10)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    run.cancel("why", compensate=True)
    world.drain()
    assert run.has(Status.CANCELED)
    assert run.error == "RunCanceled: why"
    assert run.not_undone == ["a"]


def test_pause_and_resume_do_nothing_to_a_rollback() -> None:
    world, run, undo = compensating()
    assert not run.pause()
    assert not run.resume()
    world.send(run.id, *_pause())
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "undo:b")
    world.drive()
    assert undo.told == ["c", "b", "a"]


def _pause() -> tuple[MessageKind, None, None]:

    return MessageKind.PAUSE, None, None


def test_a_rollback_waits_for_its_definition() -> None:
    world, run, undo = compensating()
    known, world.registry = world.registry, World().registry
    world.skip(10)
    assert run.waits() == (WaitingFor.DEFINITION, "saga@1")
    assert run.has(Status.COMPENSATING)
    assert next_target(run.view) is None
    world.registry = known
    world.put_back_known()
    world.drain()
    assert undo.told == ["c", "b", "a"]


def test_a_detached_compensator_is_claimed() -> None:
    undo = step(transactional=False)(once(ValueError(), None))
    flow = define("saga").step("a", once(1), compensate=undo).step("b", once(BOOM))
    world = World(flow)
    run = world.start(flow)
    world.drive()
    assert run.undone() == ["a"]
    assert any(t.after.claim is not None and t.after.status is Status.COMPENSATING for t in run.transitions)


def test_entries_whose_compensator_is_gone_from_the_code_are_left() -> None:
    undo = once(None)
    branches = {"x": branch(once(1), compensate=undo), "y": branch(once(2), compensate=undo)}
    old = define("saga").step("a", once(1), compensate=undo).parallel("p", branches).sleep("nap", 10)
    new: Builder[Any] = define("saga").sleep("a", 1).parallel("p", {"y": branch(once(2), compensate=undo)})
    world = World(old)
    run = world.start(old)
    world.drain()
    world.registry = World(new.sleep("nap", 10)).registry
    run.cancel(compensate=True)
    world.drain()
    assert run.undone() == ["p/y"]
