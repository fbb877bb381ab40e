"""One measurement, in a process of its own:

    python -m benchmarks.measure SYSTEM CASE --dsn DSN --size full|quick

The last line of its output is JSON: ``{"values": [...], "settings": "...", "versions": {...}}``; `values` is null if
the system has no such case.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol, cast

from benchmarks.cases import CASES, SYSTEMS
from benchmarks.load import Load


class System(Protocol):
    """What a module of `benchmarks.systems` has."""

    SETTINGS: str
    CASES: Mapping[str, Callable[[Load], Awaitable[list[float]]]]

    def versions(self) -> dict[str, str]: ...


def imported(name: str) -> System:
    """Raises ImportError if what the system needs is not installed."""
    return cast(System, importlib.import_module(f"benchmarks.systems.{name}"))


async def measured(system: System, case: str, load: Load) -> list[float] | None:
    """The values of a case; None if the system does not have it."""
    if case not in system.CASES:
        return None
    return await system.CASES[case](load)


def load_of(given: argparse.Namespace) -> Load:
    """What the case does by default, and what was asked otherwise. With other `steps` it stays as many steps in all."""
    load = CASES[given.case].load(given.dsn, given.size)
    if given.steps is not None:
        load = replace(load, steps=given.steps, runs=max(1, load.runs * load.steps // given.steps))
    if given.in_flight is not None:
        load = replace(load, in_flight=given.in_flight)
    if given.processes is not None:
        load = replace(load, processes=given.processes)
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--size", choices=("full", "quick"), required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--in-flight", type=int)
    parser.add_argument("--processes", type=int)
    given = parser.parse_args()
    system = imported(given.system)
    values = asyncio.run(measured(system, given.case, load_of(given)))
    print(json.dumps({"values": values, "settings": system.SETTINGS, "versions": system.versions()}))


if __name__ == "__main__":
    main()
