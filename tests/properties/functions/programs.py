"""Programs: workflows as values, made of every operation that a body has, nested up to three deep.

A program is the input of one workflow, whose body walks it (`interpreter.py`). So hypothesis can draw thousands of
workflows, and make one that fails small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from hypothesis import strategies as st

DEPTH: Final = 3
LATER: Final = 200
"""Longer, in seconds, than all that the innermost parts can wait; for each level more, so many times longer."""


@dataclass(frozen=True)
class Op:
    """One operation: `do` names it, `how` its variant, `parts` the programs within it: branches, items, one body.
    `id` is its own in the whole program. `size`: of a race and a map, the seconds by which the next is late; of a loop
    and of a going back, how many times."""

    do: str
    id: int
    how: str = ""
    parts: tuple[tuple[Op, ...], ...] = ()
    size: int = 0


@dataclass(frozen=True)
class Program:
    """A workflow: its operations, and how it ends. `again`: what it continues as."""

    ops: tuple[Op, ...]
    end: str = "return"
    again: tuple[Op, ...] | None = None


LEAVES: Final[dict[str, tuple[str, ...]]] = {
    "step": ("ok", "flaky", "caught", "compensated", "flaky compensated", "ephemeral", "unnamed", "suspends", "raises"),
    "try_step": ("ok", "fails", "fatal"),
    "sleep": ("short", "past"),
    "sleep_until": ("later", "past"),
    "signal": ("before", "after", "timeout", "default"),
    "receive": ("before", "after", "timeout", "complete"),
    "facts": ("now", "random", "uuid"),
    "patched": ("",),
    "send": ("",),
    "start": ("",),
}
"""Operations without parts, and their variants. A step that ``raises`` ends a part whose failure is caught."""

COMPOSITES: Final[dict[str, tuple[str, ...]]] = {
    "block": ("plain", "retried", "exhausted"),
    "try_block": ("",),
    "join": ("",),
    "race": ("decided", "open"),
    "loop": ("state", "stateless", "short"),
    "child": ("plain", "compensated"),
    "map": ("all", "failures", "narrow", "first"),
    "back": ("",),
}
"""Operations with parts. A block is `retried` until it succeeds, or `exhausted` by a child that fails each time. A race
is `decided` if all but its first branch sleep for long before they do anything; the winner of an `open` one is whose
last step ends first. `back` is a checkpoint, a part, and ``Rollback(to=...)``."""

CATCHES: Final = frozenset({"try_block", "join", "race", "child", "map"})
"""Composites that answer a failure within them by a value."""


@dataclass
class Making:
    """What is drawn from. `ids` numbers the operations of one program; `races`: the kinds of race that there may be."""

    draw: st.DrawFn
    races: tuple[str, ...] = COMPOSITES["race"]

    def __post_init__(self) -> None:
        self._ids = count(1)

    def ops(self, depth: int, *, most: int = 3, in_branch: bool = False, caught: bool = False) -> tuple[Op, ...]:
        """A sequence of operations at this depth."""
        many = self.draw(st.integers(1, most))
        found = [self.op(depth, in_branch=in_branch) for _ in range(many)]
        if caught and self.draw(st.integers(0, 3)) == 3:
            found.append(self.leaf("step", "raises"))
        return tuple(found)

    def op(self, depth: int, *, in_branch: bool) -> Op:
        kinds = [*LEAVES, "step"]
        if depth <= DEPTH:
            kinds += [*COMPOSITES] * (2 if depth == 1 else 1)
        if in_branch:
            kinds = [kind for kind in kinds if kind != "back"]
        do = self.draw(st.sampled_from(kinds))
        if do in LEAVES:
            return self.leaf(do, self.draw(st.sampled_from([how for how in LEAVES[do] if how != "raises"])))
        variants = self.races if do == "race" else COMPOSITES[do]
        return self.composite(do, self.draw(st.sampled_from(variants)), depth, in_branch=in_branch)

    def leaf(self, do: str, how: str) -> Op:
        return Op(do, next(self._ids), how)

    def composite(self, do: str, how: str, depth: int, *, in_branch: bool) -> Op:
        own = next(self._ids)
        branches = do in ("join", "race", "map")
        many = self.draw(st.integers(2 if do == "race" else 1, 3)) if branches else 1
        most = 2
        inner = in_branch or do in ("join", "race")
        if do in ("child", "map"):  # runs of their own
            inner = False
        caught = do in CATCHES
        parts = [self.ops(depth + 1, most=most, in_branch=inner, caught=caught) for _ in range(many)]
        if how == "retried":
            parts[0] = (*parts[0], self.leaf("step", "unlucky"))
        if how == "exhausted":
            fails = Op("child", next(self._ids), "uncaught", ((self.leaf("step", "raises"),),))
            parts[0] = (*parts[0], fails)
        return Op(do, own, how, tuple(parts), self.size(do, depth))

    def size(self, do: str, depth: int) -> int:
        match do:
            case "loop":
                return self.draw(st.integers(1, 3))
            case "back":
                return self.draw(st.integers(1, 2))
            case "race" | "map":
                return int(LATER ** (DEPTH + 1 - depth))
            case _:
                return 0


@st.composite
def programs(draw: st.DrawFn, *, ends: tuple[str, ...] = ("return",), decided: bool = False) -> Program:
    """Programs that end so; `decided`: with races only whose winner does not depend on who is faster."""
    making = Making(draw, ("decided",) if decided else COMPOSITES["race"])
    ops, end = making.ops(1, most=3), draw(st.sampled_from(ends))
    again = making.ops(DEPTH) if end == "again" else None
    return Program(ops, end, again)


def every(ops: tuple[Op, ...], outer: str = "") -> Iterator[tuple[str, Op]]:
    """All operations, each with what it is in."""
    for op in ops:
        yield outer, op
        for part in op.parts:
            yield from every(part, op.do)


class Seen:
    """How often each operation, and each pair of outer and inner one, occurred."""

    def __init__(self) -> None:
        self.programs = 0
        self.ops: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()

    def add(self, program: Program) -> None:
        self.programs += 1
        for outer, op in every((*program.ops, *(program.again or ()))):
            self.ops[f"{op.do} {op.how}".strip()] += 1
            if outer:
                self.pairs[outer, op.do] += 1

    def tell(self, what: str) -> list[str]:
        """Lines to read."""
        ops = ", ".join(f"{name} {n}" for name, n in sorted(self.ops.items()))
        rows = [
            f"  in {outer}: " + ", ".join(f"{do} {self.pairs[outer, do]}" for do in [*LEAVES, *COMPOSITES])
            for outer in COMPOSITES
        ]
        return [f"{what}: {self.programs} programs", f"  {ops}", *rows]
