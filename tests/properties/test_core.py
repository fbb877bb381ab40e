"""What holds of the core for any workflow, any outcomes, and whatever crashes or is asked at any point.

Most invariants are checked by the model at every write (`tests/unit/core/model.py`): moves are legal, each raises the
revision by one, the cursor counts the nodes passed, entries are written once, what is undone is undone once and newest
first, a parked run says for what, an ended one has nothing pending, a continuation is enqueued exactly when the run can
go on, the same question has the same answer, no wake-up is lost and nothing is due for ever.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from tests.unit.core.model import Sim, World

from durable import errors
from durable.define.builder import Builder, define
from durable.define.options import branch, step
from durable.define.retry import Retry
from durable.values import Status, Suspend, WaitingFor

OUTCOMES: Final = ("ok", "ok", "ok", "flaky", "dies twice", "suspends", "fatal", "exhausted", "asks a person")
ANY_SHAPE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@dataclass
class Script:
    """What the handlers of one example do, by step id. Deterministic: it depends on attempt and snapshot alone."""

    outcomes: dict[str, str] = field(default_factory=dict)
    began: Counter[str] = field(default_factory=Counter)
    undone: list[str] = field(default_factory=list)
    during: dict[str, Callable[[], Any]] = field(default_factory=dict)  # what is asked while a step runs

    def __call__(self, ctx: Any) -> Any:
        key = ctx.step_id
        self.began[key] += 1
        if (ask := self.during.pop(key, None)) is not None:
            ask()
        match self.outcomes.get(key.partition("[")[0], "ok"):
            case "flaky" if ctx.attempt < 3:
                raise ValueError(f"{key} {ctx.attempt}")
            case "suspends" if ctx.snapshot is None and ctx.iteration is None:
                return Suspend({"at": key})
            case "fatal":
                raise errors.NonRetryable(key)
            case "exhausted" | "asks a person":
                raise ValueError(key)
        return {"step": key, "attempt": ctx.attempt, "item": ctx.item, "resumed": ctx.resume_data}

    def undo(self, ctx: Any) -> None:
        if ctx.attempt == 1 and self.outcomes.get("undo") == "flaky":
            raise ValueError("busy")
        if self.outcomes.get("undo") == "fatal":
            raise errors.NonRetryable("stuck")
        self.undone.append(ctx.step_id.removeprefix("undo:"))


def works(draw: st.DrawFn, script: Script, *keys: str) -> dict[str, Any]:
    """Options of one piece of work, and what it does."""
    outcome = draw(st.sampled_from(OUTCOMES))
    script.outcomes |= dict.fromkeys(keys, outcome)
    on_exhausted: Any = "pause" if outcome == "asks a person" else "fail"
    options: dict[str, Any] = {"retry": Retry(max_attempts=3, jitter=False, on_exhausted=on_exhausted)}
    if draw(st.booleans()):
        options["compensate"] = script.undo
    if draw(st.integers(0, 4)) == 0:
        options["transactional"] = False
    return options


def add_node(draw: st.DrawFn, flow: Builder[Any], script: Script, name: str, depth: int) -> None:
    kinds = ["step", "step", "parallel", "route", "loop", "sleep", "signal", "child" if depth else "step"]
    match draw(st.sampled_from(kinds)):
        case "step":
            flow.step(name, script, **works(draw, script, name))
        case "parallel":
            names = "xyz"[: draw(st.integers(1, 3))]
            flow.parallel(name, {b: branch(script, **works(draw, script, f"{name}/{b}")) for b in names})
        case "route":
            chosen = draw(st.sampled_from(["x", "y", "y", "nowhere"]))
            select = step(retry=1)(lambda ctx: chosen)
            flow.route(name, select, {b: branch(script, **works(draw, script, f"{name}/{b}")) for b in "xy"})
        case "loop":
            times = draw(st.integers(0, 3))
            conditions: list[dict[str, Any]] = [
                {"max_iterations": times},
                {"until": lambda result, i: i + 1 >= times, "max_iterations": draw(st.integers(0, 4))},
                {"while_": lambda ctx, i: i < times, "max_iterations": draw(st.integers(0, 4))},
            ]
            condition = draw(st.sampled_from(conditions))
            if draw(st.booleans()):
                condition["feedback"] = lambda result: {"fed": result["attempt"]}
            keep: Any = draw(st.sampled_from(["all", "last"]))
            flow.loop(name, script, keep=keep, **condition, **works(draw, script, name))
        case "sleep":
            seconds = draw(st.integers(-5, 50))
            flow.sleep(name, lambda ctx: seconds) if seconds < 0 or draw(st.booleans()) else flow.sleep(name, seconds)
        case "signal":
            signal: Any = f"go.{name}" if draw(st.booleans()) else lambda ctx: f"go.{name}"
            limits: list[dict[str, Any]] = [{}, {"timeout": 30}, {"timeout": 30, "on_timeout": "late"}]
            flow.wait_for_signal(name, signal, **draw(st.sampled_from(limits)))
        case "child":
            kid = a_workflow(draw, script, f"{flow.name}-{name}", depth - 1)
            target: Any = kid.name if draw(st.booleans()) else lambda ctx: kid
            flow.child_workflow(name, target, map_input=lambda ctx: {"from": name}, compensate=draw(st.booleans()))


def a_workflow(draw: st.DrawFn, script: Script, name: str, depth: int) -> Builder[Any]:
    result: Any = script if draw(st.integers(0, 3)) == 0 else None
    flow = define(name, result=result)
    for n in range(draw(st.integers(1, 4))):
        add_node(draw, flow, script, f"{name}.{n}", depth)
    KNOWN[name] = flow
    return flow


KNOWN: dict[str, Builder[Any]] = {}


@dataclass
class Case:
    """An example: its definition can be run again and again, in worlds of its own."""

    flows: list[Builder[Any]]
    outcomes: dict[str, str]
    script: Script
    timeout: int | None

    def world(self) -> tuple[World, Sim]:
        script = self.script
        script.began.clear()
        script.undone.clear()
        script.during.clear()
        world = World(*self.flows)
        return world, world.start("w", {"n": 1}, timeout=self.timeout)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    KNOWN.clear()
    script = Script()
    a_workflow(draw, script, "w", 1)
    script.outcomes["undo"] = draw(st.sampled_from(["ok", "ok", "flaky", "fatal"]))
    return Case(list(KNOWN.values()), script.outcomes, script, draw(st.sampled_from([None, None, None, 40])))


def play(world: World) -> None:
    """To the end of all runs: time passes, and whatever waits for a person's answer gets one."""
    for _ in range(200):
        world.drain()
        if sum(_answer(sim) for sim in list(world.runs.values())):
            continue
        if not _pass_time(world):
            return
    raise AssertionError("it does not end")


