"""Programs played in the model of `tests/unit/core/model.py`: to their end, from any point at which a worker died.

Whoever sends messages to a program looks at what it waits for, once nothing moves any more, and at nothing else: so a
run that crashed is sent what the other one is sent.
"""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tests.properties.functions.interpreter import name_of, program
from tests.properties.functions.programs import Program, every
from tests.unit.core.model import Job, Sim, World

from durable.core.state import Begun, Entry, EntryKind, Failure
from durable.values import Status, WaitingFor

LIMIT: Final = 5_000
"""Jobs, messages and moves of the clock after which a program is said not to end."""
MANY: Final = 3
"""How many messages are sent for one that is to be received."""
SENT_AT: Final = re.compile(r'"sent_at": "[^"]*", ')
RESUMED: Final = {"by": "a person"}


def begin(given: Program, *, id: uuid.UUID | None = None, **how: Any) -> tuple[World, Sim]:  # noqa: A002
    """A world in which a program has been started, and been sent what it is sent before it asks."""
    world = World(program, **how)
    run = world.start(program, given, id=id)
    for name, body, message in sent_before(given):
        run.signal(name, body, id=message)
    return world, run


def sent_before(given: Program) -> Iterator[tuple[str, Any, str]]:
    """Name, body and id of the messages that a program is sent before it asks for them."""
    for _, op in every(given.ops):
        if op.how == "before":
            yield from messages(name_of(op), many=MANY if op.do == "receive" else 1, since=0)


def messages(name: str, *, many: int, since: int) -> Iterator[tuple[str, Any, str]]:
    """So many; `since`: how many of that name the run has been sent before."""
    for n in range(many):
        yield name, {"of": name, "n": n}, f"{name}:{since + n}"


def answers(begun: Begun, known: Collection[str]) -> list[tuple[str, Any, str]]:
    """What is sent to a run that waits so, if it is meant to be sent anything. `known`: the ids that it has been sent.
    How many of other names there are depends on who was faster, and must not show."""
    names = begun.names or (begun.name or "",)
    if begun.waits is not WaitingFor.SIGNAL or not names[0].startswith(("before.", "after.", "complete.")):
        return []
    since = sum(message.startswith(f"{names[0]}:") for message in known)
    return list(messages(names[0], many=MANY if begun.names is not None else 1, since=since))


def never(world: World) -> bool:
    return False


def play(world: World, *, until: Callable[[World], bool] = never) -> None:
    """To the end of all runs, or `until` something is the case between two jobs."""
    for _ in range(LIMIT):
        if until(world):
            return
        if world.jobs:
            world._work(world.jobs.pop(world.pick(world.jobs)))
            continue
        world.check_rest()
        if not _answer(world) and not _pass_time(world):
            return check_ended(world)
    raise AssertionError("it does not end")


def check_ended(world: World) -> None:
    for sim in world.runs.values():
        assert sim.status.ended, (sim.status, sim.waits(), sim.run.error, sim.run.frame)


def _answer(world: World) -> bool:
    """Send what is waited for, unless nobody is meant to."""
    asked = [(sim, begun) for sim in world.runs.values() for begun in _waits(sim)]
    return sum(_reply(sim, begun) for sim, begun in asked) > 0


def _waits(sim: Sim) -> Iterator[Begun]:
    if sim.status in (Status.SUSPENDED, Status.RUNNING):
        yield from list(sim.run.frame.values())


def _reply(sim: Sim, begun: Begun) -> bool:
    if begun.waits is WaitingFor.RESUME:
        return sim.resume(begun.name, RESUMED)
    sent = answers(begun, sim.message_ids)
    for name, body, message in sent:
        sim.signal(name, body, id=message)
    return bool(sent)


def _pass_time(world: World) -> bool:
    wakes = [sim.run.wake_at for sim in world.runs.values() if sim.run.wake_at is not None]
    if not wakes:
        return False
    world.now = max(world.now, min(wakes))
    world.put_back_due()
    return True


# ---------------------------------------------------------------- crashes


