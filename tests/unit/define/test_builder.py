"""The builder: every node kind is kept as it was given, every mistake is found and told with its place."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from durable.define.builder import Builder, define
from durable.define.nodes import RAISE, ChildWorkflow, Loop, Parallel, Route, Sleep, WaitForSignal, Work
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.errors import DefinitionError, DuplicateStepName, PayloadError


class Milestone(BaseModel):
    id: int


class Findings(BaseModel):
    found: list[str] = []


def discover(ctx: Any) -> Findings:
    return Findings()


async def ship(ctx: Any) -> str:
    return "x"


def unship(ctx: Any) -> None: ...


def pick(ctx: Any) -> str:
    return "cloud"


def work(ctx: Any) -> int:
    return 1


def ready(result: int, iteration: int) -> bool:
    return True


def empty() -> Builder[Any]:
    return define("milestone")


def whole() -> Builder[Milestone]:
    return (
        define("milestone", version="2", input=Milestone)
        .step("discover", discover)
        .parallel("build", {"api": work, "ui": branch(work, compensate=unship)})
        .route("target", pick, {"cloud": work, "metal": ship})
        .loop("poll", work, until=ready, max_iterations=100)
        .sleep("settle", timedelta(minutes=5))
        .wait_for_signal("signoff", "founder-signoff", type=Findings, timeout=timedelta(days=3))
        .child_workflow("rollout", "rollout", map_input=lambda ctx: {"id": ctx.input.id})
        .step("ship", ship, compensate=unship, retry=Retry(max_attempts=5), timeout=30)
    )


def only(builder: Builder[Any]) -> Any:
    return builder.workflow.nodes[-1]


# ---------------------------------------------------------------- what is built


@pytest.mark.behaviour("SD-01", "SN-02", "SN-07", "SN-26", "SW-17", "SW-19")
def test_all_kinds_keep_their_order_and_report_their_kind() -> None:
    workflow = whole().workflow
    assert (workflow.name, workflow.version) == ("milestone", "2")
    assert [(node.name, node.kind) for node in workflow.nodes] == [
        ("discover", "step"),
        ("build", "parallel"),
        ("target", "route"),
        ("poll", "loop"),
        ("settle", "sleep"),
        ("signoff", "signal"),
        ("rollout", "child"),
        ("ship", "step"),
    ]
    assert workflow.input.load('{"id": 3}') == Milestone(id=3)
    assert workflow.place.startswith(__file__ + ":")


@pytest.mark.behaviour("SW-18")
def test_the_nodes_of_a_builder_are_a_copy() -> None:
    builder = whole()
    before = builder.nodes
    builder.step("more", work)
    assert len(builder.nodes) == len(before) + 1
    assert isinstance(before, tuple)


def test_a_builder_may_grow_and_its_workflow_is_cached_until_it_does() -> None:
    builder = empty().step("one", work)
    first = builder.workflow
    assert builder.workflow is first
    builder.step("two", work)
    assert [n.name for n in builder.workflow.nodes] == ["one", "two"]
    assert [n.name for n in first.nodes] == ["one"]


@pytest.mark.behaviour("SD-05", "SD-06", "SN-04")
def test_a_steps_options_are_kept() -> None:
    plain = only(empty().step("s", discover))
    assert plain.work == Work(discover, result=plain.work.result)
    assert plain.work.result.annotation is Findings
    chosen = only(
        empty().step("s", ship, retry=Retry(7, "linear"), compensate=unship, timeout=timedelta(seconds=3)),
    ).work
    assert (chosen.handler, chosen.timeout, chosen.retry.max_attempts, chosen.retry.backoff) == (ship, 3, 7, "linear")
    assert chosen.compensate.handler is unship
    assert chosen.compensate.retry == Retry()
    assert only(empty().step("s", ship, retry=5)).work.retry == Retry(max_attempts=5)
    once = only(empty().step("s", ship, at_most_once=True)).work
    assert (once.at_most_once, once.retry.max_attempts) == (True, 1)
    assert only(empty().step("s", ship, at_most_once=True, retry=4)).work.retry.max_attempts == 4


def test_a_transactional_step_has_thirty_seconds_unless_it_says_otherwise() -> None:
    assert only(empty().step("s", ship, transactional=True)).work.timeout == 30
    assert only(empty().step("s", ship, transactional=True, timeout=5)).work.timeout == 5
    assert only(empty().step("s", ship, transactional=False)).work.timeout is None


@pytest.mark.behaviour("SN-16")
def test_a_parallel_keeps_its_branches_and_gives_them_defaults() -> None:
    @step(retry=9)
    def own(ctx: Any) -> None: ...

    node = only(empty().parallel("p", {"a": work, "b": own, "c": branch(own, retry=2)}))
    assert isinstance(node, Parallel)
    assert [(k, w.handler, w.retry.max_attempts) for k, w in node.branches.items()] == [
        ("a", work, 3), ("b", own, 9), ("c", own, 2),
    ]  # fmt: skip
    node = only(empty().parallel("p", {"a": work, "b": own, "c": branch(own, retry=2)}, retry=6, timeout=4))
    assert [w.retry.max_attempts for w in node.branches.values()] == [6, 9, 2]
    assert [w.timeout for w in node.branches.values()] == [4, 4, 4]


@pytest.mark.behaviour("SN-19")
def test_a_route_keeps_selector_and_branches() -> None:
    node = only(empty().route("r", pick, {"cloud": work, "metal": branch(ship, retry=1)}, retry=8))
    assert isinstance(node, Route)
    assert (node.selector.handler, node.selector.retry) == (pick, Retry())
    assert {k: w.retry.max_attempts for k, w in node.branches.items()} == {"cloud": 8, "metal": 1}


def test_the_branches_cannot_be_changed_from_outside() -> None:
    given = {"a": work}
    node = only(empty().parallel("p", given))
    given["b"] = work
    assert list(node.branches) == ["a"]


@pytest.mark.behaviour("SN-22")
def test_a_loops_limit_and_functions() -> None:
    node = only(empty().loop("l", work))
    assert isinstance(node, Loop)
    assert (node.max_iterations, node.keep, node.conditional) == (1000, "all", False)
    node = only(
        empty().loop("l", work, while_=ready, map_input=pick, feedback=pick, max_iterations=0, keep="last", retry=2)
    )
    assert (node.max_iterations, node.keep, node.conditional, node.while_) == (0, "last", True, ready)
    assert (node.map_input, node.feedback, node.work.retry.max_attempts) == (pick, pick, 2)


@pytest.mark.behaviour("SN-13")
def test_sleep_takes_every_kind_of_duration() -> None:
    when = datetime(2030, 1, 1, tzinfo=UTC)
    for given, kept in ((5, timedelta(seconds=5)), (0, timedelta(0)), (0.5, timedelta(milliseconds=500)),
                        (timedelta(days=1), timedelta(days=1)), (when, when)):  # fmt: skip
        node = only(empty().sleep("s", given))
        assert isinstance(node, Sleep)
        assert node.until == kept
    computed = only(empty().sleep("s", lambda ctx: timedelta(minutes=1))).until
    assert computed.result.load(computed.result.dump(timedelta(minutes=1))) == timedelta(minutes=1)


@pytest.mark.behaviour("SN-14")
def test_a_signal_keeps_its_name_type_and_timeout() -> None:
    node = only(empty().wait_for_signal("w", "approve order #7: go", type=Findings, timeout=60))
    assert isinstance(node, WaitForSignal)
    assert (node.signal, node.timeout, node.on_timeout) == ("approve order #7: go", timedelta(minutes=1), RAISE)
    assert node.payload.load('{"found": []}') == Findings()
    assert only(empty().wait_for_signal("w", "s", timeout=1, on_timeout=None)).on_timeout == "null"
    late = only(empty().wait_for_signal("w", "s", type=Findings, timeout=1, on_timeout=Findings(found=["x"])))
    assert late.on_timeout == '{"found":["x"]}'
    assert only(empty().wait_for_signal("w", "s", type=Findings, timeout=1, on_timeout="late")).on_timeout == '"late"'
    computed = only(empty().wait_for_signal("w", lambda ctx: f"approve.{ctx.input}"))
    assert computed.signal.result.load('"approve.order"') == "approve.order"


@pytest.mark.behaviour("SN-23")
def test_a_child_by_name_by_object_and_by_function() -> None:
    rollout = define("rollout", version="7").step("s", work)
    node = only(empty().child_workflow("c", "rollout"))
    assert isinstance(node, ChildWorkflow)
    assert (node.workflow, node.version, node.map_input, node.compensate) == ("rollout", None, None, False)
    for given in (rollout, rollout.workflow):
        node = only(empty().child_workflow("c", given, compensate=True))
        assert (node.workflow, node.version, node.compensate) == ("rollout", "7", True)
    assert only(empty().child_workflow("c", rollout, version="3")).version == "3"
    chosen = only(empty().child_workflow("c", lambda ctx: rollout, map_input=discover))
    assert [chosen.workflow.result.dump(w) for w in (rollout, rollout.workflow)] == ['["rollout","7"]'] * 2
    assert chosen.workflow.result.dump("rollout") == '"rollout"'
    with pytest.raises(PayloadError):
        chosen.workflow.result.dump(5)
    assert chosen.map_input.result.dump(Findings(found=["a"])) == '{"found":["a"]}'


def test_a_result_function() -> None:
    builder = define("w", result=discover).step("s", work)
    assert builder.workflow.result is not None
    assert builder.workflow.result.result.annotation is Findings
    assert empty().step("s", work).workflow.result is None


class Handler:
    def __call__(self, ctx: Any) -> int:
        return 1

    def method(self, ctx: Any) -> int:
        return 1

    @staticmethod
    def static(ctx: Any) -> int:
        return 1


def three(a: int, b: int, ctx: Any) -> int:
    return 1


@pytest.mark.parametrize(
    "handler",
    [
        Handler(),
        Handler().method,
        Handler.static,
        functools.partial(three, 1, 2),
        functools.lru_cache(work),
        lambda ctx: 1,
        lambda *args: 1,
        lambda ctx, extra=None: 1,
        print,
        len,
    ],
)
def test_whatever_can_be_called_with_one_argument_serves(handler: Callable[..., Any]) -> None:
    assert only(empty().step("s", handler)).work.handler is handler


# ---------------------------------------------------------------- mistakes


@pytest.mark.behaviour("SD-02", "SN-05", "SN-25")
@pytest.mark.parametrize("name", ["discover", "build", "target", "poll", "settle", "signoff", "rollout"])
def test_a_name_is_used_once_over_all_kinds(name: str) -> None:
    attempts: list[Callable[[Any], Any]] = [
        lambda b: b.step(name, work),
        lambda b: b.parallel(name, {"a": work}),
        lambda b: b.route(name, pick, {"a": work}),
        lambda b: b.loop(name, work),
        lambda b: b.sleep(name, 1),
        lambda b: b.wait_for_signal(name, "s"),
        lambda b: b.child_workflow(name, "c"),
    ]
    for again in attempts:
        with pytest.raises(DuplicateStepName, match=f"workflow 'milestone', node '{name}'"):
            again(whole())


@pytest.mark.behaviour("SD-03", "SN-17", "SN-20")
def test_no_branches() -> None:
    with pytest.raises(DefinitionError, match="workflow 'milestone', node 'p': it has no branches"):
        empty().parallel("p", {})
    with pytest.raises(DefinitionError, match="workflow 'milestone', node 'r': it has no branches"):
        empty().route("r", pick, {})


BAD_NAMES: list[Any] = ["", " ", "a/b", "a#2", "a[0]", "]", "undo:a", "a\n", "a\0", "\x7f", "\ud800", "x" * 201, None,
                        5, work]  # fmt: skip


@pytest.mark.behaviour("SN-01")
@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_with_odd_characters(name: Any) -> None:
    with pytest.raises(DefinitionError, match="name"):
        define(name)
    attempts: list[Callable[[], Any]] = [
        lambda: empty().step(name, work),
        lambda: empty().parallel("p", {name: work}),
        lambda: empty().route("r", pick, {name: work}),
        lambda: empty().sleep(name, 1),
    ]
    for add in attempts:
        with pytest.raises(DefinitionError, match="workflow 'milestone'") as caught:
            add()
        str(caught.value).encode()


@pytest.mark.parametrize("name", ["x" * 200, "prüfen & ship.it (v2)", "名", "a-b_c", "0"])
def test_ordinary_names_serve(name: str) -> None:
    assert define(name).step(name, work).workflow.nodes[0].name == name


@pytest.mark.parametrize("signal", ["", "a\n", "x" * 201, "\ud800", None, 5])
def test_signal_names(signal: Any) -> None:
    with pytest.raises(DefinitionError, match=r"node 'w'.*signal"):
        empty().wait_for_signal("w", signal)


def no_argument() -> None: ...


def two_arguments(ctx: Any, more: Any) -> None: ...


def keyword_only(ctx: Any, *, more: Any) -> None: ...


def generator(ctx: Any) -> Any:
    yield 1


MISTAKES: list[tuple[str, Callable[[Any], Any]]] = [
    ("must be a function, not 5", lambda b: b.step("n", 5)),
    ("must be a function, not None", lambda b: b.step("n", None)),
    ("without calling it", lambda b: b.step("n", ship(None))),
    (r"no_argument\(\).* must take one positional argument", lambda b: b.step("n", no_argument)),
    ("two_arguments.*'more'", lambda b: b.step("n", two_arguments)),
    ("keyword_only.*'more'", lambda b: b.step("n", keyword_only)),
    ("generator", lambda b: b.step("n", generator)),
    ("max_attempts", lambda b: b.step("n", work, retry=0)),
    ("retry=True", lambda b: b.step("n", work, retry=True)),
    ("retry='3'", lambda b: b.step("n", work, retry="3")),
    ("timeout", lambda b: b.step("n", work, timeout=0)),
    ("timeout", lambda b: b.step("n", work, timeout=-1)),
    ("timeout", lambda b: b.step("n", work, timeout=True)),
    ("timeout", lambda b: b.step("n", work, timeout=math.nan)),
    ("timeout", lambda b: b.step("n", work, timeout=math.inf)),
    ("timeout", lambda b: b.step("n", work, timeout=1e300)),
    ("timeout", lambda b: b.step("n", work, timeout="5")),
    ("timeout", lambda b: b.step("n", work, timeout=timedelta(seconds=-1))),
    ("compensator", lambda b: b.step("n", work, compensate=5)),
    ("compensator no_argument", lambda b: b.step("n", work, compensate=no_argument)),
    ("transactional", lambda b: b.step("n", work, transactional=1)),
    ("at_most_once", lambda b: b.step("n", work, at_most_once=None)),
    ("exclude each other", lambda b: b.step("n", work, transactional=True, at_most_once=True)),
    ("unknown option 'retries'.*'retry'.*known: retry, compensate", lambda b: b.step("n", work, retries=3)),
    ("unknown option 'until'", lambda b: b.parallel("n", {"a": work}, until=ready)),
    ("branch 'a'.*must be a function", lambda b: b.parallel("n", {"a": 5})),
    ("branch 'a'.*no_argument", lambda b: b.route("n", pick, {"a": no_argument})),
    ("mapping", lambda b: b.parallel("n", [work])),
    ("mapping", lambda b: b.route("n", pick, work)),
    ("selector", lambda b: b.route("n", "cloud", {"a": work})),
    ("selector no_argument", lambda b: b.route("n", no_argument, {"a": work})),
    ("until and while_ exclude", lambda b: b.loop("n", work, until=ready, while_=ready)),
    ("until.*result, iteration", lambda b: b.loop("n", work, until=lambda result: True)),
    ("while_ must be a function", lambda b: b.loop("n", work, while_=True)),
    ("map_input.*ctx", lambda b: b.loop("n", work, map_input=no_argument)),
    ("feedback.*result", lambda b: b.loop("n", work, feedback=two_arguments)),
    ("max_iterations must not be negative", lambda b: b.loop("n", work, max_iterations=-1)),
    ("max_iterations must be a whole number", lambda b: b.loop("n", work, max_iterations=True)),
    ("max_iterations must be a whole number", lambda b: b.loop("n", work, max_iterations=1.5)),
    ("keep must be", lambda b: b.loop("n", work, keep="first")),
    ("unknown option 'max_iteration'.*'max_iterations'", lambda b: b.loop("n", work, max_iteration=3)),
    ("must not be negative", lambda b: b.sleep("n", -1)),
    ("must not be negative", lambda b: b.sleep("n", timedelta(seconds=-1))),
    ("seconds or a timedelta, not True", lambda b: b.sleep("n", True)),
    ("finite", lambda b: b.sleep("n", math.inf)),
    ("finite", lambda b: b.sleep("n", math.nan)),
    ("finite", lambda b: b.sleep("n", 10**400)),
    ("thousand years", lambda b: b.sleep("n", timedelta.max)),
    ("finite", lambda b: b.sleep("n", -math.inf)),
    ("too far away", lambda b: b.sleep("n", datetime.max.replace(tzinfo=UTC))),
    ("no time zone", lambda b: b.sleep("n", datetime(2026, 1, 1))),  # noqa: DTZ001
    ("duration must be", lambda b: b.sleep("n", "5 minutes")),
    ("unknown option 'jitter'", lambda b: b.sleep("n", 1, jitter=True)),
    ("timeout", lambda b: b.wait_for_signal("n", "s", timeout=-1)),
    ("timeout", lambda b: b.wait_for_signal("n", "s", timeout="1")),
    ("on_timeout without timeout", lambda b: b.wait_for_signal("n", "s", on_timeout=1)),
    ("on_timeout can't be stored", lambda b: b.wait_for_signal("n", "s", timeout=1, on_timeout=object())),
    ("type: object is no type|type: .*can't|no type", lambda b: b.wait_for_signal("n", "s", type=5)),
    ("unknown option 'time_out'", lambda b: b.wait_for_signal("n", "s", time_out=1)),
    ("child workflow", lambda b: b.child_workflow("n", 5)),
    ("child workflow", lambda b: b.child_workflow("n", "a/b")),
    ("version must be a string", lambda b: b.child_workflow("n", "c", version=2)),
    ("map_input", lambda b: b.child_workflow("n", "c", map_input=no_argument)),
    ("compensate: must be True or False", lambda b: b.child_workflow("n", "c", compensate=work)),
    ("unknown option 'input'", lambda b: b.child_workflow("n", "c", input=1)),
]


@pytest.mark.parametrize(("why", "mistake"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_each_mistake_is_told_with_workflow_and_node(why: str, mistake: Callable[[Any], Any]) -> None:
    builder = empty()
    with pytest.raises(DefinitionError, match=f"(?s)^workflow 'milestone', node 'n'.*(?:{why})"):
        mistake(builder)
    assert builder.nodes == ()


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("unknown option 'inptu'.*did you mean 'input'", {"inptu": int}),
        ("version must be a string.*version='2'", {"version": 2}),
        ("version is empty", {"version": ""}),
        ("input.*is no type", {"input": 5}),
        ("input.*string", {"input": "Milestone"}),
        ("result.*must be a function", {"result": 5}),
        ("result.*no_argument", {"result": no_argument}),
    ],
)
def test_mistakes_in_define(why: str, options: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match=f"^workflow 'w'.*{why}"):
        define("w", **options)


def test_a_workflow_without_nodes_is_a_mistake() -> None:
    with pytest.raises(DefinitionError, match="workflow 'milestone': it has no nodes"):
        _ = empty().workflow
