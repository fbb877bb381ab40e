"""Every behaviour of the engines that durable replaces has a test that is marked with it, or a line that says why not.

The labels are those of ``behaviours.txt``. A test holds one by ``@pytest.mark.behaviour("RV-01")``; the lines are those
of ``docs/behaviours.md``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.docs.pages import ROOT

TESTS: Final = ROOT / "tests"
LABELS: Final = (TESTS / "docs" / "behaviours.txt").read_text(encoding="utf-8").split()
PAGE: Final = ROOT / "docs" / "behaviours.md"

_ROW: Final = re.compile(r"^\| ((?:[A-Z]{2}-[\d.]+)(?:, [A-Z]{2}-[\d.]+)*) \| (.+) \|$", re.MULTILINE)
_RANGE: Final = re.compile(r"([A-Z]{2})-(\d+)(?:\.\.(\d+))?")


def test_labels_are_known_once() -> None:
    assert len(LABELS) == len(set(LABELS)) == 269


def test_every_behaviour_has_a_test_or_a_reason() -> None:
    marked, explained = set(_marked()), set(_explained())
    neither = [label for label in LABELS if label not in marked | explained]
    assert neither == [], "mark a test with them, or say why not in docs/behaviours.md"


def test_none_has_both() -> None:
    assert sorted(set(_marked()) & set(_explained())) == [], "docs/behaviours.md says that they have no test"


def test_no_label_was_made_up() -> None:
    known = set(LABELS)
    made_up = [f"{label} in {', '.join(where)}" for label, where in _marked().items() if label not in known]
    assert made_up == []
    assert [label for label in _explained() if label not in known] == []


def test_every_reason_is_one() -> None:
    reasons = [reason.strip() for _, reason in _ROW.findall(PAGE.read_text(encoding="utf-8"))]
    assert reasons
    assert [reason for reason in reasons if len(reason.split()) < 4] == []
    assert [label for label, count in Counter(_explained()).items() if count > 1] == []


def test_the_text_of_the_page_is_read_in_full() -> None:
    """A row that the pattern does not match would be a label without a reason."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-Z]{2}-\d", line)]
    assert len(rows) == len(_ROW.findall(PAGE.read_text(encoding="utf-8")))


def _marked() -> dict[str, list[str]]:
    """Where each label is a mark of a test."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("*.py")):
        for label in _marks(path):
            found.setdefault(label, []).append(str(path.relative_to(ROOT)))
    return found


def _marks(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if "behaviour(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "behaviour":
            for argument in node.args:
                assert isinstance(argument, ast.Constant), f"{path}:{argument.lineno}: a label is a literal"
                assert isinstance(argument.value, str), f"{path}:{argument.lineno}: a label is a string"
                yield argument.value


def _explained() -> list[str]:
    """The labels of the page, one that stands in two lines twice."""
    return [label for labels, _ in _ROW.findall(PAGE.read_text(encoding="utf-8")) for label in _single(labels)]


def _single(labels: str) -> Iterator[str]:
    for engine, first, last in _RANGE.findall(labels):
        for number in range(int(first), int(last or first) + 1):
            yield f"{engine}-{number:0{len(first)}}"
