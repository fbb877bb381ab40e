"""The parts of the pages that come from the code: ``python -m docs.generate`` writes them anew.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A test fails when one is stale.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from durable import errors
from durable.engine.points import Point
from durable.snapshots import DERIVED
from durable.store import history
from durable.values import ENDED, MOVES, Status, WaitingFor

HERE: Final = Path(__file__).resolve().parent
MARKER: Final = re.compile(r"<!-- generated: ([\w-]+) -->")

WAITS: Final[Mapping[WaitingFor, str]] = {
    WaitingFor.START: "the `delay=` given at start",
    WaitingFor.RETRY: "the time of a step's next attempt",
    WaitingFor.SLEEP: "the end of a `.sleep`",
    WaitingFor.SIGNAL: "a signal, or the timeout of its wait",
    WaitingFor.RESUME: "`resume()` of a step that returned `Suspend`",
    WaitingFor.CHILD: "the end of a child workflow",
    WaitingFor.ROLLBACK: "a child that is being rolled back",
    WaitingFor.DEFINITION: "a worker that knows this workflow and version",
    WaitingFor.PERSON: "a person: the code no longer has what the run has passed",
}

HISTORY: Final[Mapping[str, str]] = {
    "created": "the run was started",
    "started": "a worker took it up for the first time",
    "suspended": "it was parked; `data` says what for",
    "paused": "`pause()` took effect",
    "resumed": "it goes on after a pause, or by `retry()`",
    "compensating": "its rollback began",
    "completed": "it ended well",
    "failed": "it failed; `error` says why",
    "canceled": "it was canceled",
    "attempt_started": "an attempt at a step began",
    "attempt_succeeded": "the attempt returned; `payload` is the result",
    "attempt_failed": "the attempt failed; `next_attempt_at` says when the next one is due",
    "attempt_interrupted": "it was ended from outside: its worker died or stopped, or the run was canceled",
    "sleep_waiting": "a sleep began",
    "sleep_elapsed": "it is over",
    "wait_waiting": "a wait for a signal, a child or `resume()` began",
    "wait_satisfied": "what it waited for has come; `payload` is what it brought",
    "wait_timed_out": "it did not come in time",
    "message_received": "a signal arrived in the run's inbox",
    "compensated": "a step was undone",
    "compensation_failed": "its compensator gave up",
}


def diagram() -> str:
    """The legal moves as a diagram."""
    lines = ["stateDiagram-v2", "    [*] --> pending"]
    lines += [f"    {status} --> {to}" for status, moves in MOVES.items() for to in _in_order(moves)]
    lines += [f"    {status} --> [*]" for status in Status if status in ENDED]
    return "```mermaid\n" + "\n".join(lines) + "\n```"


def moves() -> str:
    """The legal moves as a table."""
    rows = [(f"`{status}`", ", ".join(f"`{to}`" for to in _in_order(to)) or "nothing") for status, to in MOVES.items()]
    return _table(("from", "to"), rows)


def waits() -> str:
    """What a parked run can wait for."""
    rows = [(f"`{wait}`", f"`{DERIVED[wait]}`", WAITS[wait]) for wait in WaitingFor]
    return _table(("`waiting_for`", "in `list(status=...)`", "the run waits for"), rows)


def history_kinds() -> str:
    """The kinds of a HistoryEvent."""
    return _table(("kind", "meaning"), [(f"`{kind}`", text) for kind, text in HISTORY.items()])


def history_kinds_of_code() -> set[str]:
    """The kinds that the code can give: those of the life of a run, and every name that looks like one."""
    tree = ast.parse(inspect.getsource(history))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    looks = re.compile(r"(?:attempt|sleep|wait|compensation|message)_[a-z_]+|compensated")
    told = {text for text in texts if looks.fullmatch(text)} - {"message_id"}  # which is a column
    told |= {"attempt_failed", "attempt_interrupted"}  # these two are put together there
    return {*history._LIFECYCLE, *told} - {"branch_discarded"}  # nothing discards branches yet


def error_table() -> str:
    """Every error, below the one that it is a kind of."""
    rows: list[tuple[str, ...]] = []

    def add(cls: type[BaseException], depth: int) -> None:
        rows.append((f"{'&nbsp;&nbsp;' * depth}`{cls.__name__}`", _first_lines(cls)))
        for below in cls.__subclasses__():
            if below.__module__ in ("durable.errors", "durable.handles"):
                add(below, depth + 1)

    import durable.handles  # noqa: F401 - RetryRefused is defined there

    add(errors.DurableError, 0)
    return _table(("error", "when"), rows)


def points() -> str:
    """The instants at which the crash tests kill a worker."""
    told = dict(re.findall(r'= "(\w+)"  # (.+)', inspect.getsource(Point)))
    return _table(("point", "what has happened there"), [(f"`{point}`", told[point.value]) for point in Point])


def command_line() -> str:
    """The commands, and the help of each."""
    from durable.cli import COMMANDS

    rows = [(f"[`durable {name}`](#durable-{name})", text) for _, name, _, text in COMMANDS]
    parts = [_table(("command", "what it does"), rows)]
    for _, name, _, _ in COMMANDS:
        parts.append(f"### durable {name}\n\n```text\n{_help(name)}\n```")
    return "\n\n".join(parts)


PARTS: Final[Mapping[str, tuple[str, Callable[[], str]]]] = {
    "diagram": ("lifecycle.md", diagram),
    "moves": ("lifecycle.md", moves),
    "waits": ("lifecycle.md", waits),
    "history": ("lifecycle.md", history_kinds),
    "errors": ("errors.md", error_table),
    "points": ("architecture.md", points),
    "command-line": ("command-line.md", command_line),
}


def page_of(name: str) -> Path:
    return HERE / PARTS[name][0]


def renewed(text: str, name: str) -> str:
    """`text` with its part `name` as it must be now."""
    begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
    before, found, rest = text.partition(begin)
    if not found:
        raise LookupError(f"{page_of(name)} has no {begin}")
    _, found, after = rest.partition(end)
    if not found:
        raise LookupError(f"{page_of(name)} has no {end} after {begin}")
    return f"{before}{begin}\n\n{PARTS[name][1]()}\n\n{end}{after}"


def main() -> None:
    for name in PARTS:
        page = page_of(name)
        page.write_text(renewed(page.read_text(encoding="utf-8"), name), encoding="utf-8")


def _in_order(statuses: frozenset[Status]) -> list[Status]:
    return [status for status in Status if status in statuses]


def _first_lines(cls: type) -> str:
    """The first paragraph of its docstring, in one line of Markdown."""
    text = " ".join(inspect.getdoc(cls).split("\n\n")[0].split()) if inspect.getdoc(cls) else ""  # type: ignore[union-attr]
    return text.replace("``", "`").replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _help(name: str) -> str:
    """What ``durable NAME --help`` prints, at a fixed width and without colours."""
    from rich.console import Console

    from durable.cli import build

    out = io.StringIO()
    build().help_print([name], console=Console(file=out, width=110, color_system=None, legacy_windows=False))
    own, _, _ = out.getvalue().partition("\nThe database: ")  # what follows is the same for all commands
    return "\n".join(line.rstrip() for line in own.strip().splitlines())


if __name__ == "__main__":
    main()
