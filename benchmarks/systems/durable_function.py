"""durable, with workflows that are async functions."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.systems import _durable
from benchmarks.systems._durable import DEFAULTS, Kind, due_in, hang_once, nothing, woke
from durable import Context, workflow
from durable.define.registry import AnyWorkflow

SETTINGS: Final = f"async functions, {DEFAULTS}"


@workflow
async def stepping(ctx: Context, given: dict[str, Any]) -> int:
    """So many steps, one after the other."""
    count: int = given["steps"]
    for _ in range(count):
        await ctx.step(nothing)
    return count


@workflow
async def waiting(ctx: Context, given: dict[str, Any]) -> Any:
    """Until somebody sends the signal."""
    return await ctx.wait_for_signal("go")


@workflow
async def napping(ctx: Context, given: dict[str, Any]) -> None:
    """A sleep of so many seconds."""
    due = await ctx.step(due_in, given["seconds"])
    await ctx.sleep_until(due)
    await ctx.step(woke, due)


@workflow
async def hanging(ctx: Context, given: dict[str, Any]) -> None:
    """A step that ends in the second process only."""
    await ctx.step(hang_once, given["marker"])


def steps(count: int) -> AnyWorkflow:
    """The one workflow: how many steps it has is its input."""
    return stepping


KIND: Final = Kind("benchmarks.systems.durable_function", steps, waiting, napping, hanging)
CASES: Final = KIND.cases()
versions = _durable.versions

if __name__ == "__main__":
    KIND.main()