def _answer(sim: Sim) -> bool:
    run = sim.run
    if run.status is Status.PAUSED:
        if run.error is not None:  # out of attempts: it would be again
            return sim.cancel("given up", compensate=True)
        return sim.resume()
    names = {b.name for b in run.frame.values() if b.waits in (WaitingFor.RESUME, WaitingFor.SIGNAL)}
    return sum(sim.resume(name, "answer") for name in sorted(filter(None, names))) > 0


def _pass_time(world: World) -> bool:
    wakes = [sim.run.wake_at for sim in world.runs.values() if sim.run.wake_at and sim.status is not Status.PAUSED]
    world.now = max([world.now, *sorted(wakes)[:1]])
    return bool(wakes)


def journal(world: World) -> dict[uuid.UUID, Any]:
    """What was recorded, without times, and without the order of branches that ran side by side."""
    return {
        sim.id: (
            sim.status,
            sim.run.current_step,
            {k: (e.kind, e.status, e.result, e.attempt, e.error and e.error.type) for k, e in sim.journal.items()},
        )
        for sim in world.runs.values()
    }


def check_end(world: World, script: Script) -> None:
    for sim in world.runs.values():
        assert sim.status.ended
        event(f"{sim.status}")
        undone = [key for key in sim.journal if key.startswith("undo:")]
        assert len(undone) == len(set(undone))
        if sim.status is Status.COMPLETED:
            assert sim.run.error is None
        if sim.status is Status.FAILED:
            assert sim.run.error is not None
    done = [key for sim in world.runs.values() for key in sim.journal if sim.journal[key].status == "completed"]
    everywhere = [key.removeprefix("undo:") for key in done if key.startswith("undo:")]
    own = Counter(key for key in everywhere if key not in _child_steps(world))
    assert own == Counter(script.undone), "each compensator that is journaled ran, and no other twice"


