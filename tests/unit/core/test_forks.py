"""Branches side by side, routes, and loops."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.core.model import World, calls, once

from durable import errors
from durable.define.builder import Builder, define
from durable.define.options import branch
from durable.define.retry import Retry
from durable.values import Status, Suspend, WaitingFor

ORDERS = [lambda flights: 0, lambda flights: len(flights) - 1]
ONCE = Retry(max_attempts=1)
SECOND = timedelta(seconds=1)


def ran(flow: Builder[Any], input: Any = None, **more: Any) -> Any:  # noqa: A002
    world = World(flow, **more)
    run = world.start(flow, input)
    world.drive()
    return run


# ---------------------------------------------------------------- parallel


@pytest.mark.behaviour("SD-11", "SN-40")
@pytest.mark.parametrize("order", ORDERS)
def test_branches_are_journaled_under_the_node_and_give_a_result_by_name(order: Any) -> None:
    branches = {"a": once({"x": 1}), "b": once({"y": 2}), "c": once("plain")}
    flow = define("fan").parallel("p", branches).step("after", lambda ctx: ctx.results["p"]["b"])
    run = ran(flow, order=order)
    assert run.result == {"p": {"a": {"x": 1}, "b": {"y": 2}, "c": "plain"}, "after": {"y": 2}}
    assert sorted(run.keys()[:3]) == ["p/a", "p/b", "p/c"]
    assert run.keys()[3:] == ["p", "after"]
    assert {run.journal[f"p/{name}"].parent for name in "abc"} == {"p"}
    assert run.run.claim is None


@pytest.mark.behaviour("SW-05", "SN-41")
@pytest.mark.parametrize("order", ORDERS)
def test_all_branches_end_before_the_node_fails(order: Any) -> None:
    undo, other = once(None), once(2)
    bad = branch(once(errors.NonRetryable("boom")))
    flow = (
        define("fan")
        .step("pre", once(1), compensate=undo)
        .parallel("p", {"ok": branch(other, compensate=undo), "bad": bad, "worse": once(ValueError("late"))}, retry=1)
        .step("never", once(3))
    )
    run = ran(flow, order=order)
    assert run.status is Status.FAILED
    assert calls(other) == 1
    assert "boom" in run.error
    assert run.error.startswith("JoinFailed: 2 of 3 branches of 'p' failed")
    assert run.run.error.kind == "critical"
    assert run.run.error.details == {
        "branches": {
            "bad": {"type": "durable.errors.NonRetryable", "message": "boom", "kind": "critical", "attempts": 1},
            "worse": {"type": "ValueError", "message": "late", "kind": "error", "attempts": 1},
        }
    }
    assert run.undone() == ["p/ok", "pre"]
    assert "never" not in run.journal


def test_a_branch_retry_parks_only_when_no_branch_can_move_and_finished_ones_never_rerun() -> None:
    steady, flaky, slow = once(1), once(ValueError(), 2), once(ValueError(), ValueError(), 3)
    plain, long = Retry(initial=1, jitter=False), Retry(initial=10, jitter=False)
    branches: dict[str, Any] = {"slow": branch(slow, retry=long), "flaky": branch(flaky, retry=plain), "steady": steady}
    flow = define("fan").parallel("p", branches)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "p/flaky"), "it is woken for the first that may go on"
    assert run.run.claim is None
    assert run.rest().total_seconds() == 1
    assert run.keys() == ["p/steady"]
    world.skip(1)
    assert run.waits() == (WaitingFor.RETRY, "p/slow")
    world.skip(9)
    assert run.rest().total_seconds() == 20
    world.skip(20)
    assert run.result == {"p": {"slow": 3, "flaky": 2, "steady": 1}}
    assert (calls(steady), calls(flaky), calls(slow)) == (1, 2, 3)


def test_a_branch_that_falls_due_while_a_sibling_runs_is_launched_under_the_same_claim() -> None:
    def slow(ctx: Any) -> int:
        world.now += 5 * SECOND
        return 1

    flaky = once(ValueError(), 2)
    flow = define("fan").parallel("p", {"flaky": branch(flaky, retry=Retry(jitter=False)), "slow": slow})
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.result == {"p": {"flaky": 2, "slow": 1}}
    assert "suspended" not in run.statuses


@pytest.mark.parametrize("order", ORDERS)
def test_a_branch_can_suspend_while_its_siblings_go_on(order: Any) -> None:
    api, ui = once(Suspend({"need": "key"}), lambda ctx: ctx.resume_data), once(ValueError(), 7)
    flow = define("build").parallel("build", {"api": api, "ui": branch(ui, retry=Retry(jitter=False))})
    world = World(flow, order=order)
    run = world.start(flow)
    world.drain()
    assert run.status is Status.SUSPENDED
    assert run.value("build/api") == {"need": "key"}
    assert run.resume("build/api", "k"), "also while the run waits for something else"
    world.drain()
    assert run.waits() == (WaitingFor.RETRY, "build/ui")
    world.drive()
    assert run.result == {"build": {"api": "k", "ui": 7}}
    assert (calls(api), calls(ui)) == (2, 2)


def test_all_branches_suspended_park_for_the_first_and_each_can_be_resumed() -> None:
    ask = {name: once(Suspend(name), lambda ctx: ctx.resume_data) for name in "ab"}
    flow = define("ask").parallel("p", ask)
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.RESUME, "p/a")
    assert run.resume("p/b", 2)
    world.drain()
    assert run.waits() == (WaitingFor.RESUME, "p/a")
    assert run.resume("p/a", 1)
    world.drain()
    assert run.result == {"p": {"a": 1, "b": 2}}


def test_an_exhausted_branch_can_pause_the_run_and_the_reason_stays() -> None:
    careful = once(ValueError("look at me"), 1)
    other = once(2)
    flow = define("fan").parallel(
        "p", {"a": branch(careful, retry=Retry(max_attempts=1, on_exhausted="pause")), "b": other}
    )
    run = ran(flow)
    assert run.status is Status.PAUSED
    assert run.error == "ValueError: look at me", "although a sibling ended after it"
    assert run.keys() == ["p/b"]
    run.resume()
    run.world.drain()
    assert run.result == {"p": {"a": 1, "b": 2}}
    assert run.run.error is None
    assert calls(other) == 1


def test_the_deadline_waits_for_the_branches_that_run() -> None:
    def slow(ctx: Any) -> int:
        world.now += 20 * SECOND
        return 1

    undo = once(None)
    flow = define("fan").parallel("p", {"a": branch(slow, retry=ONCE), "b": branch(once(2), compensate=undo)})
    world = World(flow)
    run = world.start(flow, timeout=10)
    world.drive()
    assert run.status is Status.FAILED
    assert run.keys("failed") == ["p/a", "p/b"], "what begins after the deadline has no time left"
    assert "deadline" in run.error


# ---------------------------------------------------------------- route


@pytest.mark.behaviour("SD-13", "SW-06")
def test_a_route_runs_the_chosen_branch_only_and_says_which() -> None:
    cloud, metal = once("c"), once("m")
    flow = define("ship").route("target", lambda ctx: ctx.input["to"], {"cloud": cloud, "metal": metal})
    run = ran(flow, {"to": "metal"})
    assert run.result == {"target": {"branch": "metal", "value": "m"}}
    assert run.keys() == ["choice:target", "target/metal", "target"]
    assert (calls(cloud), calls(metal)) == (0, 1)
    assert run.journal["choice:target"].parent == "target"


def test_the_choice_is_journaled_before_the_branch_and_never_taken_anew() -> None:
    select = once("a", "b")
    work = once(ValueError(), 1)
    flow = define("ship").route("target", select, {"a": branch(work), "b": once(2)})
    run = ran(flow)
    assert run.result == {"target": {"branch": "a", "value": 1}}
    assert calls(select) == 1


@pytest.mark.behaviour("SN-43")
@pytest.mark.parametrize("answer", ["missing", 3, None, ["a"]])
def test_an_unknown_branch_fails_the_node_and_lists_the_branches(answer: Any) -> None:
    undo = once(None)
    flow = (
        define("ship")
        .step("pre", once(1), compensate=undo)
        .route("target", once(answer), {"cloud": once(1), "metal": once(2)})
    )
    run = ran(flow)
    assert run.status is Status.FAILED
    assert run.error.startswith("UnknownBranch: ")
    assert repr(answer) in run.error
    assert "cloud, metal" in run.error
    assert run.undone() == ["pre"]
    assert run.keys("failed") == ["choice:target", "target"]


@pytest.mark.behaviour("SW-08")
def test_a_selector_that_fails_is_retried_and_then_fails_the_node() -> None:
    flow = define("ship").route("target", once(ValueError("no idea")), {"a": once(1)}).step("b", once(1))
    run = ran(flow)
    assert run.error == "ValueError: no idea"
    assert run.run.error.step == "choice:target"
    assert len(run.attempts) == 2


def test_retry_takes_a_wrong_choice_anew_and_a_failed_branch_again() -> None:
    select, work = once("nowhere", "a"), once(errors.NonRetryable("x"), 5)
    flow = define("ship").route("target", select, {"a": work})
    run = ran(flow)
    assert run.retry() == "accepted"
    run.world.drive()
    assert run.error == "NonRetryable: x"
    assert run.retry() == "accepted"
    run.world.drive()
    assert run.result == {"target": {"branch": "a", "value": 5}}
    assert calls(select) == 2


def test_a_routes_branch_can_suspend() -> None:
    flow = define("ship").route("r", once("a"), {"a": once(Suspend(), lambda ctx: ctx.resume_data)})
    world = World(flow)
    run = world.start(flow)
    world.drain()
    assert run.waits() == (WaitingFor.RESUME, "r/a")
    run.resume("r/a", 4)
    world.drain()
    assert run.result == {"r": {"branch": "a", "value": 4}}


# ---------------------------------------------------------------- loop


def count(ctx: Any) -> int:
    return int(ctx.item) + 1


@pytest.mark.behaviour("SD-14", "SW-09", "SW-10", "SW-12")
def test_a_loop_until_feeds_each_result_to_the_next() -> None:
    flow = define("loop").loop("n", count, until=lambda result, i: result >= 5, max_iterations=5)
    run = ran(flow, 0)
    assert run.result == {"n": [1, 2, 3, 4, 5]}, "a condition that ends exactly at the limit completes"
    assert run.keys() == [f"n[{i}]" for i in range(5)] + ["n"]
    assert {run.journal[f"n[{i}]"].parent for i in range(5)} == {"n"}


@pytest.mark.behaviour("SN-44")
def test_a_loop_while_is_asked_before_each_iteration() -> None:
    flow = define("loop").loop("n", lambda ctx: ctx.iteration * 10, while_=lambda ctx, i: i < 3, max_iterations=3)
    assert ran(flow).result == {"n": [0, 10, 20]}


@pytest.mark.behaviour("SW-11")
@pytest.mark.parametrize(("keep", "empty"), [("all", []), ("last", None)])
def test_without_a_condition_the_limit_is_the_count(keep: Any, empty: Any) -> None:
    for times, results in ((0, empty), (1, [1]), (3, [1, 2, 3])):
        flow = define("loop").loop("n", count, max_iterations=times, keep=keep)
        run = ran(flow, 0)
        assert run.result == {"n": results if keep == "all" or not times else times}


@pytest.mark.parametrize(
    "condition", [{"until": lambda result, i: False}, {"while_": lambda ctx, i: True}], ids=["until", "while_"]
)
@pytest.mark.parametrize("limit", [0, 2])
def test_needing_an_iteration_more_than_the_limit_fails(condition: Any, limit: int) -> None:
    run = ran(define("loop").loop("n", count, max_iterations=limit, **condition), 0)
    assert run.status is Status.FAILED
    assert run.error.startswith("LoopLimitExceeded")
    assert run.keys() == [f"n[{i}]" for i in range(limit)]


def test_while_false_at_once_with_limit_0_completes() -> None:
    run = ran(define("loop").loop("n", count, while_=lambda ctx, i: False, max_iterations=0), 0)
    assert run.result == {"n": []}


@pytest.mark.parametrize("keep", ["all", "last"])
def test_map_input_gives_the_first_item_and_feedback_the_next(keep: Any) -> None:
    items: list[Any] = []

    def work(ctx: Any) -> int:
        items.append(ctx.item)
        return len(items)

    flow = define("loop").loop(
        "n", work, map_input=lambda ctx: {"first": ctx.input}, feedback=lambda r: f"<{r}>", max_iterations=3, keep=keep
    )
    run = ran(flow, "in")
    assert items == [{"first": "in"}, "<1>", "<2>"]
    assert run.result == {"n": [1, 2, 3] if keep == "all" else 3}


def test_feedback_of_none_is_an_item_too() -> None:
    items: list[Any] = []

    def work(ctx: Any) -> int:
        items.append(ctx.item)
        return 1

    ran(define("loop").loop("n", work, feedback=lambda r: None, max_iterations=2), "in")
    assert items == ["in", None]


def test_an_iteration_is_retried_alone_and_a_failed_one_fails_the_loop() -> None:
    work = once(1, ValueError(), 2, errors.NonRetryable("x"), 3)
    flow = define("loop").loop("n", work, max_iterations=3)
    run = ran(flow)
    assert run.error == "NonRetryable: x"
    assert run.keys() == ["n[0]", "n[1]"]
    assert run.keys("failed") == ["n[2]", "n"]
    assert run.retry() == "accepted"
    run.world.drive()
    assert run.result == {"n": [1, 2, 3]}


def test_a_loop_whose_limit_was_lowered_meanwhile_ends_where_it_is() -> None:
    old = define("loop").step("gate", once(1)).loop("n", once(1, 2, ValueError(), 3), max_iterations=5)
    new = define("loop").step("gate", once(1)).loop("n", once(9), max_iterations=2)
    world = World(old)
    run = world.start(old)
    world.drain()
    assert run.keys() == ["gate", "n[0]", "n[1]"]
    world.registry = World(new).registry
    world.skip(1)
    assert run.result == {"gate": 1, "n": [1, 2]}


def test_a_suspension_in_a_loop_is_an_error() -> None:
    run = ran(define("loop").loop("n", once(Suspend()), max_iterations=2))
    assert "can't suspend" in run.error
