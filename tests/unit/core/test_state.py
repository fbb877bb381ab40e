"""Runs, changed."""

from __future__ import annotations

import uuid
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from durable.core.state import Run
from durable.values import Status, WaitingFor

RUN = Run(uuid.UUID(int=1), "w", "1", Status.PENDING, 0, 0, "null", "default", datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    "change", [{}, {"status": Status.RUNNING, "revision": 1}, {"waiting_for": WaitingFor.SLEEP}, {"tags": {"a": 1}}]
)
def test_a_changed_run_is_what_replace_makes_of_it(change: dict[str, Any]) -> None:
    before = replace(RUN)
    assert RUN.changed(**change) == replace(RUN, **change)
    assert before == RUN, "the run itself is as it was"
    assert vars(RUN.changed(**change)).keys() == {field.name for field in fields(Run)}


def test_only_fields_can_be_changed() -> None:
    with pytest.raises(TypeError, match="no fields of a run: colour"):
        RUN.changed(colour="red")
    with pytest.raises(FrozenInstanceError):
        RUN.changed(revision=1).revision = 2  # type: ignore[misc]
