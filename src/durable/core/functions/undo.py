"""How a body's steps are undone: only the body knows, so it is driven through its whole journal once more.

Nothing moves by that: no operation is begun, no iteration counted, no entry derived.
"""

from __future__ import annotations

from datetime import datetime

from durable.core.functions.new import new_body
from durable.core.functions.plan import with_body
from durable.core.state import Failure, View
from durable.define.nodes import Work


def step_undone_by(view: View, step_id: str, now: datetime) -> Work | Failure:
    """The work of a finished step, with its compensator; or how journal and code differ."""
    body = with_body(view).body
    assert body is not None
    if body.passed is None:
        past = new_body(body.workflow, view.run, view.registry, body.guard, undoing=True)
        try:
            frontier = past.drive(view, now)
        finally:
            past.close()
        if frontier.diverged is not None:
            return frontier.diverged
        body.passed = past.works
    work = body.passed.get(step_id)
    if work is None or work.compensate is None:
        return body.difference(f"step {step_id!r}, which is to be undone", "no such step with a compensator")
    return work
