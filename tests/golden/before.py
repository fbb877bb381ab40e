"""Workflows as they were before a change: only to record runs by. Those of today are in `workflows.py`."""

from __future__ import annotations

from typing import Any

from tests.golden.workflows import note

from durable import Break, Context, workflow


@workflow(name="patched")
async def old_patched(ctx: Context) -> Any:
    first = await ctx.step(note, "first")
    await ctx.step(note, "obsolete", name="obsolete")

    async def turn(c: Context, state: int) -> Any:
        value = await c.step(note, state)
        return Break(value) if state == 2 else state + 1

    await ctx.loop("turns", turn, 0)
    last = await ctx.wait_for_signal("go")
    return [first, last]
