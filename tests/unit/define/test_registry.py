"""The registry: which name and version is which workflow."""

from __future__ import annotations

from typing import Any

import pytest

from durable.define.builder import Builder, define
from durable.define.registry import Registry
from durable.errors import DefinitionError, WorkflowNotRegistered


def work(ctx: Any) -> None: ...


def make(name: str = "order", version: str = "1") -> Builder[Any]:
    return define(name, version=version).step("s", work)


@pytest.mark.behaviour("SN-08", "SN-10")
def test_add_find_and_names_agree() -> None:
    registry = Registry()
    workflows = [make("a"), make("b"), make("a", "2")]
    for workflow in workflows:
        registry.add(workflow)
    assert registry.names() == ["a", "b"]
    assert registry.known() == {("a", "1"), ("b", "1"), ("a", "2")}
    assert list(registry) == [w.workflow for w in workflows]
    assert len(registry) == 3
    assert "a" in registry
    assert "c" not in registry
    assert registry.find("a", "1") is workflows[0].workflow
    assert registry.latest("a") is workflows[2].workflow
    assert registry.require("a") is workflows[2].workflow
    assert registry.require("a", "1") is workflows[0].workflow
    assert registry.find("a", "3") is None
    assert registry.latest("c") is None


@pytest.mark.behaviour("SN-11")
def test_an_unknown_name_lists_the_known_ones() -> None:
    registry = Registry()
    with pytest.raises(WorkflowNotRegistered, match="known workflows: none"):
        registry.require("x")
    for workflow in (make("b"), make("a", "1"), make("a", "2")):
        registry.add(workflow)
    with pytest.raises(WorkflowNotRegistered, match=r"'x' is not registered.*known workflows: a, b"):
        registry.require("x")
    with pytest.raises(WorkflowNotRegistered, match=r"'3'.*known versions of it: 1, 2"):
        registry.require("a", "3")


def test_the_same_name_and_version_twice_names_both_places() -> None:
    registry = Registry()
    first, second = make(), make()
    registry.add(first)
    with pytest.raises(DefinitionError, match="order") as caught:
        registry.add(second)
    assert first.place in str(caught.value)
    assert second.place in str(caught.value)
    registry.add(first)
    registry.add(first.workflow)
    assert registry.find("order", "1") is first.workflow


def test_a_builder_may_grow_after_it_was_added() -> None:
    registry = Registry()
    builder = define("order")
    registry.add(builder)
    registry.add(builder)
    assert registry.known() == {("order", "1")}
    with pytest.raises(DefinitionError, match="no nodes"):
        registry.find("order", "1")
    builder.step("one", work)
    builder.step("two", work)
    assert [n.name for n in registry.require("order").nodes] == ["one", "two"]


def test_what_is_no_workflow() -> None:
    with pytest.raises(DefinitionError, match="no workflow"):
        Registry().add(work)  # type: ignore[arg-type]
