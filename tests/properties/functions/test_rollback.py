"""What was done and can be undone is undone: once, newest first, and when it must be, whenever a worker dies."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.properties.functions.interpreter import LOG
from tests.properties.functions.playing import MANY, Chance, Record, for_programs
from tests.properties.functions.programs import Program
from tests.properties.functions.world import play, played
from tests.unit.core.model import Sim, World

from durable.core.state import EntryKind
from durable.values import Status

UNDOES = frozenset({"rolled back", "its parent failed"})
"""Why a canceled run undoes what it did."""


@pytest.mark.parametrize("many", MANY)
def test_every_finished_step_is_undone_once_newest_first(many: int, record_property: Record) -> None:
    for_programs(many, undoes, record_property, ends=("raise", "rollback"))


def undoes(program: Program, chance: Chance) -> None:
    plain = played(program, doubts=False)
    check_undone(plain.world)
    called = [(run, step) for run, step, _ in LOG.undone]
    assert called == in_order(plain.world), "compensators run in the order that the journal tells, each once"
    for world in chance.some(plain.points):
        before = Counter(in_order(world))
        LOG.clear()
        world.die()
        play(world, until=plain.passes)
        if not plain.passes(world):
            check_undone(world)
        called = [(run, step) for run, step, _ in LOG.undone]
        assert Counter(called) == Counter(in_order(world)) - before, "what is recorded as undone is not undone again"


def check_undone(world: World) -> None:
    """That exactly what must be undone is; the model checks that it was newest first."""
    for sim in world.runs.values():
        spans = went_back(sim)
        for step in can_be_undone(sim):
            seq = sim.journal[step].seq
            wanted = rolls_back(sim) or any(checkpoint < seq < rollback for checkpoint, rollback in spans)
            assert (f"undo:{step}" in sim.journal) == wanted, (step, sim.status)


def rolls_back(sim: Sim) -> bool:
    return sim.status is Status.FAILED or (sim.status is Status.CANCELED and sim.run.reason in UNDOES)


def can_be_undone(sim: Sim) -> list[str]:
    """All that was ever recorded with a compensator: of that nothing leaves the journal."""
    written = [entry for transition in sim.transitions for entry in transition.entries]
    return [entry.step_id for entry in written if entry.status == "completed" and (entry.extra or {}).get("undo")]


def went_back(sim: Sim) -> list[tuple[int, int]]:
    """From which entry to which the run went back."""
    rollbacks = [(e.extra or {}, e.seq) for e in sim.journal.values() if e.kind is EntryKind.ROLLBACK]
    return [(sim.journal[extra["to"]].seq, seq) for extra, seq in rollbacks if extra["to"] in sim.journal]


def in_order(world: World) -> list[tuple[object, str]]:
    """The steps that the journals say are undone, as they were written."""
    found = [(e.seq, sim.id, key) for sim in world.runs.values() for key, e in sim.journal.items() if _undo(sim, key)]
    return [(run, key.removeprefix("undo:")) for _, run, key in sorted(found)]


def _undo(sim: Sim, key: str) -> bool:
    """Whether this is a compensator's entry; a child undoes itself."""
    undone = sim.journal.get(key.removeprefix("undo:"))
    return key.startswith("undo:") and undone is not None and undone.kind is EntryKind.STEP
