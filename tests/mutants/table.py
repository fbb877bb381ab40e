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
FUNCTIONS: Final = "tests/engine/test_function_laws.py"
BODY: Final = "src/durable/core/functions/body.py"
BRANCHES: Final = "src/durable/core/functions/branches.py"
LOOPS: Final = "src/durable/core/functions/loops.py"
MOVES: Final = "src/durable/core/moves.py"
PLAN: Final = "src/durable/core/functions/plan.py"
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
            Edit(SQL, "where id = %(run)s for update) run", "where id = %(run)s) run"),
            Edit(SQL, "where id = %(run)s for update skip locked) run", "where id = %(run)s) run"),
            Edit(SQL, "where id = %(run)s for update skip locked\n", "where id = %(run)s\n"),
        ),
        (f"{LAWS}::test_nobody_else_takes_a_run_while_its_step_executes",),
    ),
    Mutant(
        "a look into the inbox that is older than the lock",
        (Edit(SQL, "where id = %(run)s for update skip locked\n", "where id = %(run)s for update\n"),),
        ("tests/engine/test_interleavings.py::test_who_has_to_wait_for_the_next_lock_sees_what_came_meanwhile",),
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
        (Edit(ADVANCE, "            await engine.enqueue_later(run_id, revision, kind)\n", ""),),
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
        "a lock passed on to nobody",
        (Edit(HOLD, "        if heir.gone:\n            return False\n", ""),),
        ("tests/engine/test_heirs.py::test_who_waits_and_is_cancelled_meanwhile",),
    ),
    Mutant(
        "no revision check at the write",
        (Edit(SQL, "where id = %(run)s and revision = %(before)s returning", "where id = %(run)s returning"),),
        (f"{LAWS}::test_a_transition_from_another_revision_is_not_written",),
    ),
    Mutant(
        "cursor moved without a journal entry",
        (Edit("src/durable/core/finish.py", '"entries": entries,', '"entries": (),'),),
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
                "                transition,\n                inbox,\n",
                "                replace(transition, next=None),\n                inbox,\n",
            ),
            Edit(
                HOLD,
                """        desk.written(transition)
        if transition.next is not None:
            desk.fetch()
""",
                """        await desk.enqueue(transition)
        desk.written(transition)
""",
            ),
        ),
        (f"{LAWS}::test_the_next_job_commits_with_the_step_or_neither_does",),
    ),
    # ------------------------------------------------------------ functions
    Mutant(
        "a taken message not recorded",
        (Edit(PLAN, "            self._taken |= dict.fromkeys(came.taken, key)\n", ""),),
        (f"{FUNCTIONS}::test_a_message_is_taken_once",),
    ),
    Mutant(
        "a message that is to be completed given to others",
        (Edit(PLAN, " | self._body.reserved", ""),),
        (f"{FUNCTIONS}::test_a_message_that_is_to_be_completed_is_there_for_nobody_else",),
    ),
    Mutant(
        "a step's entry not written with what follows from it",
        (Edit(MOVES, "(*body.deferred.values(), *entries,", "(*entries,"),),
        (f"{FUNCTIONS}::test_a_steps_entry_goes_out_with_what_follows_from_it",),
    ),
    Mutant(
        "entries written that were pruned before",
        (
            Edit(
                MOVES,
                "        entries = tuple(entry for entry in entries if entry.step_id not in gone)\n",
                "",
            ),
        ),
        (
            f"{FUNCTIONS}::test_what_is_pruned_before_it_was_written_is_never_written",
            f"{FUNCTIONS}::test_a_loser_that_was_not_written_yet_never_is",
        ),
    ),
    Mutant(
        "the winner of a race not journaled",
        (Edit(BRANCHES, 'shown, {"winner": won})', "shown, {})"),),
        (f"{FUNCTIONS}::test_the_winner_of_a_race_stays_the_winner",),
    ),
    Mutant(
        "what a rollback needs is pruned",
        (Edit(LOOPS, "keep = self._undoable(first)", "keep: set[int] = set()"),),
        (f"{FUNCTIONS}::test_each_step_is_undone_once_and_in_reverse",),
    ),
    Mutant(
        "undone steps undone again",
        (
            Edit(
                "src/durable/core/undo_targets.py",
                "if t and t.undo_id not in view.journal\n        ]",
                "if t\n        ]",
            ),
        ),
        (f"{FUNCTIONS}::test_what_a_checkpoint_has_undone_is_not_undone_again",),
    ),
    Mutant(
        "a patch not journaled",
        (
            Edit(
                BODY,
                'self.derive(Entry(key, EntryKind.PATCH, "completed", "true", finished_at=self.now, parent=parent))',
                "str(parent)",
            ),
        ),
        (f"{FUNCTIONS}::test_a_patch_is_taken_by_the_run_that_took_it",),
    ),
    Mutant(
        "journaled operations that the code has lost go unnoticed",
        (Edit(BODY, "        raise Diverged(self.difference(missed, ", "        str(self.difference(missed, "),),
        (f"{FUNCTIONS}::test_code_that_has_lost_an_operation_parks_the_run",),
    ),
    Mutant(
        "a body kept beyond its revision",
        (Edit("src/durable/engine/bodies.py", "kept.revision != revision", "not kept.revision"),),
        (f"{FUNCTIONS}::test_a_body_is_of_no_use_once_another_worker_had_the_run",),
    ),
    Mutant(
        "a body that may have killed driven beside another suspect",
        (Edit(PLAN, "    if limits.watching:\n", "    if False:\n"),),
        (f"{FUNCTIONS}::test_a_body_that_may_have_killed_is_not_driven_beside_another_suspect",),
    ),
    Mutant(
        "a blocking body charged to the step before it",
        (
            Edit(
                "src/durable/core/settle.py",
                "    if call.crashes:\n        return move(view, now, Status.RUNNING, frame=frame, claim=None)\n",
                "",
            ),
        ),
        ("tests/chaos/test_functions.py::test_a_body_that_blocks_ends_its_worker_and_then_its_run",),
    ),
    Mutant(
        "a run ends over what came to its inbox during its last step",
        (Edit("src/durable/engine/advance.py", "whole=transition.ends)", "whole=False)"),),
        ("tests/engine/test_interleavings.py::test_what_is_asked_during_the_last_step_is_not_overlooked",),
    ),
    Mutant(
        "the row is let go of when an end is refused",
        (
            Edit(
                "src/durable/store/apply.py",
                "await send(connection, db.sql.back_to_savepoint)",
                "await abandon(connection)\n            await send(connection, db.sql.begin)",
            ),
        ),
        ("tests/engine/test_interleavings.py::test_who_waits_for_the_row_has_it_after_the_outcome_of_the_last_step",),
    ),
    Mutant(
        "a job is finished by who had it before it was put back",
        (
            Edit(
                "src/durable/worker/jobs.py",
                """
      and (job.worker_id is null
           or job.worker_id = (%(performers)s::bigint[])[array_position(%(performed)s::bigint[], job.id)])""",
                "",
            ),
        ),
        ("tests/engine/test_batches.py::test_what_was_put_back_is_not_finished_by_who_had_it_before",),
    ),
)
