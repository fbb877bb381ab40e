"""Code that breaks a rule of bodies fails its run at once, whatever it catches, and says what to write instead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from tests.unit.core.functions.kit import fail, failed, give, started

from durable import Break, Context, JoinFailed, Rollback, StepFailed, workflow
from durable.core.functions.values import Failures, First, Message
from durable.errors import DefinitionError
from durable.values import Status


async def a_foreign_await(ctx: Context) -> None:
    await asyncio.sleep(0)


async def a_task(ctx: Context) -> None:
    class Task:
        canceled = False

        def cancel(self) -> None:
            Task.canceled = True

        def __await__(self) -> Any:
            yield self

    try:
        await Task()
    finally:
        assert Task.canceled


async def not_awaited(ctx: Context) -> None:
    _ = ctx.step(give)
    await ctx.step(give)


async def not_awaited_at_the_end(ctx: Context) -> None:
    _ = ctx.step(give)


async def awaited_twice(ctx: Context) -> None:
    operation = ctx.step(give)
    await operation
    await operation


async def the_outer_context_in_a_branch(ctx: Context) -> None:
    await ctx.join("j", {"x": lambda c: ctx.step(give), "y": lambda c: c.step(give)})


async def a_name_twice(ctx: Context) -> None:
    await ctx.step(give, name="a")
    await ctx.step(give, name="a")


async def a_name_that_a_default_took(ctx: Context) -> None:
    await ctx.step(give)
    await ctx.step(give, name="give")


async def no_name(ctx: Context) -> None:
    await ctx.step(lambda: 1)


async def a_generator_as_a_step(ctx: Context) -> None:
    def steps() -> Any:
        yield 1

    await ctx.step(steps)


async def a_checkpoint_in_a_branch(ctx: Context) -> None:
    await ctx.join("j", {"x": lambda c: c.checkpoint("k")})


async def going_on_as_new_in_a_branch(ctx: Context) -> None:
    async def branch(c: Context) -> None:
        c.continue_as_new()

    await ctx.join("j", {"x": branch})


async def a_branch_that_is_no_coroutine(ctx: Context) -> None:
    await ctx.block("b", lambda c: 1)  # type: ignore[arg-type, return-value]


async def a_loop_that_forgets_its_state(ctx: Context) -> None:
    async def body(c: Context, n: int) -> None:
        return None

    await ctx.loop("l", body, 1)


async def a_loop_without_state_that_returns(ctx: Context) -> None:
    async def body(c: Context, n: None) -> int:
        return 1

    await ctx.loop("l", body)


async def a_loop_whose_body_takes_no_state(ctx: Context) -> None:
    async def body(c: Context) -> None:
        return None

    await ctx.loop("l", body)  # type: ignore[arg-type]


NO_TYPE = object()

RULES: list[tuple[Callable[..., Any], str]] = [
    (a_foreign_await, "that is no operation of its context .at .*test_faults.py:"),
    (a_task, "the body awaits a Task that is no operation"),
    (not_awaited, "'give' was started and not awaited"),
    (not_awaited_at_the_end, "'give' was started and not awaited"),
    (awaited_twice, "'give' is awaited a second time"),
    (the_outer_context_in_a_branch, "uses the context of the code around it"),
    (a_name_twice, "'a'"),
    (a_name_that_a_default_took, "'give'"),
    (no_name, "give it name="),
    (a_generator_as_a_step, "is a generator"),
    (a_checkpoint_in_a_branch, "ctx.checkpoint belongs outside of branches"),
    (going_on_as_new_in_a_branch, "ctx.continue_as_new belongs outside of branches"),
    (a_branch_that_is_no_coroutine, "must be an async function of a context"),
    (a_loop_that_forgets_its_state, "has a state, and its body returned nothing"),
    (a_loop_without_state_that_returns, "has no state, and its body returned int"),
    (a_loop_whose_body_takes_no_state, "its body is called with a context and the state"),
]


@pytest.mark.parametrize(("body", "why"), [pytest.param(body, why, id=body.__name__) for body, why in RULES])
def test_a_rule_that_is_broken_fails_the_run(body: Callable[..., Any], why: str) -> None:
    async def swallowing(ctx: Context) -> str:
        try:
            await body(ctx)
        except Exception:
            return "as if nothing had happened"
        return "done"

    run = started(swallowing)
    assert run.has(Status.FAILED)
    assert run.run.error is not None
    assert run.run.error.kind == "critical"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(run.error)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda c: c.sleep_until(datetime(2026, 1, 1)), "needs a datetime with a time zone"),  # noqa: DTZ001
        (lambda c: c.sleep_until(datetime(9500, 1, 1, tzinfo=UTC)), "is too far away"),
        (lambda c: c.sleep("soon"), "seconds"),
        (lambda c: c.wait_for_signal("s", on_timeout=1), "on_timeout without timeout"),
        (lambda c: c.wait_for_signal("s", timeout=1, on_timeout=object()), "on_timeout can't be stored"),
        (lambda c: c.wait_for_signal("s", type=NO_TYPE), "type:"),
        (lambda c: c.receive(limit=0), "limit must be a whole number of at least 1|limit must be at least 1"),
        (lambda c: c.try_step(give, catch="timeout"), "a list of any of"),
        (lambda c: c.try_block("b", lambda c: c.step(give), catch=("sleep",)), "a list of any of"),
        (lambda c: c.join("j", {}), "with at least one"),
        (lambda c: c.join("j", {"x": 1}), "must be a function of a context"),
        (lambda c: c.map("m", "w", [], concurrency=0), "concurrency must be"),
        (lambda c: c.map("m", "w", [], policy=3), "policy must be"),
        (lambda c: c.loop("l", give, history=0), "history must be"),
        (lambda c: c.child(3), "is no workflow"),
        (lambda c: c.removed("s", "undo"), "kind must be one of"),
        (lambda c: c.step(give, retry="often"), "retry"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(wrong: Callable[[Any], Any], why: str) -> None:
    async def body(ctx: Context) -> None:
        await wrong(ctx)

    with pytest.raises(AssertionError, match=why):
        raise AssertionError(failed(body))


def test_an_operation_is_no_truth() -> None:
    async def body(ctx: Context) -> bool:
        return bool(ctx.step(give))

    assert "'give' has no value yet: await it" in failed(body)


def test_an_operation_says_what_it_is() -> None:
    async def body(ctx: Context) -> list[str]:
        operation = ctx.step(give)
        said = [repr(operation), repr(ctx).partition(" of ")[0]]
        await operation
        return said

    assert started(body).result == ["<step 'give': await it>", "<Context"]


def test_policies_and_messages_refuse_nonsense() -> None:
    for nonsense in (-1, 1.5, True):
        with pytest.raises(DefinitionError, match="Failures"):
            Failures(nonsense)
    with pytest.raises(DefinitionError, match="First"):
        First(0)
    with pytest.raises(DefinitionError, match="completable"):
        _ = Message("1", "n", None, datetime(2026, 1, 1, tzinfo=UTC)).complete()


def test_what_a_partial_is_called() -> None:
    async def body(ctx: Context) -> list[Any]:
        return [await ctx.step(partial(give, 1)), await ctx.step(partial(give, 2))]

    run = started(body)
    assert run.result == [1, 2]
    assert run.keys() == ["give", "give#2", "run:result"]


def test_a_default_name_makes_way_for_one_that_was_given() -> None:
    async def body(ctx: Context) -> None:
        await ctx.step(give, name="give")
        await ctx.step(give)

    assert started(body).keys() == ["give", "give#2", "run:result"]


def test_a_state_that_cannot_be_stored() -> None:
    async def body(ctx: Context) -> None:
        async def turn(c: Context, state: dict[str, int]) -> Any:
            return object()

        await ctx.loop("l", turn, {"n": 1})

    assert "loop 'l': the state after iteration 0" in failed(body)


def test_a_result_that_is_not_of_its_type() -> None:
    async def body(ctx: Context) -> int:
        return await ctx.step(give, "text")

    assert "the result of workflow 'w'" in failed(body)


def test_an_input_that_a_child_does_not_take() -> None:
    @workflow
    async def kid(ctx: Context, n: int) -> int:
        return n

    async def body(ctx: Context) -> list[Any]:
        result = await ctx.try_block("b", lambda c: c.child(kid, "text"))
        failure = result.failure
        assert failure is not None
        return [failure.kind, failure.source, failure.step]

    assert started(body, None, kid).result == ["critical", "step", "b/kid"]


def test_going_on_as_new_with_an_input_that_is_refused() -> None:
    async def body(ctx: Context, n: int) -> None:
        ctx.continue_as_new("text")

    assert "the input of continue_as_new in workflow 'w'" in failed(body, 1)


def test_a_reply_that_cannot_be_stored() -> None:
    async def body(ctx: Context) -> None:
        [message] = await ctx.receive("ask", completable=True)
        await message.complete(object())

    run = started(body)
    run.signal("ask")
    run.world.drain()
    assert "the reply 'complete'" in run.error


def test_a_second_message_before_the_first_is_completed() -> None:
    async def body(ctx: Context) -> None:
        await ctx.receive("ask", completable=True)
        await ctx.receive("ask", completable=True)

    run = started(body)
    run.signal("ask")
    run.signal("ask")
    run.world.drain()
    assert "the message 'ask' has not been completed" in run.error
    assert [message.name for message in run.inbox] == ["ask", "ask"], "both are still there"


def test_what_tries_catch() -> None:
    """Each kind and source of failure, as a value."""

    async def both(c: Context) -> Any:
        return await c.join("j", {"x": lambda b: b.step(fail, retry=1), "y": lambda b: b.step(give)})

    async def all_of(c: Context) -> Any:
        return await c.race("r", {"x": lambda b: b.step(fail, retry=1)})

    async def raises(c: Context) -> Any:
        raise KeyError("k")

    async def no_answer(c: Context) -> Any:
        return await c.wait_for_signal("s", timeout=1)

    async def body(ctx: Context) -> list[Any]:
        tried = [
            await ctx.try_block("join", both),
            await ctx.try_block("race", all_of),
            await ctx.try_block("signal", no_answer),
            await ctx.try_block("raises", raises, catch=("block",)),
        ]
        told = []
        for result in tried:
            assert result.failure is not None
            told.append([result.failure.kind, result.failure.source, result.failure.step])
        return told

    run = started(body)
    run.world.drive()
    assert run.result == [
        ["exhausted", "join", "join/j"],
        ["exhausted", "race", "race/r"],
        ["timeout", "step", "signal/s"],
        ["error", "block", None],
    ]


def test_what_tries_let_through() -> None:
    async def raises(c: Context) -> Any:
        raise KeyError("k")

    async def body(ctx: Context) -> Any:
        return await ctx.try_block("b", raises)

    assert failed(body) == "KeyError: 'k'"


def test_a_map_with_fewer_items_than_it_wants() -> None:
    async def body(ctx: Context) -> Any:
        return list(await ctx.map("m", "w", [], policy=First(1)))

    assert "map 'm' has 0 items" in failed(body)


def test_a_map_of_nothing() -> None:
    async def body(ctx: Context) -> Any:
        return list(await ctx.map("m", "w", []))

    assert started(body).result == []


def test_a_failure_is_the_same_live_and_replayed() -> None:
    """Also its causes: what a retry of the run takes up anew."""

    async def body(ctx: Context) -> Any:
        failures: list[str] = []
        try:
            await ctx.join("j", {"x": lambda c: c.step(fail, retry=1)})
        except JoinFailed as error:
            failures = sorted(error.failures)
        try:
            await ctx.step(fail, retry=1, name="other")
        except StepFailed as error:
            raise RuntimeError(str(failures)) from error

    run = started(body)
    assert run.error == "RuntimeError: ['x']"
    assert run.run.error is not None
    assert (run.run.error.details or {})["retry"] == ["other"]


def test_a_value_that_only_the_body_needs() -> None:
    """What a block yields need not be storable."""

    class Thing:
        pass

    async def inner(c: Context) -> Thing:
        await c.step(give)
        return Thing()

    async def body(ctx: Context) -> str:
        return type(await ctx.block("b", inner)).__name__

    run = started(body)
    assert run.result == "Thing"
    assert run.value("b") is None


def test_breaking_a_loop_at_once() -> None:
    async def body(ctx: Context) -> Any:
        async def turn(c: Context, state: None) -> Any:
            return Break("done")

        return await ctx.loop("l", turn)

    run = started(body)
    assert run.result == "done"
    assert len(run.transitions) == 1


def test_a_checkpoint_of_a_block_that_caught_the_rollback_is_out_of_reach() -> None:
    async def inner(c: Context) -> None:
        await c.checkpoint("inside")
        raise Rollback

    async def body(ctx: Context) -> None:
        await ctx.try_block("b", inner, catch=["rollback"])
        raise Rollback(to="inside")

    run = started(body)
    assert run.has(Status.FAILED)
    assert run.run.error is not None
    assert "no such checkpoint" in run.run.error.message
