"""Code that changed under a run, and definitions that a worker does not know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.core.model import Sim, World, once

from durable.core.graph import divergence
from durable.core.journal import Journal
from durable.define.builder import Builder, define
from durable.values import Status, WaitingFor


def base() -> Builder[Any]:
    return define("w").step("a", once(1)).step("b", once(2))


def parked(**more: Any) -> tuple[World, Sim]:
    flow = base().sleep("nap", 60).step("z", once(3))
    world = World(flow)
    run = world.start(flow, **more)
    world.drain()
    return world, run


CHANGED = {
    "renamed": define("w").step("a", once(1)).step("bb", once(2)).sleep("nap", 60),
    "swapped": define("w").step("b", once(2)).step("a", once(1)).sleep("nap", 60),
    "another kind": define("w").step("a", once(1)).sleep("b", 1).sleep("nap", 60),
    "one more in front": define("w").step("new", once(0)).step("a", once(1)).step("b", once(2)).sleep("nap", 60),
    "too short": define("w").step("a", once(1)),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_was_passed_and_is_no_longer_in_the_code_parks_the_run(change: str) -> None:
    world, run = parked()
    old = world.registry
    world.registry = World(CHANGED[change]).registry
    world.skip(60)
    assert run.has(Status.SUSPENDED)
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    assert run.error.startswith("HistoryDiverged: workflow 'w'")
    assert "a (step), b (step)" in run.error
    assert run.retry() == "accepted", "it looks again"
    world.drain()
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    world.registry = old
    assert run.retry() == "accepted"
    world.drive()
    assert run.result == {"a": 1, "b": 2, "nap": None, "z": 3}
    assert run.run.error is None


def test_a_parked_run_is_not_woken_for_ever_by_its_deadline() -> None:
    world, run = parked(timeout=100)
    old = world.registry
    world.registry = World(CHANGED["renamed"]).registry
    world.skip(60)
    assert run.run.wake_at is None
    world.skip(100)
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    world.registry = old
    run.retry()
    world.drain()
    assert run.has(Status.FAILED), "the deadline acts when the code fits again"


def test_nodes_ahead_of_the_cursor_may_change() -> None:
    world, run = parked()
    world.registry = World(base().sleep("nap", 60).step("other", once(9)).step("more", once(10))).registry
    world.skip(60)
    assert run.result == {"a": 1, "b": 2, "nap": None, "other": 9, "more": 10}


def test_a_diverged_run_can_be_canceled() -> None:
    world, run = parked()
    world.registry = World(CHANGED["renamed"]).registry
    world.skip(60)
    assert run.cancel(compensate=True)
    world.drain()
    assert run.has(Status.CANCELED)


def test_a_chosen_branch_that_is_gone_parks_the_run() -> None:
    def routed(*names: str) -> Builder[Any]:
        return define("w").route("r", once("a"), {name: once(ValueError(), name) for name in names})

    world = World(routed("a", "b"))
    run = world.start("w", timeout=100)
    world.drain()
    world.registry = World(routed("b", "c")).registry
    world.skip(1)
    assert run.waits() == (WaitingFor.PERSON, "HistoryDiverged")
    assert "'a'" in run.error
    assert "b, c" in run.error
    world.registry = World(routed("a")).registry
    assert run.retry() == "accepted"
    world.drive()
    assert run.result == {"r": {"branch": "a", "value": "a"}}


@pytest.mark.parametrize("version", ["1", "2"])
def test_an_unknown_workflow_or_version_parks_and_goes_on_when_a_worker_knows_it(version: str) -> None:
    other = define("w", version="other").step("x", once(1))
    world = World(other) if version == "2" else World()
    run = world.start("w", version=version, timeout=100)
    world.drain()
    assert run.waits() == (WaitingFor.DEFINITION, f"w@{version}")
    assert run.run.wake_at is None
    world.skip(50)
    world.registry.add(define("w", version=version).step("a", once(1)))
    world.put_back_known()
    world.drain()
    assert run.result == {"a": 1}


def test_cancel_and_pause_need_no_definition() -> None:
    world = World()
    runs = [world.start("w") for _ in range(3)]
    world.drain()
    runs[0].cancel()
    runs[1].pause()
    runs[2].cancel(compensate=True)
    world.drain()
    assert [run.status for run in runs] == [Status.CANCELED, Status.PAUSED, Status.CANCELED]
    runs[1].resume()
    world.drain()
    assert runs[1].waits() == (WaitingFor.DEFINITION, "w@1")


def test_a_version_keeps_to_itself() -> None:
    one, two = define("w", version="1").step("a", once("one")), define("w", version="2").step("a", once("two"))
    world = World(one, two)
    old, new = world.start("w", version="1"), world.start("w")
    world.drain()
    assert (old.result, new.result) == ({"a": "one"}, {"a": "two"})


# ---------------------------------------------------------------- once for each load


def test_a_journal_that_agrees_is_not_compared_again() -> None:
    _, run = parked()
    journal = Journal(run.journal)
    view = replace(run.view, journal=journal)
    assert divergence(view) is None
    assert journal.agrees_with is view.workflow
    assert divergence(replace(view, run=replace(view.run, current_step=1))) is None
    carried = journal.after([replace(journal["a"], step_id="c")])
    assert list(carried) == ["a", "b", "c"]
    assert carried.agrees_with is view.workflow
    assert "c" not in journal


def test_it_is_compared_with_another_definition_and_once_something_was_deleted() -> None:
    _, run = parked()
    journal = Journal(run.journal)
    view = replace(run.view, journal=journal)
    assert divergence(view) is None
    other = World(CHANGED["renamed"]).registry.latest("w")
    assert divergence(replace(view, workflow=other)) is not None
    assert divergence(replace(view, journal=journal.after([], gone=["a"]))) is not None


def test_one_that_differs_is_compared_each_time() -> None:
    world, run = parked()
    journal = Journal(run.journal)
    world.registry = World(CHANGED["swapped"]).registry
    view = replace(run.view, journal=journal)
    assert divergence(view) is not None
    assert divergence(view) is not None
    assert journal.agrees_with is None


def test_a_suspended_step_that_goes_on_is_written_behind_the_others() -> None:
    _, run = parked()
    journal = Journal(run.journal)
    assert list(journal.after([journal["a"]])) == ["b", "a"]
