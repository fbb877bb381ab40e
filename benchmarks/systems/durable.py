"""durable, with workflows that are lists of nodes."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from benchmarks.systems import _durable
from benchmarks.systems._durable import DEFAULTS, Kind, due_in, hang_once, nothing, woke
from durable import StepContext, define
from durable.define.builder import Builder

SETTINGS: Final = f"builder workflows, {DEFAULTS}"


async def _step(ctx: StepContext[dict[str, Any]]) -> dict[str, str]:
    return await nothing()


async def _mark(ctx: StepContext[dict[str, Any]]) -> datetime:
    return await due_in(ctx.input["seconds"])


def _due(ctx: StepContext[dict[str, Any]]) -> datetime:
    due: datetime = ctx.results["mark"]
    return due


async def _woke(ctx: StepContext[dict[str, Any]]) -> None:
    await woke(_due(ctx))


async def _hang(ctx: StepContext[dict[str, Any]]) -> None:
    await hang_once(ctx.input["marker"])


def steps(count: int) -> Builder[dict[str, Any]]:
    """The workflow of so many steps."""
    workflow = define(f"steps_{count}", input=dict[str, Any])
    for number in range(count):
        workflow = workflow.step(f"s{number}", _step)
    return workflow


KIND: Final = Kind(
    module="benchmarks.systems.durable",
    steps=steps,
    waiting=define("waiting", input=dict[str, Any]).wait_for_signal("went", "go"),
    napping=define("napping", input=dict[str, Any]).step("mark", _mark).sleep("nap", _due).step("woke", _woke),
    hanging=define("hanging", input=dict[str, Any]).step("hang", _hang),
)
CASES: Final = KIND.cases()
versions = _durable.versions

if __name__ == "__main__":
    KIND.main()
