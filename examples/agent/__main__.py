"""Ask the agent, and decide what it may do. Run it from the root of the repository:

python -m examples.agent "I was charged twice for R-17"

Kill it whenever you like, and start it again: the same question is the same run, which goes on where it was.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable

import psycopg
from examples.agent.agent import TABLES, Decision, agent
from examples.agent.app import app

from durable import AsyncRun, StepSnapshot


async def main(question: str) -> None:
    async with app:
        await app.migrate()
        with psycopg.connect(app.store.dsn) as connection:
            connection.execute(TABLES)
        async with app.worker():
            run = await app.start(agent, question, key=question)
            print(f"run {run.id}", flush=True)
            await decide(run)
            print(await run.result())


async def decide(run: AsyncRun[str]) -> None:
    """Until it has ended: ask on the terminal whatever the agent may not do alone."""
    async for status in run.watch():
        if status.derived == "waiting_for_resume" and status.waiting_name is not None:
            call = snapshot_of(status.waiting_name, status.steps)
            answer = await asyncio.to_thread(input, f"May I call {call}? [y/n] ")
            decision = Decision(approved=answer.strip().lower().startswith("y"), by="you")
            await run.resume(status.waiting_name, decision.model_dump())


def snapshot_of(step_id: str, steps: Iterable[StepSnapshot]) -> object:
    """What a suspended step has left, wherever it is in the tree of steps."""
    for step in steps:
        if step.step_id == step_id:
            return step.snapshot
        if found := snapshot_of(step_id, step.children):
            return found
    return None


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "I was charged twice for R-17"))
