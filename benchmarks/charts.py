"""The results as charts: SVG files, the same for the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import growth
from benchmarks.cases import CASES, LATENCIES, STEPS, SYSTEMS
from benchmarks.results import Results

COLOURS: Final = dict(zip(SYSTEMS, ("#888888", "#0b5fa5", "#58a4d8", "#c2410c", "#7a9a01", "#8e44ad"), strict=True))
SIZE: Final = (7.0, 4.2)
MILLISECONDS: Final = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
STEPS_IN: Final = {"one_step": 1, "ten_step": 10, "fifty_step": 50}

Chart = Callable[[Any, Results], bool]
"""Draws on the pyplot that it is given; whether there was anything to draw."""


def write(results: Results, folder: Path) -> list[Path]:
    """Write all charts for which there are results; returns where. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "durable", "svg.fonttype": "none", "font.size": 10, "figure.dpi": 100})
    from matplotlib import pyplot as plt

    written = []
    for name, draw in CHARTS.items():
        if draw(plt, results):
            path = folder / f"{name}.svg"
            plt.tight_layout()
            plt.savefig(path, metadata={"Date": None})
            written.append(path)
        plt.close("all")
    return written


def steps_in_a_run(plot: Any, results: Results) -> bool:
    """Of durable by all lengths that were measured, of the others by the three of the cases."""
    line = growth.LINES["growth_steps"]
    plot.figure(figsize=SIZE)
    drawn = [_line(plot, system, line.settings, line.values(results, system)) for system in line.systems]
    for system in SYSTEMS:
        if system in line.systems and any(drawn):
            continue
        drawn.append(_line(plot, system, list(STEPS_IN.values()), [results.value(case, system) for case in STEPS]))
    return _by_number(plot, drawn, "steps in a run")


def runs_in_flight(plot: Any, results: Results) -> bool:
    return _growth_line(plot, results, "growth_in_flight", "runs in flight")


def worker_processes(plot: Any, results: Results) -> bool:
    line = growth.LINES["growth_processes"]
    plot.figure(figsize=SIZE)
    systems = [system for system in line.systems if any(line.values(results, system))]
    width = 0.8 / max(1, len(line.settings))
    for place, setting in enumerate(line.settings):
        values = [line.values(results, system)[place] or 0 for system in systems]
        at = [number + (place - (len(line.settings) - 1) / 2) * width for number in range(len(systems))]
        bars = plot.bar(at, values, width * 0.92, label=f"{setting} process{'es' if setting > 1 else ''}")
        plot.bar_label(bars, [f"{value:,.0f}" if value else "-" for value in values], fontsize=8)
    plot.xticks(range(len(systems)), systems)
    plot.ylabel("steps a second")
    plot.title("Steps a second, by worker processes")
    if systems:
        plot.legend()
    return bool(systems)


def table_size(plot: Any, results: Results) -> bool:
    """How many times as slow on a full database."""
    plot.figure(figsize=SIZE)
    names, values = [], []
    for kept, cases in growth.KEPT.values():
        for case in cases:
            slow = growth.slowdown(results, case, kept)
            if slow is not None:
                names.append(f"{case}, {kept}")
                values.append(slow)
    bars = plot.barh(range(len(values)), values, 0.7, color=COLOURS["durable"])
    plot.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    plot.axvline(1, color="#888888", linewidth=0.8)
    plot.yticks(range(len(names)), names, fontsize=8)
    plot.gca().invert_yaxis()
    plot.xlabel("as slow as on an empty database")
    beside = [growth.beside(kept, results.size) for kept, _ in growth.KEPT.values()]
    plot.title(
        "\n".join(f"{kept}: {what}" for (kept, _), what in zip(growth.KEPT.values(), beside, strict=True)), fontsize=9
    )
    return bool(values)


def latencies(plot: Any, results: Results) -> bool:
    """The share of runs that took no longer."""
    _, panels = plot.subplots(1, len(LATENCIES), figsize=(11, 4), sharey=True)
    drawn = False
    for panel, case in zip(panels, LATENCIES, strict=True):
        for system in SYSTEMS:
            samples = sorted(results.samples(case, system))
            if samples:
                shares = [(number + 1) / len(samples) for number in range(len(samples))]
                panel.step(samples, shares, where="post", label=system, color=COLOURS[system])
                drawn = True
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        ticks = [tick for tick in MILLISECONDS if low <= tick <= high]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("ms")
        panel.set_title(f"{case}: {CASES[case].title.removesuffix(', p50')}", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of runs that took no longer")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if drawn:
        panels[-1].legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    return drawn


def _growth_line(plot: Any, results: Results, name: str, label: str) -> bool:
    line = growth.LINES[name]
    plot.figure(figsize=SIZE)
    drawn = [_line(plot, system, line.settings, line.values(results, system)) for system in line.systems]
    return _by_number(plot, drawn, label)


def _line(plot: Any, system: str, settings: Sequence[int], values: Sequence[float | None]) -> bool:
    known = [(setting, value) for setting, value in zip(settings, values, strict=True) if value is not None]
    if known:
        plot.plot(*zip(*known, strict=True), marker="o", label=system, color=COLOURS[system])
    return bool(known)


def _by_number(plot: Any, drawn: Sequence[bool], label: str) -> bool:
    if not any(drawn):
        return False
    plot.xscale("log")
    plot.yscale("log")
    settings = sorted({int(x) for line in plot.gca().get_lines() for x in line.get_xdata()})
    plot.xticks(settings, [str(setting) for setting in settings])
    plot.minorticks_off()
    low, high = plot.gca().get_ylim()
    ticks = [tick for power in range(1, 6) for tick in (10**power, 3 * 10**power) if low <= tick <= high]
    plot.yticks(ticks, [f"{tick:,}" for tick in ticks])
    plot.xlabel(label)
    plot.ylabel("steps a second")
    plot.title(f"Steps a second, by {label}")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    return True


CHARTS: Final[dict[str, Chart]] = {
    "steps_in_a_run": steps_in_a_run,
    "runs_in_flight": runs_in_flight,
    "worker_processes": worker_processes,
    "table_size": table_size,
    "latencies": latencies,
}
