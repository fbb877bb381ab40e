"""What a system has, before anything is measured:

    python -m benchmarks.ask SYSTEM

The last line of its output is JSON: ``{"cases": [...], "settings": "...", "versions": {...}}``, or
``{"unusable": "why"}`` if what the system needs is not installed.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.cases import SYSTEMS
from benchmarks.measure import imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    try:
        system = imported(parser.parse_args().system)
        answer = {"cases": list(system.CASES), "settings": system.SETTINGS, "versions": system.versions()}
    except ImportError as error:
        answer = {"unusable": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
