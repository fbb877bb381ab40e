"""Function workflows in the model of the core, without a database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.unit.core.model import Sim, World

from durable import workflow
from durable.define.function import WorkflowFunction
from durable.values import Status

NO_TIME: Any = {"retry": 1}
"""Options of a step that has one attempt."""


def of(body: Callable[..., Any], **options: Any) -> WorkflowFunction[Any, Any]:
    """`body` as the workflow ``w``."""
    made: WorkflowFunction[Any, Any] = workflow(name="w", **options)(body)
    return made


def started(body: Callable[..., Any], given: Any = None, *others: Any, **how: Any) -> Sim:
    """A run that has come as far as it can. Decisions are made by bodies that are kept, and by replays."""
    world = World(of(body), *others, **how)
    run = world.start("w", given)
    world.drain()
    return run


def failed(body: Callable[..., Any], given: Any = None, *others: Any) -> str:
    """What a run failed by, at once or after its waits."""
    run = started(body, given, *others)
    run.world.drive()
    assert run.has(Status.FAILED), (run.status, run.waits())
    return run.error


def deploy(run: Sim, body: Callable[..., Any]) -> None:
    """From now on the code of the run is `body`: another worker has it."""
    world = run.world
    for _, kept in world.bodies.values():
        kept.close()
    world.bodies.clear()
    world.registry = World(of(body)).registry


async def give(value: Any = 1) -> Any:
    """A handler."""
    return value


async def fail(value: Any = "no") -> Any:
    raise ValueError(value)
