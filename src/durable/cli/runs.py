"""Starting runs and looking at them."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Annotated, Any

from cyclopts import Parameter

from durable.cli import output
from durable.cli.options import Shared, opened
from durable.cli.problems import DONE, FAILED, STILL_RUNNING, UsageError, printable, say
from durable.cli.reading import duration, json_value, tags
from durable.durable import AsyncDurable
from durable.errors import RunCanceled, RunFailed
from durable.snapshots import RunSnapshot
from durable.values import Status

PAGE = 500

Json = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
Many = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]


async def start(
    workflow: str,
    input: Json = None,  # noqa: A002  # the word of the facade
    /,
    *,
    key: str | None = None,
    tag: Many = (),
    version: str | None = None,
    id: str | None = None,  # noqa: A002
    priority: int = 0,
    delay: str | None = None,
    timeout: str | None = None,
    wait: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    wait_timeout: str | None = None,
    shared: Shared = Shared(),  # noqa: B008  # frozen
) -> int:
    """Start a run. The workflow must be known here, to check the input: --import its module, or --app.

    Prints the run's id; with --wait its result. Exits 0, with --wait 1 if the run fails or is canceled, and 3 if it is
    still going after --wait-timeout.

    Parameters
    ----------
    workflow
        Its name.
    input
        JSON; @FILE reads it from a file, - from standard input.
    key
        An id of your own, unique among the runs of this workflow: starting it again returns the same run.
    tag
        NAME=VALUE, to list by; NAME:=JSON for a number or true. May be given several times.
    version
        Default: the one that is defined last.
    id
        The run's UUID.
    priority
        Higher goes first.
    delay
        When it begins, from now: 30s, 5m, 1h30m, 2d.
    timeout
        How long it may take before it fails.
    wait
        Wait for its end.
    wait_timeout
        Wait at most so long.
    """
    given = json_value(input, "the input")
    labels, begin, limit = tags(tag), duration(delay, "--delay"), duration(timeout, "--timeout")
    duration(wait_timeout, "--wait-timeout")
    if shared.app is None and not shared.imports:
        raise UsageError(f"which {workflow!r}? Say where it is defined: --import MODULE, or --app MODULE:APP")
    async with opened(shared) as app:
        run = await app.start(
            workflow,
            given,
            version=version,
            id=id,
            key=key,
            tags=labels,
            priority=priority,
            delay=begin,
            timeout=limit,
        )
        if not (wait or wait_timeout):
            if shared.json:
                output.print_json({"id": run.id, "workflow": workflow})
            else:
                print(run.id)
            return DONE
        return await _wait(app, shared, str(run.id), wait_timeout)


async def status(
    run: str,
    /,
    *,
    children: int = 100,
    wait: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    wait_timeout: str | None = None,
    shared: Shared = Shared(),  # noqa: B008
) -> int:
    """Show a run. Exits 0 whatever its status is, 1 if there is no such run.

    With --wait the exit code is the run's: 0 completed, 1 failed or canceled, 3 still going after --wait-timeout (0 to
    ask at once).

    Parameters
    ----------
    run
        Its id.
    children
        Show at most so many of the runs that it has started, on each level.
    wait
        Wait for its end first.
    wait_timeout
        Wait at most so long.
    """
    async with opened(shared) as app:
        code = DONE
        if wait or wait_timeout:
            _, code = await _ended(app, run, wait_timeout)
        found = await app.status(run, children)
        _show(shared, found)
        return code


async def list_runs(
    *,
    status: Many = (),
    workflow: str | None = None,
    version: str | None = None,
    tag: Many = (),
    key: str | None = None,
    parent: str | None = None,
    limit: int = 50,
    after: str | None = None,
    shared: Shared = Shared(),  # noqa: B008
) -> int:
    """List the runs that match all options, the newest first. If there are more, standard error says how to go on.

    Parameters
    ----------
    status
        pending, running, suspended, paused, compensating, completed, failed, canceled; or what a suspended run does:
        delayed, retrying, sleeping, waiting-for-signal, waiting-for-child ... May be given several times.
    workflow
        The workflow's name.
    version
        Its version.
    tag
        NAME=VALUE, or NAME:=JSON. May be given several times.
    key
        The id of your own that the run was started with.
    parent
        The id of the run that started it.
    limit
        At most so many.
    after
        Where to go on, as the list before has said.
    """
    if limit < 1:
        raise UsageError(f"--limit is {limit}: at least 1")
    filters: dict[str, Any] = {
        "status": [one.replace("-", "_") for one in status] or None,
        "workflow": workflow,
        "version": version,
        "tags": tags(tag) or None,
        "key": key,
        "parent": parent,
    }
    async with opened(shared) as app:
        shown: list[RunSnapshot] = []
        rest = limit
        while True:
            page = await app.list(**filters, limit=min(rest, PAGE), after=after)
            rest, after = rest - len(page), page.next
            if shared.json:
                for run in page:
                    output.print_json(run)
            else:
                shown += page
            if after is None or rest == 0:
                break
        if not shared.json:
            output.show_runs(shown)
        if after is not None:
            print(f"there are more: --after {after}", file=sys.stderr)
        return DONE


async def watch(run: str, /, *, shared: Shared = Shared()) -> int:  # noqa: B008
    """Show a run now, and again after each change, until it has ended: a line each.

    The exit code is the run's: 0 completed, 1 failed or canceled.

    Parameters
    ----------
    run
        Its id.
    """
    async with opened(shared) as app, aclosing(app.watch(run)) as snapshots:
        last = None
        async for last in snapshots:
            if shared.json:
                output.print_json(last)
            else:
                output.show_change(last)
        assert last is not None  # or it would not have been found
        return DONE if last.status is Status.COMPLETED else FAILED


async def fork(
    run: str,
    /,
    *,
    from_step: Annotated[str | None, Parameter(name="--from")] = None,
    input: Json = None,  # noqa: A002
    shared: Shared = Shared(),  # noqa: B008
) -> int:
    """Start a run that has passed what this one had passed when it came to a step, and goes on from there.

    Prints the new run's id. The run itself stays as it is. Exits 2 if it has no such step, or can't be taken up there.

    Parameters
    ----------
    run
        The run's id.
    from_step
        A step, as `durable status RUN` shows it; all of a loop or a parallel runs again. Default: everything does.
    input
        Another input: JSON; @FILE reads it from a file, - from standard input. Checked if the workflow is known here.
    """
    given = json_value(input, "the input")
    async with opened(shared) as app:
        new = await app.fork(run, from_step, given)
    if shared.json:
        output.print_json({"id": new.id, "forked_from": run})
    else:
        print(new.id)
    return DONE


async def history(run: str, /, *, shared: Shared = Shared()) -> int:  # noqa: B008
    """Show all that happened to a run, in order: attempts, waits, messages, transitions.

    Parameters
    ----------
    run
        Its id.
    """
    async with opened(shared) as app:
        events = await app.history(run)
    if shared.json:
        for event in events:
            output.print_json(event)
    else:
        output.show_history(events)
    return DONE


async def _wait(app: AsyncDurable, shared: Shared, run: str, limit: str | None) -> int:
    """The result of a run, or its status if it has none."""
    result, code = await _ended(app, run, limit)
    found = await app.status(run)
    if shared.json:
        output.print_json({"id": run, "status": found.status, "result": result, "error": found.error})
    else:
        print(run)
        if code == DONE:
            print(printable(output.as_json(result)))
    return code


async def _ended(app: AsyncDurable, run: str, limit: str | None) -> tuple[Any, int]:
    """Wait; the result, and the exit code. Standard error says why there is no result."""
    try:
        return await app.result(run, duration(limit, "--wait-timeout")), DONE
    except (RunFailed, RunCanceled) as error:
        return None, say(str(error), FAILED)
    except TimeoutError as error:
        return None, say(str(error), STILL_RUNNING)


def _show(shared: Shared, run: RunSnapshot) -> None:
    if shared.json:
        output.print_json(run)
    else:
        output.show_run(run)
