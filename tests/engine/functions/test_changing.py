"""Code that changes under running workflows: ``ctx.patched``, ``ctx.removed``, and histories that diverge."""

from __future__ import annotations

from typing import Any

import pytest
from tests.engine.functions.kit import Log, Place, diverged, told
from tests.engine.kit import Facts

from durable import Break, Context, workflow

Body = Any


def flow(body: Body) -> Any:
    """Another version of the code of one workflow: the same name and version."""
    return workflow(name="w")(body)


async def changed(place: Place, old: Body, new: Body, *, skip: float = 61) -> Any:
    """A run that parks under the old code, and goes on under the new. Returns it, with what a bench of it said."""
    async with place.working(flow(old)) as b:
        run = await b.app.start("w")
        await b.drain()
        assert (await run.status()).status == "suspended", await run.status()
        await b.skip(seconds=skip)
    async with place.working(flow(new)) as b:
        await b.drain()
        run = b.app.get(run.id)
        status = await run.status()
        if status.waiting_for == "person":
            return await diverged(run)
        return await run.result(timeout=5) if status.ended else status


# ---------------------------------------------------------------- removed


@pytest.mark.behaviour("RV-89")
async def test_removed_operations(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> str:
        async def count(c: Context, n: int) -> Any:
            await c.step(log.do, n)
            return Break(n) if n == 1 else n + 1

        await ctx.step(log.do, "gone", name="step")
        await ctx.loop("loop", count, 0)
        await ctx.sleep(0, name="nap")
        await ctx.wait_for_signal("go", timeout=0, on_timeout=None)
        await ctx.receive("m", timeout=0, name="message")
        await ctx.join("join", {"a": lambda c: c.step(log.do, "a")})
        await ctx.race("race", {"a": lambda c: c.step(log.do, "a")})
        await ctx.block("block", lambda c: c.step(log.do, "b"))
        await ctx.sleep(60)
        return "old"

    async def new(ctx: Context) -> str:
        for name, kind in (
            ("step", "step"), ("loop", "loop"), ("nap", "sleep"), ("go", "signal"), ("message", "receive"),
            ("join", "join"), ("race", "race"),
        ):  # fmt: skip
            ctx.removed(name, kind)
        await ctx.removed("block", "block")  # awaited or not
        await ctx.sleep(60)
        return "new"

    assert await changed(place, old, new) == "new"
    assert log.count("gone") == 1


async def test_a_removed_operation_that_is_waited_for(place: Place) -> None:
    async def old(ctx: Context) -> str:
        await ctx.sleep(60)
        return "old"

    async def new(ctx: Context) -> str:
        ctx.removed("sleep", "sleep")
        return "new"

    assert await changed(place, old, new, skip=61) == "new"


async def test_removed_in_runs_that_never_had_it(place: Place, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        ctx.removed("do", "step")
        return [await ctx.step(log.do, 1)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert await run.result(timeout=5) == [1]
        assert [s.step_id for s in (await run.status()).steps] == ["do#2"]  # its name stays taken


async def test_removed_as_another_kind(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        ctx.removed("a", "sleep")
        await ctx.sleep(60)

    found = await changed(place, old, new)
    assert found == {"expected": "step 'a'", "found": "a removed sleep 'a'"}


async def test_removed_in_an_iteration(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> Any:
        async def body(c: Context, n: int) -> Any:
            await c.step(log.do, f"old {n}", name="gone")
            await c.sleep(60)
            return Break(n) if n == 1 else n + 1

        return await ctx.loop("poll", body, 0)

    async def new(ctx: Context) -> Any:
        async def body(c: Context, n: int) -> Any:
            c.removed("gone", "step")
            await c.sleep(60)
            return Break(n) if n == 1 else n + 1

        return await ctx.loop("poll", body, 0)

    status = await changed(place, old, new)
    assert status.waiting_name == "poll[1]/sleep"
    assert log == ["old 0"]


# ---------------------------------------------------------------- patched


def gates(ctx: Any, most: int) -> int:
    """The numbered gate of another engine: that many ids."""
    version = 1
    while version < most and ctx.patched(f"v{version + 1}"):
        version += 1
    return version


@pytest.mark.behaviour("RV-91")
async def test_a_run_from_before_the_gate(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> list[Any]:
        value = await ctx.step(log.do, "step", "recorded")
        await ctx.sleep(60)
        return [1, value]

    async def new(ctx: Context) -> list[Any]:
        version = gates(ctx, 2)
        value = await ctx.step(log.do, "step", "new")
        await ctx.sleep(60)
        return [version, value, gates(ctx, 2)]

    assert await changed(place, old, new) == [1, "recorded", 1]
    assert log == ["step"]


@pytest.mark.behaviour("RV-92")
async def test_a_fresh_run(place: Place, facts: Facts, log: Log) -> None:
    @workflow
    async def w(ctx: Context) -> list[Any]:
        await ctx.step(log.do, 1)
        first = gates(ctx, 3)
        await ctx.sleep(60)
        return [first, gates(ctx, 3)]

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert [k for k in facts.journal(run) if k.startswith("patch:")] == ["patch:v2", "patch:v3"]
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == [3, 3]
        assert [s.step_id for s in (await run.status()).steps] == ["do", "sleep"]


@pytest.mark.behaviour("RV-94")
async def test_a_step_cannot_have_the_name_of_a_gate(place: Place, log: Log) -> None:
    """Nothing else can stand under a gate's key: ``:`` is not allowed in names. A gate taken out is harmless."""

    async def old(ctx: Context) -> None:
        assert ctx.patched("v2")
        await ctx.sleep(60)

    async def new(ctx: Context) -> str:
        await ctx.sleep(60)
        return "done"

    assert await changed(place, old, new) == "done"

    @workflow
    async def w(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="patch:v2")

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).status == "failed"


@pytest.mark.behaviour("RV-95")
async def test_each_iteration_has_its_own_answer(place: Place, log: Log) -> None:
    def body_of(gated: bool) -> Any:
        async def w(ctx: Context) -> Any:
            async def body(c: Context, state: list[int]) -> Any:
                version = gates(c, 2) if gated else 1
                await c.step(log.do, len(state))
                await c.receive("m")
                state = [*state, version]
                return Break(state) if len(state) == 3 else state

            return await ctx.loop("poll", body, [])

        return flow(w)

    async with place.working(body_of(False)) as b:
        run = await b.app.start("w")
        await run.signal("m")
        await b.drain()
        assert log == [0, 1]  # in the middle of iteration 1
    async with place.working(body_of(True)) as b:
        run = b.app.get(run.id)
        await b.drain()
        for _ in range(2):
            await run.signal("m")
            await b.drain()
        assert await run.result(timeout=5) == [1, 1, 2]
        assert log == [0, 1, 2]


async def test_each_scope_has_its_own_answer(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> Any:
        await ctx.block("a", lambda c: c.step(log.do, "a"))
        await ctx.sleep(60)
        return await ctx.block("b", lambda c: c.step(log.do, "b"))

    async def new(ctx: Context) -> Any:
        async def part(c: Context, name: str) -> bool:
            patched = c.patched("new")
            await c.step(log.do, name)
            return patched

        first = await ctx.block("a", lambda c: part(c, "a"))
        await ctx.sleep(60)
        return [first, await ctx.block("b", lambda c: part(c, "b")), ctx.patched("new")]

    assert await changed(place, old, new) == [False, True, True]


async def test_a_new_step_behind_a_gate(place: Place, log: Log) -> None:
    """The documented way to add one: old runs go on without it, new ones take it."""

    async def old(ctx: Context) -> str:
        await ctx.sleep(60)
        await ctx.step(log.do, "last")
        return "ended"

    async def new(ctx: Context) -> str:
        if ctx.patched("check"):
            await ctx.step(log.do, "check", name="check")
        await ctx.sleep(60)
        await ctx.step(log.do, "last")
        return "ended"

    assert await changed(place, old, new) == "ended"
    assert log == ["last"]
    async with place.working(flow(new)) as b:
        run = await b.app.start("w")
        await b.drain()
        await b.skip(seconds=61)
        await b.drain()
        assert await run.result(timeout=5) == "ended"
        assert log == ["last", "check", "last"]


# ---------------------------------------------------------------- divergence


async def test_an_operation_that_is_not_reached_any_more(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.step(log.do, 2, name="b")
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.step(log.do, 2, name="b")
        await ctx.sleep(60)

    found = await changed(place, old, new)
    assert "step 'a'" in found["expected"]
    assert log == [1, 2]


async def test_an_operation_in_front_of_the_others(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.step(log.do, "new", name="new")
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    found = await changed(place, old, new)
    assert "step 'a'" in found["expected"]
    assert "step 'new'" in found["found"]
    assert ".py:" in found["found"]  # the line that the code has come to
    assert log == [1]


async def test_another_kind(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.sleep(0, name="a")
        await ctx.sleep(60)

    assert await changed(place, old, new) == {"expected": "step 'a'", "found": "sleep 'a'"}


async def test_a_wait_of_another_kind(place: Place) -> None:
    async def old(ctx: Context) -> None:
        await ctx.sleep(60, name="a")

    async def new(ctx: Context) -> None:
        await ctx.wait_for_signal("go", name="a")

    found = await changed(place, old, new)
    assert "sleep 'a'" in found["expected"]
    assert "signal 'a'" in found["found"]


async def test_a_result_of_another_type(place: Place) -> None:
    def text() -> str:
        return "x"

    def number() -> int:
        return 5

    async def old(ctx: Context) -> None:
        await ctx.step(text, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.step(number, name="a")
        await ctx.sleep(60)

    assert "the result of step 'a'" in (await changed(place, old, new))["expected"]


async def test_a_body_that_ends_too_soon(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> str:
        return "done"

    found = await changed(place, old, new)
    assert "step 'a'" in found["expected"]
    assert "its end" in found["found"]


async def test_a_branch_less(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.join("j", {"a": lambda c: c.step(log.do, "a"), "b": lambda c: c.sleep(60)})

    async def new(ctx: Context) -> None:
        await ctx.join("j", {"b": lambda c: c.sleep(60)})

    assert "'j/a" in (await changed(place, old, new))["expected"]


async def test_the_winner_is_gone(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.race("r", {"a": lambda c: c.step(log.do, "a"), "b": lambda c: c.sleep(600)})
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.race("r", {"b": lambda c: c.sleep(600)})
        await ctx.sleep(60)

    assert "won by 'a'" in (await changed(place, old, new))["expected"]


async def test_what_comes_after_may_change(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> str:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)
        await ctx.step(log.do, 2, name="b")
        return "old"

    async def new(ctx: Context) -> str:
        await ctx.step(log.do, "never run again", name="a")
        await ctx.sleep(5)
        await ctx.step(log.do, 3, name="c")
        return "new"

    assert await changed(place, old, new) == "new"
    assert log == [1, 3]


async def test_parked_not_looped_and_looked_at_again(place: Place, facts: Facts, log: Log) -> None:
    async def old(ctx: Context) -> str:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)
        return "old"

    async def new(ctx: Context) -> str:
        await ctx.sleep(60)
        return "new"

    async with place.working(flow(old)) as b:
        run = await b.app.start("w")
        await b.drain()
        await b.skip(seconds=61)
    async with place.working(flow(new)) as b:
        run = b.app.get(run.id)
        await b.drain()
        assert await diverged(run)
        revision = facts.run(run)["revision"]
        await b.skip(hours=1)
        await run.signal("whatever")
        await b.drain()
        assert facts.run(run)["revision"] == revision
        assert facts.jobs() == []
        await b.app.retry(run)  # the same code: parked again
        await b.drain()
        assert await diverged(run)
    async with place.working(flow(old)) as b:
        run = b.app.get(run.id)
        await b.drain()
        assert (await run.status()).waiting_for == "person"  # until somebody says so
        await b.app.retry(run)
        await b.drain()
        assert await run.result(timeout=5) == "old"
        assert log == [1]
        assert "failed" not in await told(run)


async def test_cancel_works_on_a_diverged_run(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a", on_cancel=True)  # it has clean-up, which can't be reached any more
        await ctx.sleep(60)

    async def new(ctx: Context) -> None:
        await ctx.sleep(60)

    async with place.working(flow(old)) as b:
        run = await b.app.start("w")
        await b.drain()
        await b.skip(seconds=61)
    async with place.working(flow(new)) as b:
        run = b.app.get(run.id)
        await b.drain()
        assert await diverged(run)
        assert await run.cancel()
        await b.drain()
        assert (await run.status()).status == "canceled"


async def test_divergence_is_not_raised_into_a_body(place: Place, log: Log) -> None:
    async def old(ctx: Context) -> None:
        await ctx.step(log.do, 1, name="a")
        await ctx.sleep(60)

    async def new(ctx: Context) -> str:
        try:
            await ctx.sleep(0, name="a")
        except BaseException as error:
            log.append(type(error).__name__)
            raise
        return "?"

    assert await changed(place, old, new) == {"expected": "step 'a'", "found": "sleep 'a'"}
    assert log in ([1], [1, "GeneratorExit"])


async def test_a_version_that_nobody_knows(place: Place, log: Log) -> None:
    @workflow(name="w", version="2")
    async def second(ctx: Context) -> str:
        return str(await ctx.step(log.do, "two"))

    @workflow(name="w", version="1")
    async def first(ctx: Context) -> str:
        await ctx.sleep(60)
        return str(await ctx.step(log.do, "one"))

    async with place.working(first) as b:
        run = await b.app.start("w")
        await b.drain()
        await b.skip(seconds=61)
    async with place.working(second) as b:
        run = b.app.get(run.id)
        await b.drain()
        assert (await run.status()).waiting_for == "definition"
    async with place.working(first, second) as b:  # side by side; the one defined last is started
        run, newer = b.app.get(run.id), await b.app.start("w")
        await b.drain()
        assert await run.result(timeout=5) == "one"
        assert await newer.result(timeout=5) == "two"


@pytest.mark.parametrize(("id_", "kind"), [("a", "stepp"), ("a", "undo"), ("a/b", "step")])
async def test_what_can_not_be_removed(place: Place, id_: str, kind: str) -> None:
    @workflow
    async def w(ctx: Context) -> None:
        ctx.removed(id_, kind)

    async with place.working(w) as b:
        run = await b.app.start(w)
        await b.drain()
        assert (await run.status()).status == "failed"
