"""What the programs of the measures beside the cases have in common: their command line, and their answer."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from benchmarks.cases import Size


def main(measure: Callable[[str, Size], Coroutine[Any, Any, dict[str, Any]]], about: str | None) -> None:
    """Measure on the database that the command line names; the last line of the output is the answer, as JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--size", choices=("full", "quick"), required=True)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.dsn, given.size))))
