"""What the crash tests are made of: workers to be killed, the facts of the database, and waiting for them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg.rows import dict_row
from tests import invariants
from tests.chaos import functions, workflows
from tests.chaos.worker_main import Settings
from uuid_utils.compat import uuid7

ROOT: Final = Path(__file__).parents[2]
LIMIT: Final = 60.0
"""Seconds after which a fact that has not come is a failure."""
ENDED: Final = ("completed", "failed", "canceled")

T = TypeVar("T")
Measured: TypeAlias = Callable[[str], None]
"""Says something at the end of the suite: a count, a time."""


def until(fact: Callable[[], T], what: str, *, limit: float = LIMIT, dump: Callable[[], str] | None = None) -> T:
    """Wait until `fact()` is truthy; returns it. A lost connection is no fact: it is asked again."""
    give_up = time.monotonic() + limit
    while True:
        try:
            if found := fact():
                return found
        except psycopg.OperationalError:
            pass
        if time.monotonic() > give_up:
            raise AssertionError(f"after {limit:.0f} s still not: {what}\n{dump() if dump is not None else ''}")
        time.sleep(0.01)


# ---------------------------------------------------------------- processes


class WorkerProcess:
    """A worker of the suite. Ends by itself at its kill point, or when it is told to."""

    def __init__(self, nursery: Nursery, settings: Settings, pid: int) -> None:
        self._nursery, self.settings, self.pid = nursery, settings, pid

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives."""
        return self._nursery.ended.get(self.pid)

    @property
    def killed(self) -> bool:
        """Whether it was killed; one that failed by itself fails the test."""
        assert self.code in (None, -signal.SIGKILL), f"exit code {self.code}\n{self.log}"
        return self.code is not None

    def send(self, number: signal.Signals) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, limit: float = LIMIT) -> int:
        """Until it has ended."""
        until(lambda: self.code is not None, f"worker {self.pid} has ended", limit=limit)
        assert self.code is not None
        return self.code

    @property
    def log(self) -> str:
        path = Path(self.settings.folder) / f"worker-{self.pid}.log"
        return path.read_text() if path.exists() else ""


