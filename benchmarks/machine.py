"""On what was measured."""

from __future__ import annotations

import os
import platform
import timeit
from pathlib import Path

from benchmarks.server import filesystem


def described(data: Path) -> str:
    """One line: processor, memory, system, Python and how quick it is, and the file system on which the server's data
    lie."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()} "
        f"(100 objects made and sorted in {_quickness():.0f} µs), "
        f"data on {filesystem(data)}"
    )


def _quickness() -> float:
    """What it takes to make a hundred objects and to sort them, in µs. One build of the same Python may need half as
    much again as another one: one that was compiled without profile-guided optimisation, say."""
    times = 500
    taken = timeit.repeat("sorted(entries(), key=lambda entry: -entry.number)", _ENTRIES, number=times, repeat=7)
    return min(taken) / times * 1e6


_ENTRIES = """
class Entry:
    def __init__(self, name, number):
        self.name, self.number = name, number
def entries():
    return {f"step-{n}": Entry(f"step-{n}", n) for n in range(100)}.values()
"""


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
