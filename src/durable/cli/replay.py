"""``durable replay``: does today's code still agree with what runs have passed?"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Final

from cyclopts import Parameter

from durable import logs
from durable.cli import output
from durable.cli.options import Shared, connected, find_app
from durable.cli.problems import DONE, FAILED, UsageError, printable, say
from durable.durable import AsyncDurable
from durable.engine.guard import Guard
from durable.replaying import Fit, Recording, Verdict, read_recordings, replayed, stored, to_line

Many = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]

SAID: Final = {Fit.OK: "fit", Fit.DIVERGED: "diverged", Fit.FAULT: "would fail", Fit.UNKNOWN: "of an unknown version"}


async def replay(
    app: str | None = None,
    /,
    *,
    workflow: str | None = None,
    status: Many = (),
    limit: int | None = None,
    export: str | None = None,
    from_file: Annotated[str | None, Parameter(name="--from")] = None,
    shared: Shared = Shared(),  # noqa: B008  # frozen
) -> int:
    """Replay the journals of stored runs against the code of MODULE:APP, or of the modules of --import, newest first.

    Executes no handler and writes nothing to the database. Exits 1 if any run does not fit, with what differs: the
    journal's side (-) and the code's (+).

    Parameters
    ----------
    app
        MODULE:APP, a Durable or AsyncDurable of yours.
    workflow
        Only the runs of this workflow. Default: of all that are known here.
    status
        Only runs in this status, as of `durable list`. May be given several times.
    limit
        At most so many runs.
    export
        Also write them to this file, a line of JSON each: for --from, and for durable.testing.replay in a test.
    from_file
        Replay the runs in a file that --export has written; no database is needed.
    """
    if app is not None and shared.app is not None:
        raise UsageError(f"two apps are given, {app} and {shared.app}: name one")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}: at least 1")
    if from_file is not None and (status or workflow or export or limit or shared.dsn):
        raise UsageError("--from replays all of a file: without --workflow, --status, --limit, --export, --dsn")
    logs.configure(level="warning")
    place = app or shared.app
    found, _ = find_app(shared, place)
    if not found.registry:
        raise UsageError("no workflow is known here: name MODULE:APP, or --import MODULE")
    if workflow is not None:
        found.registry.require(workflow)
    if from_file is not None:
        return await _judge(found, shared, _read(from_file), None)
    async with connected(found, shared, place):
        runs = stored(found.store, found.pool, found.registry, workflow=workflow, status=_statuses(status), limit=limit)
        with _opened(export) as file:
            return await _judge(found, shared, runs, file)


async def _judge(app: AsyncDurable, shared: Shared, runs: AsyncIterator[Recording], file: IO[str] | None) -> int:
    """Replay one after the other, and show what comes of each; the exit code."""
    counts: Counter[Fit] = Counter()
    guard = Guard()
    try:
        async with aclosing(runs) as recordings:  # type: ignore[type-var]  # both are generators
            async for recording in recordings:
                if file is not None:
                    file.write(f"{to_line(recording)}\n")
                verdict = replayed(recording, app.registry, guard)
                counts[verdict.fit] += 1
                _show(shared, verdict)
    finally:
        guard.close()
    told = ", ".join(f"{counts[fit]} {SAID[fit]}" for fit in Fit if counts[fit])
    return say(f"{counts.total()} runs replayed{': ' if told else ''}{told}", _code(counts))


def _code(counts: Counter[Fit]) -> int:
    return FAILED if counts[Fit.DIVERGED] or counts[Fit.FAULT] else DONE


def _show(shared: Shared, verdict: Verdict) -> None:
    run = verdict.run
    if shared.json:
        output.print_json(_line(verdict))
    elif not verdict.fits:
        print(f"{run.id}  {printable(run.workflow)} {printable(run.version)}, {run.status}: {verdict.fit}")
        if verdict.expected is not None:
            print(printable(f"  - {verdict.expected}\n  + {verdict.found}"))
        elif verdict.failure is not None:
            print(printable(f"  {verdict.failure.message}"))


def _line(verdict: Verdict) -> dict[str, Any]:
    run, failure = verdict.run, verdict.failure
    return {
        "id": run.id,
        "workflow": run.workflow,
        "version": run.version,
        "status": run.status,
        "verdict": verdict.fit,
        "expected": verdict.expected,
        "found": verdict.found,
        "message": failure.message if failure is not None else None,
    }


async def _read(path: str) -> AsyncIterator[Recording]:
    try:
        for recording in read_recordings(path):
            yield recording
    except OSError as error:
        raise UsageError(f"--from: cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _opened(path: str | None) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    try:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UsageError(f"--export: cannot write {path}: {error.strerror or error}") from error
    with file:
        yield file


def _statuses(given: tuple[str, ...]) -> list[str] | None:
    return [one.replace("-", "_") for one in given] or None
