"""The types of results: what ``ctx.results[node]`` and ``run.result()`` are loaded as."""

from __future__ import annotations

import contextlib
import json
from functools import lru_cache
from typing import Any, assert_never

from typing_extensions import TypedDict

from durable.define.nodes import (
    RAISE,
    ChildWorkflow,
    Loop,
    Node,
    Parallel,
    Route,
    Sleep,
    Step,
    WaitForSignal,
    Workflow,
)
from durable.define.payload import ANY, Schema
from durable.errors import PayloadError
from durable.values import JsonText


def load_result(node: Node, text: JsonText) -> Any:
    """The result of a node from its journal text, as the types that its handlers declare; a child's as plain JSON.

    Raises PayloadError if the text does not match, as after an incompatible change of a type.
    """
    match node:
        case Step():
            return node.work.result.load(text)
        case Parallel():
            return _dict_of(tuple((name, work.result) for name, work in node.branches.items())).load(text)
        case Route():
            return _load_route(node, text)
        case Loop():
            return _load_loop(node, text)
        case WaitForSignal():
            return _load_signal(node, text)
        case Sleep() | ChildWorkflow():
            return ANY.load(text)
        case _:
            assert_never(node)


def load_run_result(workflow: Workflow, text: JsonText) -> Any:
    """The result of a run of `workflow`: of its ``result`` function, or ``{node: result}``. Raises PayloadError."""
    if workflow.body is not None:
        return workflow.output.load(text)
    if workflow.result is not None:
        return workflow.result.result.load(text)
    results = ANY.load(text)
    if not isinstance(results, dict):
        return results
    nodes = {node.name: node for node in workflow.nodes}
    return {name: load_result(nodes[name], json.dumps(value)) if name in nodes else value
            for name, value in results.items()}  # fmt: skip


def _load_route(node: Route, text: JsonText) -> Any:
    plain = ANY.load(text)
    work = node.branches.get(plain["branch"])
    if work is None or work.result is ANY:
        return plain
    return _dict_of((("branch", ANY), ("value", work.result))).load(text)


def _load_loop(node: Loop, text: JsonText) -> Any:
    if node.keep == "all":
        return _list_of(node.work.result).load(text)
    if text == "null":  # of no iteration at all there is no last result
        with contextlib.suppress(PayloadError):
            return node.work.result.load(text)
        return None
    return node.work.result.load(text)


def _load_signal(node: WaitForSignal, text: JsonText) -> Any:
    try:
        return node.payload.load(text)
    except PayloadError:
        plain = ANY.load(text)
        if node.on_timeout is not RAISE and plain == ANY.load(node.on_timeout):
            return plain  # on_timeout's value need not be of the payload's type
        raise


@lru_cache(maxsize=1024)
def _dict_of(parts: tuple[tuple[str, Schema], ...]) -> Schema:
    if all(schema is ANY for _, schema in parts):
        return ANY
    made: Any = TypedDict  # mypy knows it with literal keys only
    return Schema(made("Results", {name: schema.annotation for name, schema in parts}))


@lru_cache(maxsize=1024)
def _list_of(schema: Schema) -> Schema:
    return ANY if schema is ANY else Schema(list[schema.annotation])  # type: ignore[name-defined]
