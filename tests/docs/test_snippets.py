"""Every program in the documentation runs, and prints what the page says.

A block is marked by its info string: ``python run`` begins a program, ``python more`` and ``sql run`` go on with it,
``output`` is what it has printed since the last one. Blocks that are plain ``python`` only have to compile.
"""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import psycopg
import pytest
from tests.docs.pages import PAGES, ROOT, Block, Program, blocks, programs

from durable import Durable

RUN = [program for page in PAGES for program in programs(page)]
PYTHON = [block for page in PAGES for block in blocks(page) if block.info.split(" ")[0] in ("python", "py")]


@pytest.mark.parametrize("program", RUN, ids=str)
def test_runs(
    program: Program,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DATABASE_URL", dsn)
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    try:
        for block in program.blocks:
            match block.info:
                case "output":
                    assert capsys.readouterr().out == block.body, f"{block} prints something else"
                case "sql run":
                    with psycopg.connect(dsn) as connection:
                        connection.execute(block.body.encode())
                case _:
                    exec(_compiled(block), vars(module))
    finally:
        for value in list(vars(module).values()):
            if isinstance(value, Durable):
                value.close()


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_compiles(block: Block) -> None:
    """A block that begins with a dot is a piece of a builder's chain; one that awaits, of an async function."""
    is_chain = block.body.startswith(".")
    body = f"(app\n{block.body})" if is_chain else block.body
    compile(body, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def test_info_strings_are_known() -> None:
    known = {"python", "python run", "python more", "sql", "sql run", "output", "text", "console", "mermaid", "ini"}
    known |= {"toml", "yaml", "json"}
    strange = [f"{block}: {block.info!r}" for page in PAGES for block in blocks(page) if block.info not in known]
    assert strange == []


def test_quickstart_is_the_one_in_the_readme() -> None:
    first = next(programs(ROOT / "README.md")).blocks[0]
    assert first.body == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


def _compiled(block: Block) -> types.CodeType:
    """With the page's own line numbers in tracebacks."""
    return compile("\n" * (block.line - 1) + block.body, str(block.page), "exec", dont_inherit=True)
