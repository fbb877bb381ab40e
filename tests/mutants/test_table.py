"""The mutants still fit the source: each edit finds its text, and each test that must see one is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant) -> None:
    for edit in mutant.edits:
        found = (ROOT / edit.path).read_text().count(edit.old)
        assert found == edit.times, f"{edit.path} has {found} times, not {edit.times}:\n{edit.old}"
        assert edit.new != edit.old


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_are_there(mutant: Mutant) -> None:
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test
