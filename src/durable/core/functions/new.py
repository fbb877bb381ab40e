"""Bodies, put together: what drives a coroutine, and what the coroutine is given."""

from __future__ import annotations

from durable.core.functions.answers import Guarding
from durable.core.functions.body import Body
from durable.core.functions.context import Context
from durable.core.state import Run
from durable.define.nodes import Workflow
from durable.define.registry import Registry


def new_body(
    workflow: Workflow,
    run: Run,
    registry: Registry,
    guard: Guarding | None = None,
    *,
    undoing: bool = False,
) -> Body:
    """The body of `run`, not driven yet. See :class:`Body`."""
    return Body(workflow, run, registry, Context, guard, undoing=undoing)
