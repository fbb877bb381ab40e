"""Record the golden set anew: ``python -m tests.golden``.

Only when the journal itself is meant to look different: recordings of before are what shows that runs of before still
go on. Each file holds the runs of one workflow, some of them in the middle.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.golden import before
from tests.golden import workflows as w

from durable import Durable
from durable.cli import main as command_line
from durable.testing import Harness
from durable.testing.databases import Databases

HERE: Final = Path(__file__).resolve().parent


def record(dsn: str) -> None:
    """Start runs of all the workflows, and take each to where it is to be recorded."""
    with working(dsn, *(each for each in w.WORKFLOWS if each is not w.patched), before.old_patched) as (app, t):
        runs = [app.start(before.old_patched) for _ in range(2)]
        t.drain()
        runs[0].signal("go", "old")
        t.drain()
    with working(dsn, *w.WORKFLOWS) as (app, t):
        record_steps(app, t)
        record_messages(app, t)
        record_others(app, t)


def record_steps(app: Durable, t: Harness) -> None:
    """The same run, as it stands at one after the other of its waits."""
    given = w.Order(id=7, items=["cup", "löffel"])
    runs = [app.start(w.steps, given) for _ in range(5)]
    t.drain()  # all of them: waiting for the second attempt
    others = [app.start(w.joins), app.start(w.races), app.start(w.loops, 40), app.start(w.loops, 40)]
    t.drain()
    for run in runs[4:]:
        run.pause()
    t.skip(seconds=2)
    t.drain()
    for run in [*runs[3:4], *others[3:]]:
        run.pause()  # before its sleep is over
    t.skip(minutes=2)
    t.drain()
    for run in runs[:2]:
        assert run.resume("review", "looked at")
    t.drain()
    runs[0].signal("signoff", True)
    t.drain()


def record_messages(app: Durable, t: Harness) -> None:
    run, other = app.start(w.messages), app.start(w.messages)
    run.signal("quote", 5)
    other.signal("quote", 6)
    t.drain()
    for name, body in [("line", "a"), ("quote", 8), ("note", {"b": 1.5}), ("line", None)]:
        run.signal(name, body)
    t.drain()
    t.skip(seconds=30)
    t.drain()


def record_others(app: Durable, t: Harness) -> None:
    for each in (w.going_back, w.rolled_back, w.children, w.caught):
        app.start(each)
    app.start(w.renewed, 2)
    app.start(w.built, 3)
    app.start(w.built, 4).signal("go")
    new, _ = app.start(w.patched), app.start(w.patched)
    canceled, _ = app.start(w.cleaning), app.start(w.cleaning)
    new.signal("go", "new")
    t.drain()
    canceled.cancel(reason="enough")
    t.drain()
    app.start(w.joins)
    app.start(w.races)
    t.drain()


@contextmanager
def working(dsn: str, *workflows: Any) -> Iterator[tuple[Durable, Harness]]:
    with Durable(dsn, workflows=workflows) as app, Harness(app) as t:
        yield app, t


def export(dsn: str, folder: Path) -> None:
    """A file for each workflow. Raises SystemExit if a run does not fit the code that has just run it."""
    for name in sorted({each.name for each in w.WORKFLOWS}):
        options = ["--import", w.__name__, "--workflow", name, "--export", str(folder / f"{name}.jsonl"), "--dsn", dsn]
        if command_line(["replay", *options, "-o", "table"]):
            sys.exit(f"the runs of {name} do not fit their own code")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="durable-golden-") as folder:
        Path(folder).chmod(0o755)  # root has PostgreSQL run by another account
        with Databases(None, Path(folder) / "postgres") as databases, databases.created() as dsn:
            record(dsn)
            export(dsn, HERE)


if __name__ == "__main__":
    main()
