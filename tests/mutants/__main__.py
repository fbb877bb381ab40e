"""Break the engine on purpose, and see that the suite notices: ``python -m tests.mutants [part of a name ...]``.

Each mutant is applied to a copy of the tree in a temporary folder, with a database server of its own; the real tree is
only read. First the tests that are to kill them must pass on the unbroken copy. Exits 0 if every mutant was killed, 1
if one survived, 2 if one could not be tried: its text is not in the source any more, say.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.conftest import _shared_root
from tests.mutants.table import MUTANTS, Edit, Mutant

ROOT: Final = Path(__file__).resolve().parents[2]
COPIED: Final = ("src", "migrations", "tests", "alembic.ini", "pyproject.toml")
LIMIT: Final = 300
"""Seconds that the tests of one mutant may take."""

WHERE: Final = "import durable, durable.migrate as m; print(durable.__file__); print(m.scripts())"
FAILED: Final = re.compile(r"^FAILED (?:\S*/)?(.+)$", re.MULTILINE)


class Untried(Exception):
    """Nothing was learnt of a mutant."""


@dataclass(frozen=True)
class Copy:
    """A copy of the tree."""

    root: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Python there, with the code that is there."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "160",
        }
        environment.pop("DURABLE_TEST_DSN", None)
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def must_be_what_is_imported(self) -> None:
        found = self.run("-c", WHERE)
        expected = [str(self.root / "src/durable/__init__.py"), str(self.root / "migrations")]
        if found.stdout.split() != expected:
            raise Untried(f"the copy is not what is imported, but {found.stdout or found.stderr}")

    def tests(self, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests)

    @contextmanager
    def broken(self, mutant: Mutant) -> Iterator[None]:
        before = {edit.path: (self.root / edit.path).read_text() for edit in mutant.edits}
        try:
            for edit in mutant.edits:
                self._apply(edit)
            yield
        finally:
            for path, text in before.items():
                (self.root / path).write_text(text)

    def _apply(self, edit: Edit) -> None:
        file = self.root / edit.path
        text = file.read_text()
        if text.count(edit.old) != edit.times:
            raise Untried(f"{edit.path} has {text.count(edit.old)} times, not {edit.times}:\n{edit.old}")
        file.write_text(text.replace(edit.old, edit.new))


@contextmanager
def copied() -> Iterator[Copy]:
    """A copy for as long as the block lasts; its database server goes with it."""
    with tempfile.TemporaryDirectory(prefix="durable-mutants-") as folder:
        root = Path(folder).resolve()
        root.chmod(0o755)  # unlike other temporary folders, open to the account that runs PostgreSQL for root
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, root / name)
        try:
            yield Copy(root)
        finally:
            shutil.rmtree(_shared_root(root), ignore_errors=True)


def killer(copy: Copy, mutant: Mutant) -> str | None:
    """The test that fails on the mutant, and how; None: it survives."""
    with copy.broken(mutant):
        done = copy.tests(mutant.tests)
    failed = FAILED.search(done.stdout)
    if done.returncode == 1 and failed is not None:
        return failed[1]
    if done.returncode == 0:
        return None
    raise Untried(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def must_pass_unbroken(copy: Copy, mutants: list[Mutant]) -> None:
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    done = copy.tests(tests)
    if done.returncode != 0:
        raise Untried(f"the tests fail on the unbroken tree:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")


def attempt(copy: Copy, mutant: Mutant) -> tuple[str, str]:
    """(killed, survived or untried; by which test, or why)"""
    try:
        by = killer(copy, mutant)
    except (Untried, subprocess.TimeoutExpired) as error:
        return "untried", str(error)
    return ("killed", by) if by is not None else ("survived", f"passed: {', '.join(mutant.tests)}")


def main(parts: list[str]) -> int:
    mutants = [mutant for mutant in MUTANTS if not parts or any(part in mutant.name for part in parts)]
    if not mutants:
        say(f"no such mutant; there are: {', '.join(mutant.name for mutant in MUTANTS)}")
        return 2
    results = []
    with copied() as copy:
        try:
            copy.must_be_what_is_imported()
            must_pass_unbroken(copy, mutants)
        except (Untried, subprocess.TimeoutExpired) as error:
            say(str(error))
            return 2
        width = max(len(mutant.name) for mutant in mutants)
        for mutant in mutants:
            began = time.monotonic()
            result, why = attempt(copy, mutant)
            results.append(result)
            say(f"{mutant.name:<{width}}  {result:<8}  {time.monotonic() - began:5.1f} s  {why}")
    say(f"{results.count('killed')} of {len(results)} mutants were killed")
    return 2 if "untried" in results else 1 if "survived" in results else 0


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copy and its server go also then
    sys.exit(main(sys.argv[1:]))
