"""Where a harness's worker dies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from durable.core.transition import Transition
from durable.engine.points import Point
from durable.logs import here

When: TypeAlias = Literal["before_handler", "after_handler", "before_commit", "after_commit"]

WHEN: Final[dict[When, Point]] = {
    "before_handler": Point.BEFORE_HANDLER,
    "after_handler": Point.AFTER_HANDLER,
    "before_commit": Point.BEFORE_COMMIT,
    "after_commit": Point.AFTER_COMMIT,
}


@dataclass
class Crash:
    """The worker dies once, at an instant of one step."""

    step: str
    at: Point
    handled: bool = False  # its handler has ended; what it led to is not committed

    def strikes(self, point: Point, written: Transition | None) -> bool:
        """Whether this is the instant. `written`: the last transition that was."""
        if point is Point.AFTER_HANDLER and here().get("step") == self.step:
            self.handled = True
        if point is not self.at:
            return False
        match point:
            case Point.BEFORE_COMMIT:
                return self.handled
            case Point.AFTER_COMMIT:
                return written is not None and self.step in _steps(written)
            case _:
                return here().get("step") == self.step

    def __str__(self) -> str:
        return f"crash_at({self.step!r}, when={self.at.value!r})"


def _steps(written: Transition) -> set[str]:
    """The steps of which it says how they, or attempts at them, have ended."""
    return {entry.step_id for entry in written.entries} | {attempt.step_id for attempt in written.attempts}