def _child_steps(world: World) -> set[str]:
    return {sim.run.parent_step for sim in world.runs.values() if sim.run.parent_step}


@ANY_SHAPE
@given(cases())
def test_any_workflow_comes_to_its_end(case: Case) -> None:
    world, _ = case.world()
    play(world)
    check_end(world, case.script)


@ANY_SHAPE
@given(cases(), st.data())
def test_any_crash_leaves_the_journal_as_it_would_have_been(case: Case, data: st.DataObject) -> None:
    assume("asks a person" not in case.outcomes.values())  # what its siblings come to then depends on the time
    case.timeout = None  # takeovers that back off cost time, and time is what a deadline is about
    plain, _ = case.world()
    play(plain)
    crashed, run = case.world()
    crashed.limits = type(crashed.limits)(max_crashes=1_000)
    crashed.crash_at = data.draw(st.sets(st.integers(1, plain.points + 1), min_size=1, max_size=4))
    play(crashed)
    event(f"{crashed.crashes} crashes")
    signals = any(e.kind == "signal" for sim in plain.runs.values() for e in sim.journal.values())
    if not signals or crashed.crashes == 0:  # how long a takeover backs off may decide over a timeout
        assert journal(crashed) == journal(plain)
    assert run.status.ended
    for sim in crashed.runs.values():
        for key, entry in sim.journal.items():
            assert entry.attempt == 1 or case.outcomes.get(key.partition("[")[0]) != "ok"


def _ask_all(run: Sim, asked: list[Callable[[Sim], Any]]) -> None:
    for ask in asked:
        ask(run)


REQUESTS: Final[tuple[Callable[[Sim], Any], ...]] = (
    lambda run: run.pause(),
    lambda run: run.resume(),
    lambda run: run.cancel("asked"),
    lambda run: run.cancel("asked", compensate=True),
    lambda run: run.signal("noise"),
    lambda run: run.retry(),
)


@ANY_SHAPE
@given(cases(), st.data())
def test_whatever_is_asked_at_any_time_every_run_ends_well(case: Case, data: st.DataObject) -> None:
    """Requests between any two jobs and during any step, by message or at once, and crashes among them."""
    world, run = case.world()
    world.interrupts = data.draw(st.booleans())
    world.limits = type(world.limits)(max_crashes=data.draw(st.sampled_from([2, 5, 1_000])))
    world.order = lambda flights: len(flights) // 2
    world.crash_at = data.draw(st.sets(st.integers(1, 40), max_size=3))
    for key in data.draw(st.sets(st.sampled_from(sorted(case.outcomes)), max_size=2)):
        asked = data.draw(st.lists(st.sampled_from(REQUESTS[:5]), min_size=1, max_size=2))
        case.script.during[key] = partial(_ask_all, run, asked)
    for _ in range(data.draw(st.integers(0, 6))):
        world.drain(jobs=data.draw(st.integers(0, 6)))
        sim = data.draw(st.sampled_from(list(world.runs.values())))
        sim.busy = data.draw(st.booleans())
        ask = data.draw(st.sampled_from(REQUESTS[:5] if sim.busy else REQUESTS))
        ask(sim)
        sim.busy = False
        match data.draw(st.integers(0, 5)):
            case 0:
                _pass_time(world)
            case 1:
                world.lose_jobs()
    play(world)
    for sim in world.runs.values():
        assert sim.status.ended
    undone = Counter(case.script.undone)
    if not world.crashes:
        assert all(count == 1 for count in undone.values()), "no compensator runs twice"


@ANY_SHAPE
@given(cases(), st.integers(1, 60))
def test_no_crash_makes_a_finished_step_run_again(case: Case, point: int) -> None:
    world, _ = case.world()
    play(world)
    plain = dict(case.script.began)
    world, _ = case.world()
    world.crash_at = {point}
    play(world)
    more = sum((case.script.began - Counter(plain)).values())
    running = max((len(t.attempts) for sim in world.runs.values() for t in sim.transitions), default=0)
    assert more <= max(running, 1), "only what was running when the worker died"
