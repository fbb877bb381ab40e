"""Ways to break the engine: what is replaced by what, and the tests that must see it.

Exact text, so that an edit of the engine which moves a rule makes its mutant fail loudly instead of missing quietly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in the file `path`; it must stand there exactly `times`."""

    path: str
    old: str
    new: str
    times: int = 1


@dataclass(frozen=True)
class Mutant:
    """One rule broken. `tests`: what is run, in this order, until one of them fails."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


LAWS: Final = "tests/engine/test_laws.py"
SQL: Final = "src/durable/store/sql.py"
SWEEP: Final = "src/durable/store/sweep.py"
APPLY: Final = "src/durable/store/apply.py"
ADVANCE: Final = "src/durable/engine/advance.py"
HOLD: Final = "src/durable/engine/hold.py"
FIRST: Final = "migrations/versions/0001_engine.py"

MUTANTS: Final = (
    Mutant(
        "no row lock",
        (
            Edit(SQL, "where id = %(run)s for update) run", "where id = %(run)s) run", times=2),
            Edit(SQL, "where id = %(run)s for update skip locked) run", "where id = %(run)s) run"),
        ),
        (f"{LAWS}::test_nobody_else_takes_a_run_while_its_step_executes",),
    ),
    Mutant(
        "message doorbells deduplicated",
        (
            Edit(
                "migrations/functions.sql",
                "when p_delay is not null then 'ring:' || p_run end",
                "else 'ring:' || p_run end",
            ),
        ),
        (f"{LAWS}::test_each_message_rings_although_another_ring_waits",),
    ),
    Mutant(
        "a busy row drops its doorbell",
        (Edit("src/durable/engine/deliver.py", "return await engine.ring_later(run_id)", "return None"),),
        (f"{LAWS}::test_a_job_that_finds_the_row_busy_comes_again",),
    ),
    Mutant(
        "a busy row drops its continuation",
        (Edit(ADVANCE, "return await engine.enqueue_later(run_id, revision, kind)", "return None"),),
        (f"{LAWS}::test_a_job_that_finds_the_row_busy_comes_again",),
    ),
    Mutant(
        "no unique journal key",
        (
            Edit(
                FIRST,
                "constraint journal_pkey primary key (run_id, step_id)",
                "constraint journal_pkey primary key (run_id, step_id, seq)",
            ),
            Edit(
                SQL,
                """  on conflict (run_id, step_id) do update set
    seq = default, kind = excluded.kind, status = excluded.status, result = excluded.result, error = excluded.error,
    attempt = excluded.attempt, started_at = excluded.started_at, finished_at = excluded.finished_at,
    parent = excluded.parent, extra = excluded.extra
  where journal.status = 'suspended'
""",
                "",
            ),
        ),
        (f"{LAWS}::test_the_journal_takes_one_entry_a_step",),
    ),
    Mutant(
        "a sweep without SKIP LOCKED",
        (Edit(SWEEP, "for update of r skip locked", "for update of r", times=6),),
        (f"{LAWS}::test_a_sweep_passes_by_what_somebody_holds",),
    ),
    Mutant(
        "no revision check before a step",
        (Edit(ADVANCE, "hold.view.run.revision != revision or ", ""),),
        (f"{LAWS}::test_a_job_for_another_revision_does_nothing",),
    ),
    Mutant(
        "no revision check at the write",
        (Edit(SQL, "where id = %(run)s and revision = %(before)s", "where id = %(run)s"),),
        (f"{LAWS}::test_a_transition_from_another_revision_is_not_written",),
    ),
    Mutant(
        "cursor moved without a journal entry",
        (Edit("src/durable/core/finish.py", '"entries": tuple(entries),', '"entries": (),'),),
        (f"{LAWS}::test_the_cursor_moves_with_the_entry",),
    ),
    Mutant(
        "fencing token ignored",
        (
            Edit(
                HOLD,
                "if locked is not None and claim is not None and locked.run.claim != claim:",
                "if locked is not None and claim is not None and locked.run.claim is None:",
            ),
        ),
        (f"{LAWS}::test_a_result_under_an_old_token_is_discarded_while_the_new_owner_executes",),
    ),
    Mutant(
        "compensation cursor not saved",
        (Edit("src/durable/core/undo.py", '"undo_cursor": target.entry.seq, ', ""),),
        (f"{LAWS}::test_the_rollbacks_cursor_stands_on_what_was_undone_last",),
    ),
    Mutant(
        "next job enqueued after the commit instead of in it",
        (
            Edit(
                HOLD,
                "            await apply_and_commit(desk.store, self.connection, transition, inbox)\n",
                """            silent = replace(transition, next=None)
            await apply_and_commit(desk.store, self.connection, silent, inbox)
""",
            ),
            Edit(
                HOLD,
                """        desk.written(transition)
        desk.at(Point.AFTER_COMMIT, what)
        return None
""",
                """        await desk.enqueue(transition)
        desk.written(transition)
        desk.at(Point.AFTER_COMMIT, what)
        return None
""",
            ),
        ),
        (f"{LAWS}::test_the_next_job_commits_with_the_step_or_neither_does",),
    ),
)
