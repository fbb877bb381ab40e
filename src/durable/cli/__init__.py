"""The command line: ``durable COMMAND``. A thin door: each command is an operation of the facade, with its answer.

- What was asked for goes to standard output: tables on a terminal, one JSON object a line when piped or with ``-o
  json``. Everything else (which database, hints, errors, logs) goes to standard error.
- Exit codes: 0 done; 1 the answer is no (a run that failed, a run that does not exist, a database that is away); 2 the
  command was wrong (arguments, settings, an import, a payload); 3 the run is still going.

A module for each group of commands, imported when one of them is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Final

from cyclopts import App, CycloptsError, Group

RUNS, WORK, DATABASE = Group("Runs", sort_key=1), Group("Work", sort_key=2), Group("Database", sort_key=3)

COMMANDS: Final = (
    # group, name, where, what it does
    (RUNS, "start", "durable.cli.runs:start", "Start a run."),
    (RUNS, "status", "durable.cli.runs:status", "Show a run: its steps, results, error and children."),
    (RUNS, "list", "durable.cli.runs:list_runs", "List runs, the newest first."),
    (RUNS, "history", "durable.cli.runs:history", "Show all that happened to a run, in order."),
    (RUNS, "watch", "durable.cli.runs:watch", "Show a run now, and again after each change, until it has ended."),
    (RUNS, "signal", "durable.cli.control:signal", "Send a signal to a run; it is kept until a wait takes it."),
    (RUNS, "resume", "durable.cli.control:resume", "Answer what a run waits for now, or end its pause."),
    (RUNS, "pause", "durable.cli.control:pause", "Hold a run after the step in progress."),
    (RUNS, "cancel", "durable.cli.control:cancel", "Stop a run and its children now."),
    (RUNS, "retry", "durable.cli.control:retry", "Take a failed run up again at the step that failed."),
    (RUNS, "fork", "durable.cli.runs:fork", "Start a run that goes on from a step of another one."),
    (WORK, "demo", "durable.cli.demo:demo", "Watch 300 orders survive a killed worker."),
    (WORK, "worker", "durable.cli.worker:worker", "Execute runs, until SIGTERM or Ctrl-C."),
    (WORK, "replay", "durable.cli.replay:replay", "Check today's code against what stored runs have passed."),
    (WORK, "recover", "durable.cli.control:recover", "Put back what crashed or fell due, as every worker does."),
    (DATABASE, "migrate", "durable.cli.database:migrate", "Bring the database to the schema that this version needs."),
    (DATABASE, "purge", "durable.cli.control:purge", "Delete runs that ended long ago."),
)


def build() -> App:
    """The commands, none of them imported yet."""
    app = App(
        name="durable",
        help="Workflows that survive crashes, on PostgreSQL alone.",
        help_epilogue="The database: --dsn, DURABLE_DATABASE_URL, DATABASE_URL, else an embedded PostgreSQL in "
        "./.durable.\n\nExit codes: 0 done, 1 failed, 2 wrong usage, 3 still running.",
        version=lambda: metadata.version("durable"),
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    for group, name, place, text in COMMANDS:
        app.command(place, name=name, help=text, group=group)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. The entry point of the package."""
    from durable.cli.problems import complain, complain_of_usage

    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build()(tokens)
    except CycloptsError as error:
        return complain_of_usage(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `durable list | head`
        sys.stderr.close()
        return 141
    except Exception as error:
        return complain(error)
    return code if isinstance(code, int) else 0