class Nursery:
    """Forks workers in milliseconds: see worker_main.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.worker_main"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._born: queue.Queue[int] = queue.Queue()
        self.ended: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, settings: Settings) -> WorkerProcess:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
        self._process.stdin.flush()
        return WorkerProcess(self, settings, self._born.get(timeout=LIMIT))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)
        self._reader.join(LIMIT)
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "code" in told:
                self.ended[told["pid"]] = told["code"]
            else:
                self.ended.pop(told["pid"], None)
                self._born.put(told["pid"])


# ---------------------------------------------------------------- a database, its workers, what happened in it


@dataclass
class Stage:
    """One database with its workers. `folder` is where workers report hits, notes and logs."""

    nursery: Nursery
    dsn: str
    folder: Path
    workers: list[WorkerProcess] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._connection: psycopg.Connection[dict[str, Any]] | None = None
        with psycopg.connect(self.dsn) as connection:
            connection.execute(workflows.SCHEMA)

    # -- workers

    @property
    def detaches_soon(self) -> bool:
        """Whether handlers that wait until they are detached take no time to speak of."""
        return float(self.defaults.get("detach_after", 0.0)) < 1

    def worker(self, **settings: Any) -> WorkerProcess:
        """Start one; it may not have registered yet."""
        given = {"dsn": self.dsn, "folder": str(self.folder)} | self.defaults | settings
        made = self.nursery.fork(Settings(**given))
        self.workers.append(made)
        return made

    def registered(self, worker: WorkerProcess) -> WorkerProcess:
        """Wait until it fetches jobs."""
        sql = "select 1 from durable.workers where pid = %s and queue_worker_id is not null"
        self.until(lambda: self.rows(sql, worker.pid), f"worker {worker.pid} has registered")
        return worker

    def no_backend_left(self) -> bool:
        """Whether the server has noticed the end of all workers: a row that a dead one held is free only then."""
        sql = """
          select count(*) as open from pg_stat_activity
          where datname = current_database() and application_name like 'durable %%'
        """
        return bool(self.rows(sql)[0]["open"] == 0)

    def close(self) -> None:
        """End the workers that are left."""
        for worker in self.workers:
            worker.send(signal.SIGCONT)
            worker.send(signal.SIGKILL)
        for worker in self.workers:
            worker.wait()
        if self._connection is not None:
            self._connection.close()

    # -- runs

    def start(self, workflow: str, *, slow: str = "", fail: bool = False, **fields: Any) -> uuid.UUID:
        run = uuid7()
        given = json.dumps({"slow": slow, "fail": fail, **fields})
        self.rows("select * from durable.start_run(%s, %s, '1', %s, '', 'durable')", run, workflow, given)
        return run

    def signal(self, run: uuid.UUID, name: str, body: Any, message_id: str | None = None) -> str:
        sql = "select durable.send_message(%s, 'signal', %s, %s, %s) as answer"
        return str(self.rows(sql, run, name, json.dumps(body), message_id)[0]["answer"])

    def status(self, run: uuid.UUID) -> str:
        return str(self.rows("select status from durable.runs where id = %s", run)[0]["status"])

    def statuses(self) -> dict[uuid.UUID, str]:
        return {row["id"]: row["status"] for row in self.rows("select id, status from durable.runs")}

    def ended(self, *runs: uuid.UUID) -> bool:
        """Whether these runs (none are named: all) have ended."""
        sql = "select count(*) as open from durable.runs where finished_at is null"
        chosen = sql + (" and id = any (%s)" if runs else "")
        return bool(self.rows(chosen, *([list(runs)] if runs else []))[0]["open"] == 0)

    def at_rest(self) -> bool:
        """Whether all has ended and nothing is left over that a sweep will still take away."""
        sql = """
          select (select count(*) from durable.runs where finished_at is null)
               + (select count(*) from durable.procrastinate_jobs where status in ('todo', 'doing')) as open
        """
        return bool(self.rows(sql)[0]["open"] == 0)

    def answer(self) -> None:
        """Play the people outside: send what runs wait for, to the strict ear that takes it once."""
        sql = """
          select id, waiting_for, waiting_name from durable.runs
          where status = 'suspended' and waiting_for in ('signal', 'resume')
        """
        for row in self.rows(sql):
            name = row["waiting_name"]
            said = self.rows("select durable.resume_wait(%s, %s, %s) as said", row["id"], name, '"yes"')
            assert said[0]["said"] in ("accepted", "refused", "busy"), said

    def finish(self, limit: float = LIMIT) -> None:
        """Answer until everything has ended and nothing is left over."""

        def over() -> bool:
            self.answer()
            return self.at_rest()

        self.until(over, "all runs have ended, no job is left", limit=limit)

    # -- facts

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """What a statement answers. Raises OperationalError while the database is away; a later call connects anew."""
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self.dsn, row_factory=dict_row, autocommit=True)
        return self._connection.execute(sql.encode(), values).fetchall()

    def until(self, fact: Callable[[], T], what: str, *, limit: float = LIMIT) -> T:
        return until(fact, what, limit=limit, dump=self.dump)

    def notes(self) -> Counter[tuple[str, str]]:
        """How often each (run, step) appended a line."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter((line.split()[0], line.split()[1]) for line in lines)

    def noted(self, run: uuid.UUID, step: str) -> int:
        return self.notes()[str(run), step]

    def written(self, run: uuid.UUID) -> Counter[str]:
        """How often each step's effect is in the database."""
        found = self.rows("select step from app.effects where run_id = %s order by id", run)
        return Counter(row["step"] for row in found)

    def hits(self) -> set[tuple[str, str]]:
        """The cells that were hit."""
        return {(words[0], words[1]) for words in self._hits() if len(words) == 2}

    def kills(self) -> Counter[tuple[str, str]]:
        """The cells at which a worker was killed."""
        return Counter((words[1], words[2]) for words in self._hits() if len(words) == 3)

    def _hits(self) -> list[list[str]]:
        path = self.folder / "hits"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def dump(self) -> str:
        """What one wants to see when a fact does not come."""
        wanted = {
            "runs": """select id, workflow, status, revision, current_step, frame, waiting_for, waiting_name, wake_at,
                              claim_worker, error ->> 'message' as error from durable.runs
                       where finished_at is null or status = 'failed'""",
            "jobs": """select id, status, task_name, args, worker_id, scheduled_at from durable.procrastinate_jobs""",
            "inbox": "select run_id, kind, name, state, taken_by, sent_at from durable.inbox where state <> 'taken'",
            "workers": """select w.*, exists (select from pg_locks where locktype = 'advisory' and objid = w.id
                                                and classid = hashtext('durable')::oid) as alive
                          from durable.workers w""",
        }
        said = []
        for name, sql in wanted.items():
            rows = self.rows(sql)
            said += [f"--- {name}: {len(rows)}", *(str(row) for row in rows[:10])]
        for worker in self.workers[-3:]:
            said += [f"--- log of worker {worker.pid}, exit code {worker.code}", worker.log[-4000:]]
        return "\n".join(said)

    def all_ended(self) -> bool:
        """Answer, and look whether all have ended."""
        self.answer()
        return self.ended()

    # -- the verdict

    def check_run(self, run: uuid.UUID, *, fail: bool) -> None:
        """A run of `everything` or of `script` ended as it must, with all its effects, and none twice that may be only
        once."""
        assert self.status(run) == ("failed" if fail else "completed"), self.dump()
        (row,) = self.rows("select workflow from durable.runs where id = %s", run)
        if row["workflow"] == "script":
            self._check_script(run, fail=fail)
        else:
            self._check_everything(run, fail=fail)

    def children(self, run: uuid.UUID) -> dict[str, uuid.UUID]:
        """By the step that started them."""
        found = self.rows("select id, parent_step from durable.runs where parent_id = %s", run)
        return {row["parent_step"]: row["id"] for row in found}

    def _check_everything(self, run: uuid.UUID, *, fail: bool) -> None:
        (child,) = self.children(run).values()
        self._check_effects(run, workflows.WRITTEN, workflows.UNDONE_WRITTEN if fail else ())
        self._check_notes(run, workflows.NOTED, workflows.UNDONE_NOTED, fail=fail)
        self._check_child(child, undone=fail)
        if fail:
            self._check_order(run)

    def _check_script(self, run: uuid.UUID, *, fail: bool) -> None:
        lost = self.written(run)[functions.LOSER]
        assert lost <= 1
        losers = (functions.LOSER,) * lost
        undone = (*functions.UNDONE_WRITTEN, *losers) if fail else ()
        self._check_effects(run, (*functions.WRITTEN, *losers), undone)
        self._check_notes(run, functions.NOTED, functions.UNDONE_NOTED, fail=fail)
        children = self.children(run)
        for step in functions.CHILDREN:
            self._check_child(children[step], undone=fail and step == "child")
        some = [self.status(children[step]) for step in ("some[0]", "some[1]")]
        assert sorted(some) in (["canceled", "completed"], ["completed", "completed"])
        replies = self.rows("select reply::text from durable.inbox where run_id = %s and name = 'question'", run)
        assert [json.loads(row["reply"]) for row in replies] == [{"to": "yes"}]
        if not fail:
            (row,) = self.rows(
                "select result::text from durable.journal where run_id = %s and step_id = 'run:result'", run
            )
            assert json.loads(row["result"]) == functions.RESULT

    def _check_effects(self, run: uuid.UUID, done: tuple[str, ...], undone: tuple[str, ...]) -> None:
        assert self.written(run) == Counter(done) + Counter(f"undo:{step}" for step in undone)

    def _check_notes(self, run: uuid.UUID, steps: tuple[str, ...], undone: tuple[str, ...], *, fail: bool) -> None:
        for step in steps:
            assert self.noted(run, step) >= 1, f"{step} of {run} never happened"
        for step in undone:
            assert self.noted(run, f"undo:{step}") >= 1 if fail else not self.noted(run, f"undo:{step}")

    def _check_child(self, child: uuid.UUID, *, undone: bool) -> None:
        assert self.status(child) == ("canceled" if undone else "completed")
        self._check_effects(child, workflows.CHILD_WRITTEN, workflows.CHILD_WRITTEN if undone else ())
        self._check_notes(child, workflows.CHILD_NOTED, workflows.CHILD_NOTED, fail=undone)
        if undone:
            self._check_order(child)

    def _check_order(self, run: uuid.UUID) -> None:
        """Compensators that write ran in the reverse order of what they undo."""
        rows = self.rows("select step from app.effects where run_id = %s order by id", run)
        done = [row["step"] for row in rows if not row["step"].startswith("undo:")]
        undone = [row["step"].removeprefix("undo:") for row in rows if row["step"].startswith("undo:")]
        fork = {"fork/tx", "fork/sync"}  # side by side: the order of their writes is their journal's only by chance
        assert [s for s in undone if s not in fork] == [s for s in reversed(done) if s not in fork and s in undone]

    def check(self, *, at_rest: bool = True) -> None:
        """All invariants of the database."""
        invariants.check(self.dsn, at_rest=at_rest)


@contextmanager
def staged(nursery: Nursery, dsn: str, folder: Path, **defaults: Any) -> Iterator[Stage]:
    """A stage whose workers end with the block."""
    made = Stage(nursery, dsn, folder, defaults=defaults)
    try:
        yield made
    finally:
        made.close()
