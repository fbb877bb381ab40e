"""How the values are made of which each step needs new ones.

Frozen to the type checker, which holds the whole package and its tests to that. At run time they are plain dataclasses
with slots: one that is frozen then, too, sets each of its fields by a call, which was a third of what the core costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:

    def value(*, frozen, slots):
        """``dataclasses.dataclass``, but for what freezes its fields."""
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["value"]
