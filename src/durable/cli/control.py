"""Telling runs what to do, and keeping house. Each answers 0 if it was done, 1 if the run refused."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from durable.cli import output
from durable.cli.options import Shared, opened
from durable.cli.problems import DONE, UsageError, printable, say
from durable.cli.reading import duration, json_value
from durable.durable import AsyncDurable

Json = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


async def signal(
    run: str,
    name: str,
    payload: Json = None,
    /,
    *,
    id: str | None = None,  # noqa: A002  # the word of the facade
    shared: Shared = Shared(),  # noqa: B008  # frozen
) -> int:
    """Send a signal. It is kept until a wait takes it, whether that has begun or not. Exits 1 if the run has ended.

    Parameters
    ----------
    run
        The run's id.
    name
        The signal's name.
    payload
        JSON; @FILE reads it from a file, - from standard input.
    id
        The same one twice is one signal.
    """
    body = json_value(payload, "the payload")
    async with opened(shared) as app:
        if await app.signal(run, name, body, id=id):
            return _did(shared, run, f"signal {name!r} is sent", signal=name)
        return await _refused(app, run, "takes no signals any more")


async def resume(run: str, name: str | None = None, data: Json = None, /, *, shared: Shared = Shared()) -> int:  # noqa: B008
    """Answer a run that waits now for this signal, or on this step; without a name: end its pause.

    Strict: exits 1, and nothing is changed, unless the run waits for exactly this.

    Parameters
    ----------
    run
        The run's id.
    name
        The signal, or the step (node/branch) that has suspended the run.
    data
        JSON; @FILE reads it from a file, - from standard input.
    """
    body = json_value(data, "the data")
    async with opened(shared) as app:
        answer = await app.resume(run, name, body)
        if answer.accepted:
            return _did(shared, run, "goes on", status=answer.status)
        return await _refused(app, run, "is not paused" if name is None else f"does not wait for {name!r} now")


async def pause(run: str, /, *, shared: Shared = Shared()) -> int:  # noqa: B008
    """Hold a run after the step in progress; `durable resume RUN` takes it up again. Exits 1 if it can't be held.

    Parameters
    ----------
    run
        The run's id.
    """
    async with opened(shared) as app:
        if await app.pause(run):
            return _did(shared, run, "is held after the step in progress")
        return await _refused(app, run, "can't be paused")


async def cancel(
    run: str,
    /,
    *,
    reason: str | None = None,
    compensate: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    shared: Shared = Shared(),  # noqa: B008
) -> int:
    """Stop a run and its children now. Exits 1 if it has ended already.

    Parameters
    ----------
    run
        The run's id.
    reason
        Why; kept with the run.
    compensate
        Undo first what it has done.
    """
    async with opened(shared) as app:
        if await app.cancel(run, reason=reason, compensate=compensate):
            return _did(shared, run, "is rolled back, then canceled" if compensate else "is canceled")
        return await _refused(app, run, "can't be canceled")


async def retry(run: str, /, *, shared: Shared = Shared()) -> int:  # noqa: B008
    """Take a failed run up again at the step that failed, with fresh attempts.

    Exits 1 if it has not failed, or if it was undone: then start anew.

    Parameters
    ----------
    run
        The run's id.
    """
    async with opened(shared) as app:
        await app.retry(run)
        return _did(shared, run, "goes on at the step that failed")


async def recover(*, shared: Shared = Shared()) -> int:  # noqa: B008
    """Put back what crashed, fell due or was never heard of, once. Every worker does it all the time."""
    async with opened(shared) as app:
        count = await app.recover()
    _say(shared, f"{count} runs were put back", recovered=count)
    return DONE


async def purge(*, older_than: str, shared: Shared = Shared()) -> int:  # noqa: B008
    """Delete runs, with their children and history, that ended longer ago than this. There is no way back.

    Parameters
    ----------
    older_than
        30d, 12h, 90m ...
    """
    age = duration(older_than, "--older-than")
    if age is None:
        raise UsageError("--older-than is needed, as in 30d")
    async with opened(shared) as app:
        count = await app.purge(age)
    _say(shared, f"{count} runs were deleted", purged=count)
    return DONE


def _did(shared: Shared, run: str, text: str, **facts: object) -> int:
    _say(shared, f"run {run}: {text}", run=run, **facts)
    return DONE


def _say(shared: Shared, text: str, **facts: object) -> None:
    if shared.json:
        output.print_json(facts)
    else:
        print(printable(text))


async def _refused(app: AsyncDurable, run: str, why: str) -> int:
    """No; and how the run stands."""
    now = await app.status(run, 0)
    waits = f" {now.waiting_name!r}" if now.waiting_name else ""
    return say(f"run {run} {why}: it is {now.derived.replace('_', ' ')}{waits}")
