"""What a body does to other runs: steps whose handlers are the engine's own, in its own transaction: exactly once."""

from __future__ import annotations

import uuid
from typing import Any

from durable.core.functions.commands import start_id
from durable.define.nodes import Work
from durable.define.payload import Schema


def start(step_id: str, workflow: str, version: str | None, given: Any, key: str | None) -> Work:
    """Start a run of another workflow; its id is the result."""

    async def start_run(ctx: Any) -> uuid.UUID:
        app, connection = _app(ctx), await ctx.async_connection()
        id_ = start_id(ctx.run_id, step_id)
        run = await app.start(workflow, given, version=version, id=None if key else id_, key=key, connection=connection)
        found: uuid.UUID = run.id
        return found

    return Work(start_run, result=Schema(uuid.UUID), transactional=True, timeout=30.0)


def send(step_id: str, run_id: uuid.UUID | str, signal: str, payload: Any) -> Work:
    """Send a signal; whether the run could still take it is the result."""

    async def send_signal(ctx: Any) -> bool:
        app, connection = _app(ctx), await ctx.async_connection()
        sent: bool = await app.signal(run_id, signal, payload, id=f"{ctx.run_id}:{step_id}", connection=connection)
        return sent

    return Work(send_signal, result=Schema(bool), transactional=True, timeout=30.0)


def _app(ctx: Any) -> Any:
    """The asynchronous app that executes the run."""
    return getattr(ctx.app, "async_app", ctx.app)
