"""The map of the rooms in pyproject.toml holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a process of its own: import-linter sets up logging, and disables every logger that it finds.
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_imports_flow_down_only() -> None:
    tree = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", LINT], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
