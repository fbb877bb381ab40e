"""Where the time of a step goes: runs of ten steps under cProfile, summed up by who wrote the code.

python -m benchmarks.profile --dsn DSN --size full|quick

CPU time of the worker's thread: waiting is not in it, nor what other processes do meanwhile. What is built in is
charged to its maker where its name says it, else to whoever called it. The profiler does not see into psycopg's
compiled part: its time stands in the functions that call it, and the one file of durable that calls libpq itself is
counted with psycopg. Python calls become dearer than what is compiled: the shares are a guide, no measurement.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from benchmarks import beside
from benchmarks.cases import Size
from benchmarks.figures import table
from benchmarks.load import Load
from benchmarks.systems._durable import until_done
from benchmarks.systems.durable import KIND

Function: TypeAlias = tuple[str, int, str]
"""File, line and name, as pstats has them; the file of what is built in is ``~``."""
Calls: TypeAlias = tuple[int, int, float, float]
Stats: TypeAlias = Mapping[Function, tuple[int, int, float, float, Mapping[Function, Calls]]]

STEPS: Final = 10
RUNS: Final[dict[Size, int]] = {"full": 500, "quick": 50}

GROUPS: Final = (
    ("pydantic and JSON", ("/pydantic/", "/pydantic_core/", "/json/", "pydantic_core.", "_json.")),
    ("procrastinate", ("/procrastinate/",)),
    ("psycopg and libpq", ("/psycopg/", "/psycopg_pool/", "psycopg_binary", "/durable/store/flush.py")),
    ("SQLAlchemy", ("/sqlalchemy/", "sqlalchemy.")),
    ("asyncio", ("/asyncio/", "/selectors.py", "_asyncio.", "select.")),
    ("durable.core", ("/durable/core/",)),
    ("durable.define", ("/durable/define/",)),
    ("durable.engine", ("/durable/engine/",)),
    ("durable.store", ("/durable/store/",)),
    ("durable.worker", ("/durable/worker/",)),
    ("durable, else", ("/durable/",)),
    ("user code", ("/benchmarks/",)),
)
OVERLAP: Final = "Own times add up to all; times with what is called overlap, and may come to more than all of it."
ELSE: Final = "standard library"


@dataclass(frozen=True)
class Share:
    """Seconds that a group took itself, and with all that it called. These overlap: groups call each other."""

    own: float
    in_all: float


async def measure(dsn: str, size: Size) -> dict[str, Any]:
    """``{"steps": how many, "seconds": in all, "groups": {group: [own, in all]}}``"""
    load = Load(dsn, RUNS[size], STEPS)
    async with KIND.app(dsn, STEPS) as app:
        async with app.worker():
            await until_done(app, await KIND.start_all(app, Load(dsn, 50, STEPS)))
        runs = await KIND.start_all(app, load)
        profiler = cProfile.Profile(time.thread_time)
        async with app.worker():
            profiler.enable()
            await until_done(app, runs)
            profiler.disable()
    stats = vars(pstats.Stats(profiler))["stats"]
    shares = by_group(stats)
    return {
        "steps": load.runs * load.steps,
        "seconds": sum(share.own for share in shares.values()),
        "groups": {group: [share.own, share.in_all] for group, share in shares.items()},
    }


def by_group(stats: Stats) -> dict[str, Share]:
    """What each group took, the greatest first."""
    homes = _homes(stats)
    own: dict[str, float] = defaultdict(float)
    in_all: dict[str, float] = defaultdict(float)
    for function, (_, _, seconds, in_function, callers) in stats.items():
        home = homes[function]
        if home is not None:
            own[home] += seconds
            entered = [calls[3] for caller, calls in callers.items() if homes.get(caller) != home]
            in_all[home] += sum(entered) if callers else in_function
            continue
        for caller, calls in callers.items():  # built in, of nobody's
            own[homes.get(caller) or ELSE] += calls[2]
        if not callers:
            own[ELSE] += seconds
    shares = {group: Share(seconds, max(seconds, in_all[group])) for group, seconds in own.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1].own))


def _homes(stats: Stats) -> dict[Function, str | None]:
    """The group of each function; None: built in, and nobody's in particular."""
    return {function: _home(function) for function in stats}


def _home(function: Function) -> str | None:
    file, _, name = function
    where = name if file == "~" else file
    for group, marks in GROUPS:
        if any(mark in where for mark in marks):
            return group
    return None if file == "~" else ELSE


def markdown(measured: dict[str, Any]) -> str:
    seconds, steps = measured["seconds"], measured["steps"]

    def row(group: str, own: float, in_all: float) -> list[str]:
        return [group, f"{own / seconds:.1%}", f"{in_all / seconds:.1%}", f"{own / steps * 1e6:.0f}"]

    rows = [row(group, own, in_all) for group, (own, in_all) in measured["groups"].items()]
    head = ["code of", "own time", "with what it calls", "own, us a step"]
    each = f"{seconds / steps * 1e6:.0f} us of CPU each under the profiler, which makes them dearer"
    return f"{steps:,} steps in runs of ten took {each}.\n\n{OVERLAP}\n\n{table(head, rows, left=1)}"


if __name__ == "__main__":
    beside.main(measure, __doc__)
