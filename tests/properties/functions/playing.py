"""Properties: so many programs, each checked, and what they were made of told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.properties.functions.interpreter import LOG
from tests.properties.functions.programs import Program, Seen, programs

T = TypeVar("T")
Record = Callable[[str, object], None]

ENDS: Final = ("return", "return", "return", "raise", "rollback", "again")
EVERY_DAY: Final = 200
MANY: Final = [
    pytest.param(EVERY_DAY, id="200 programs"),
    pytest.param(5_000, id="5000 programs", marks=pytest.mark.soak),
]
POINTS: Final = 3
"""At how many of its points a program is crashed every day."""


@dataclass(frozen=True)
class Chance:
    """Chance, drawn by hypothesis. `most`: how many points of a program are looked at; None: all."""

    random: Random
    most: int | None = None

    def some(self, points: Sequence[T]) -> list[T]:
        """Points evenly spread, beginning anywhere."""
        step = 1 if self.most is None else -(-len(points) // self.most)
        return list(points[self.random.randrange(step) :: step])

    def pick(self, waiting: Sequence[object]) -> int:
        return self.random.randrange(len(waiting))


def for_programs(
    many: int, check: Callable[[Program, Chance], None], record: Record, *, ends: tuple[str, ...] = ENDS, **kinds: Any
) -> None:
    """Check so many programs."""
    seen = Seen()

    @settings(max_examples=many, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(ends=ends, **kinds), st.randoms(use_true_random=False))
    def checked(program: Program, random: Random) -> None:
        seen.add(program)
        LOG.clear()
        check(program, Chance(random, POINTS if many == EVERY_DAY else None))

    checked()
    for line in seen.tell(check.__name__):
        record("measured", line)