@dataclass
class Played:
    """A program that was played to its end. `points`: its world as it stood at each point at which a worker could have
    died; `states`: what it went through from job to job, by a part of it that is found fast."""

    world: World
    run: Sim
    points: list[World] = field(default_factory=list)
    states: dict[Any, list[Any]] = field(default_factory=dict)
    _written: Any = None

    def passes(self, world: World) -> bool:
        """Whether `world` stands where this one has stood: then it comes to the same, for what a run does next depends
        on nothing else."""
        return state(world) in self.states.get(_size(world), ())

    def at_point(self) -> None:
        """Wherever nothing was written since the last point, the worker that dies leaves the same behind."""
        written = self.world.seq, self.world.job, sum(sim.run.revision for sim in self.world.runs.values())
        if written != self._written:
            self._written = written
            self.points.append(copied(self.world))

    def note(self, world: World) -> bool:
        self.states.setdefault(_size(world), []).append(state(world))
        return False


def played(given: Program, *, doubts: bool = True) -> Played:
    """Play a program without a crash. `doubts`: each decision is also made by a replay."""
    world, run = begin(given)
    world.doubts = doubts
    noted = Played(world, run)
    world.at_point = noted.at_point
    play(world, until=noted.note)
    world.at_point = None
    return noted


def copied(world: World) -> World:
    """Another world that stands where `world` stands. What is in the worker's memory is not copied."""
    other = copy.copy(world)
    other.jobs, other.outgoing, other.effects, other.held, other.bodies = [*world.jobs], [*world.outgoing], [], [], {}
    other.journals = {}
    other.at_point, other.doubts = None, False
    other.runs = {}
    for id_, sim in world.runs.items():
        twin = copy.copy(sim)
        twin.world, twin.journal, twin.inbox = other, dict(sim.journal), [*sim.inbox]
        twin.taken, twin.replies = dict(sim.taken), dict(sim.replies)
        twin.attempts, twin.transitions = [*sim.attempts], [*sim.transitions]
        twin.message_ids = set(sim.message_ids)
        other.runs[id_] = twin
    return other


# ---------------------------------------------------------------- what is compared


def journals(world: World) -> dict[uuid.UUID, Any]:
    """What was recorded of all runs, without times and the order of writing."""
    return {sim.id: _recorded(sim) for sim in world.runs.values()}


def _recorded(sim: Sim) -> Any:
    error = sim.run.error
    about = (error.type, error.message) if error is not None else None
    return recorded(sim.status, about, sim.run.successor, sim.journal)


def recorded(
    status: str, error: tuple[str, str] | None, successor: uuid.UUID | None, journal: Mapping[str, Entry]
) -> Any:
    """What is compared of a run. Not the markers of retries: whether there is one, and from where on, depends on what
    was written between the failure and the retry, and so on the order of writing."""
    entries = {key: told(entry) for key, entry in journal.items() if not key.startswith("patch:retry:")}
    return str(status), error, successor, entries


def told(entry: Entry) -> Any:
    """An entry, without its times."""
    extra = {name: what for name, what in (entry.extra or {}).items() if name not in ("messages", "message")}
    result = SENT_AT.sub("", entry.result) if entry.kind is EntryKind.RECEIVE and entry.result else entry.result
    return entry.kind, entry.status, result, _error(entry.error), entry.attempt, entry.parent, extra


def _error(failure: Failure | None) -> Any:
    return None if failure is None else (failure.type, failure.message, failure.kind, failure.step, failure.attempts)


def state(world: World) -> Any:
    """All that the future of a world depends on, between two jobs."""
    runs = [(_without_revision(sim), dict(sim.journal), list(sim.inbox)) for sim in world.runs.values()]
    return world.now, [(job.run_id, job.kind) for job in world.jobs if _is_of_use(world, job)], runs


def _size(world: World) -> Any:
    return world.now, len(world.runs), sum(len(sim.journal) for sim in world.runs.values())


def _without_revision(sim: Sim) -> Any:
    names = [name for name in sim.run.__dataclass_fields__ if name not in ("revision", "claim")]
    return [getattr(sim.run, name) for name in names]


def _is_of_use(world: World, job: Job) -> bool:
    return job.revision in (None, world.runs[job.run_id].run.revision)
