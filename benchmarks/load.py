"""What a measurement is given, and the payload that all steps return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TEXT: Final = "x" * 90
"""A step returns ``{"text": TEXT}``: about 100 bytes of JSON."""
RESTING: Final = 0.02
"""Seconds in which worker and client come to rest before each single value: latencies are those of an idle system, of
each in the same way, for a disk that is left alone between two commits answers later than one that is not."""


@dataclass(frozen=True)
class Load:
    """How much is done.

    - `dsn`: a libpq URL of a database that is there for this measurement alone.
    - `runs`: how many, of `steps` steps each, for what is counted by the second; `in_flight`: how many of them at a
      time in each of `processes` worker processes.
    - `samples`: how many single values, where the time that one thing takes is measured.
    - `patience`: seconds after which a takeover is no longer waited for.
    """

    dsn: str
    runs: int
    steps: int
    in_flight: int = 32
    processes: int = 1
    samples: int = 100
    patience: float = 60.0
