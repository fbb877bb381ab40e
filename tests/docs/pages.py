"""The pages of the documentation, taken apart: fenced blocks, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)

_FENCE: Final = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is where its body begins, counted from 1."""

    page: Path
    line: int
    info: str
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Program:
    """A ``python run`` block, and the ``python more``, ``sql run`` and ``output`` blocks that follow it."""

    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return str(self.blocks[0])


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("body")) + 1, found["info"].strip(), found["body"])
        for found in _FENCE.finditer(text)
    ]


def programs(page: Path) -> Iterator[Program]:
    """What of a page is executed."""
    current: list[Block] = []
    for block in blocks(page):
        if block.info == "python run":
            if current:
                yield Program(tuple(current))
            current = [block]
        elif block.info in ("python more", "sql run", "output"):
            assert current, f"{block} follows no `python run`"
            current.append(block)
    if current:
        yield Program(tuple(current))


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
