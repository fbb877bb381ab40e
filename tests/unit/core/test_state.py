"""Runs, changed; entries, written."""

from __future__ import annotations

import uuid
from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable.core.state import Entry, EntryKind, Failure, Run
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


def test_a_written_entry_is_the_same_but_for_its_place() -> None:
    at = RUN.created_at
    entry = Entry(
        "a", EntryKind.STEP, "failed", "1", Failure("E", "no"), 2, at, at + timedelta(1), "up", {"undo": True}
    )
    assert entry.placed(7) == replace(entry, seq=7)
    assert None not in [getattr(entry, field.name) for field in fields(entry)], "each field is told from its default"
    assert entry.seq == 0, "the entry itself is as it was"
