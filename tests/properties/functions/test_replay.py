"""What is recorded of a program does not depend on when workers died, what they kept in memory, and who is faster.

Each property plays hundreds of programs, thousands with ``-m soak``, in the model of the core (`world.py`). That checks
much by itself: that a body which was kept decides what a replay decides, that no wake-up is lost, that each write is
one that the database takes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.properties.functions.interpreter import LOG
from tests.properties.functions.playing import MANY, Chance, Record, for_programs
from tests.properties.functions.programs import Program
from tests.properties.functions.world import begin, journals, never, play, played, told
from tests.unit.core.model import Sim

from durable.core.functions.answers import Raised, Returned
from durable.core.functions.body import Body
from durable.core.functions.context import Context
from durable.core.functions.errors import failure
from durable.core.state import Entry
from durable.values import ContinueAsNew, Status


@pytest.mark.parametrize("many", MANY)
def test_a_crash_at_any_point_leaves_the_journal_as_it_would_have_been(many: int, record_property: Record) -> None:
    for_programs(many, crashes_anywhere, record_property, decided=True)


def crashes_anywhere(program: Program, chance: Chance) -> None:
    plain = played(program)
    expected = journals(plain.world)
    points = chance.some(plain.points)
    to_the_end = chance.random.choice(points)  # the others, until they stand where the one without a crash has stood
    for world in points:
        world.die()
        play(world, until=never if world is to_the_end else plain.passes)
        assert plain.passes(world) or journals(world) == expected


@pytest.mark.parametrize("many", MANY)
def test_a_finished_run_is_replayed_by_its_journal_alone(many: int, record_property: Record) -> None:
    for_programs(many, replays, record_property)


def replays(program: Program, chance: Chance) -> None:
    world, _ = begin(program)
    world.doubts = False
    play(world)
    called = len(LOG.called)
    for sim in world.runs.values():
        if not was_canceled(sim):
            replay(sim)
    assert len(LOG.called) == called


def replay(sim: Sim) -> None:
    """Drive a new body through the journal of a run that has ended: it comes to the same end, and what it derives
    stands there already."""
    derived: list[Entry] = []

    class Noting(Body):
        def derive(self, entry: Entry) -> None:
            derived.append(entry)
            super().derive(entry)

    view = sim.view
    assert view.workflow is not None
    body = Noting(view.workflow, sim.run, view.registry, Context)
    frontier = body.drive(view, sim.world.now)
    assert frontier.diverged is None
    assert not frontier.leaves
    assert not body.unwritten
    for entry in derived:
        stands = sim.journal[entry.step_id]
        assert told(replace(stands, attempt=1)) == told(entry)  # a block's attempts are known while it is tried
    match frontier.ended:
        case Returned(value):
            assert sim.status is Status.COMPLETED
            assert sim.journal["run:result"].result == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        case Raised(ContinueAsNew()):
            assert sim.run.successor is not None
        case Raised(error):
            assert sim.status is not Status.COMPLETED
            assert sim.run.error is not None
            assert failure(error).message == sim.run.error.message
        case None:
            raise AssertionError("it has not ended")
    body.close()


def was_canceled(sim: Sim) -> bool:
    """Whether it ended by a cancel, which no replay comes to."""
    return sim.status is Status.CANCELED


@pytest.mark.parametrize("many", MANY)
def test_nothing_depends_on_who_is_faster(many: int, record_property: Record) -> None:
    """Branches end, and jobs are taken up, in any order; each decision is made by a replay."""
    for_programs(many, any_order, record_property, decided=True)


def any_order(program: Program, chance: Chance) -> None:
    plain, _ = begin(program)
    plain.doubts = False
    play(plain)
    other, _ = begin(program, keeps=False, order=chance.pick, pick=chance.pick)
    other.doubts = False
    play(other)
    assert journals(other) == journals(plain)
