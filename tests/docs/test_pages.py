"""The pages hold together: links lead somewhere, generated parts are fresh, the first example needs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.pages import PAGES, ROOT, prose

from docs import generate

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = [link for link in LINK.findall(prose(page)) if not link.startswith("http") and not _leads(page, link)]
    assert lost == []


@pytest.mark.parametrize("name", generate.PARTS)
def test_generated_part_is_fresh(name: str) -> None:
    page = generate.page_of(name)
    text = page.read_text(encoding="utf-8")
    assert generate.renewed(text, name) == text, "run `python -m docs.generate`"


def test_every_marker_is_known() -> None:
    markers = {name for page in PAGES for name in generate.MARKER.findall(page.read_text(encoding="utf-8"))}
    assert markers == set(generate.PARTS)


def test_history_kinds_are_complete() -> None:
    assert generate.history_kinds_of_code() == set(generate.HISTORY)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_no_machine(page: Path) -> None:
    assert re.findall(r"/(?:work|home|root)/\S*", page.read_text(encoding="utf-8")) == []


def test_quickstart_needs_nothing(server_root: Path) -> None:
    """The README's first example as a newcomer runs it: no database anywhere, an empty folder."""
    known = {name: value for name, value in os.environ.items() if "DATABASE" not in name and name[:7] != "DURABLE"}
    quickstart = ROOT / "examples" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, quickstart],
        cwd=server_root,
        env=known,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "teapot shipped after a payment of 7900 cents\n"


def _leads(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return False
    return not anchor or anchor in {_anchor(heading) for heading in HEADING.findall(prose(target))}


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
