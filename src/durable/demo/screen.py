"""What one sees: a live table on a terminal, plain lines elsewhere; at the end the result, as tables or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from durable.demo.audit import CHECKS
from durable.demo.crew import Hand
from durable.demo.look import Standing
from durable.snapshots import RunSnapshot

if TYPE_CHECKING:
    from durable.demo.stage import Outcome

STATES: Final = {
    "pending": ("not begun", "dim"),
    "running": ("running", "cyan"),
    "retry": ("waiting to retry", "yellow"),
    "sleep": ("being packed (sleeping)", "blue"),
    "signal": ("waiting for approval", "magenta"),
    "compensating": ("being rolled back", "yellow"),
    "completed": ("completed", "green"),
    "failed": ("failed and rolled back", "red"),
}
REASONS: Final = {
    "InvalidOrder": "unknown product, or nothing ordered",
    "CardDeclined": "the bank refused the card",
    "OutOfStock": "sold out",
    "NoCarrier": "no carrier goes there",
    "Rejected": "large, and not approved",
    "MailRefused": "shipped, but the customer can't be notified",
}


class Screen:
    """Plain lines, one a second."""

    def __init__(self, console: Console, *, json: bool = False) -> None:
        self._console, self._json = console, json
        self._next = 0.0

    def say(self, text: str, *, alarm: bool = False) -> None:
        self._console.print(Text(text, style="bold red" if alarm else ""))

    def show(self, standing: Standing, hands: Sequence[Hand], seconds: float) -> None:
        if time.monotonic() < self._next and standing.ended < standing.total:
            return
        self._next = time.monotonic() + 1
        parts = [
            f"{standing.states[state]} {name}" for state, (name, _) in STATES.items() if standing.states.get(state)
        ]
        self._console.print(f"{seconds:5.1f} s  {', '.join(parts)}")

    def conclude(self, outcome: Outcome) -> None:
        if self._json:
            sys.stdout.write(json.dumps(_facts(outcome)) + "\n")
            return
        self._console.print(_endings(outcome.runs))
        self._console.print(_books(outcome))
        self._console.print(_summary(outcome))


class LiveScreen(Screen):
    """A table that changes; what was said stays above it."""

    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live

    def show(self, standing: Standing, hands: Sequence[Hand], seconds: float) -> None:
        self._live.update(_live_table(standing, hands, seconds))


@contextmanager
def screen(*, json: bool = False) -> Iterator[Screen]:
    """What fits this standard output. With JSON there, the rest goes to standard error."""
    console = Console(highlight=False, markup=False, file=sys.stderr if json else sys.stdout, soft_wrap=True)
    if json or not console.is_terminal:
        yield Screen(console, json=json)
        return
    with Live(console=console, refresh_per_second=10) as live:
        yield LiveScreen(console, live)


def _live_table(standing: Standing, hands: Sequence[Hand], seconds: float) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for state, (name, style) in STATES.items():
        count = standing.states.get(state, 0)
        table.add_row(Text(name, style=style), str(count), ProgressBar(total=standing.total, completed=count, width=40))
    names = ", ".join(f"{hand.number} (process {hand.pid})" for hand in hands)
    return Group(table, Text(f"{seconds:.1f} s, workers: {names}", style="dim"))


def _endings(runs: Sequence[RunSnapshot]) -> Table:
    table = Table(
        "ended", "orders", "at step", "why", box=SIMPLE_HEAD, title="How the runs ended", title_justify="left"
    )
    counted = Counter((run.derived, _step(run), _reason(run)) for run in runs)
    for (state, step, reason), count in sorted(counted.items(), key=lambda one: (one[0][0], -one[1])):
        style = STATES.get(state, ("", "red"))[1]
        table.add_row(Text(state.replace("_", " "), style=style), str(count), step, REASONS.get(reason, reason))
    return table


def _books(outcome: Outcome) -> Table:
    table = Table("", "audit of the books", "", box=SIMPLE_HEAD)
    wrong = Counter(finding.check for finding in outcome.findings)
    for check, text in CHECKS.items():
        good = not wrong[check]
        table.add_row(Text("ok" if good else "WRONG", style="green" if good else "bold red"), text,
                      "" if good else f"{wrong[check]} findings")  # fmt: skip
    return table


def _summary(outcome: Outcome) -> Text:
    lines = [str(finding) for finding in outcome.findings[:20]]
    if outcome.killed is None:
        lines.append("No worker was killed: the orders were done before one had anything in its hands.")
    elif outcome.taken_over_after is not None:
        lines.append(
            f"One worker was killed; its runs were taken over after {outcome.taken_over_after:.1f} s, "
            f"{outcome.interrupted} attempts that it had begun were run again."
        )
    verdict = "The books add up." if outcome.ok else f"The books do not add up: {len(outcome.findings)} findings."
    lines.append(f"{len(outcome.runs)} orders in {outcome.seconds:.1f} s. {verdict}")
    if outcome.runs:
        example = next((run for run in outcome.runs if _reason(run) == "MailRefused"), outcome.runs[0])
        lines += ["", "It is all still there:", "  durable list --status failed", f"  durable history {example.id}"]
    return Text("\n".join(lines), style="" if outcome.ok else "red")


def _facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "batch": outcome.batch,
        "ok": outcome.ok,
        "seconds": round(outcome.seconds, 3),
        "killed": outcome.killed,
        "taken_over_after": outcome.taken_over_after,
        "interrupted": outcome.interrupted,
        "endings": Counter(_reason(run) or run.derived for run in outcome.runs),
        "findings": [str(finding) for finding in outcome.findings],
    }


def _step(run: RunSnapshot) -> str:
    return (run.error.step or "") if run.error else ""


def _reason(run: RunSnapshot) -> str:
    return run.error.type.rpartition(".")[2] if run.error else ""
