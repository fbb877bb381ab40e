"""The map of the rooms (in words: CONTRIBUTING.md, in rules: pyproject.toml) holds: imports flow down only."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter import cli

TREE = Path(__file__).parents[2]


def test_imports_flow_down_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(TREE)
    status = cli.lint_imports(config_filename=str(TREE / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out
