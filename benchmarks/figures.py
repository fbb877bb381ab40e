"""How numbers are shown."""

from __future__ import annotations


def amount(value: float) -> str:
    """With three digits that matter: ``1,234``, ``12.3``, ``0.123``."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def times(value: float | None) -> str:
    """A ratio: ``1.23 x``."""
    return "-" if value is None else f"{amount(value)} x"


def table(head: list[str], rows: list[list[str]], left: int = 2) -> str:
    """A table in Markdown; all but the first `left` columns stand on the right."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))
