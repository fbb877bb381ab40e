"""Which of procrastinate's migration files a database still needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from durable import queue_schema

FILES = [
    Path(name)
    for name in (
        "03.04.00_50_post_retry.sql",
        "02.14.01_01_indexes.sql",
        "03.04.00_01_pre_retry.sql",
        "03.10.00_01_pre_more.sql",
        "00.00.00_01_initial.sql",
        "10.00.00_01_pre_most.sql",
    )
]


@pytest.mark.parametrize(
    ("applied", "needed"),
    [
        ("3.10.0", ["10.00.00_01_pre_most.sql"]),
        ("3.9.2", ["03.10.00_01_pre_more.sql", "10.00.00_01_pre_most.sql"]),
        (
            "3.3.0",
            [
                "03.04.00_01_pre_retry.sql",
                "03.04.00_50_post_retry.sql",
                "03.10.00_01_pre_more.sql",
                "10.00.00_01_pre_most.sql",
            ],
        ),
        ("10.0.0", []),
        ("11.0", []),
    ],
)
def test_only_newer_files_in_order(applied: str, needed: list[str]) -> None:
    assert [file.name for file in queue_schema.newer(FILES, applied)] == needed


def test_the_installed_package_at_its_own_version_needs_nothing() -> None:
    assert queue_schema.pending(queue_schema.installed()) == []


def test_the_installed_package_has_files_for_an_older_one() -> None:
    names = [file.name for file in queue_schema.pending("3.0.0")]
    assert names == sorted(names)
    assert any("_pre_" in name for name in names)
    assert all(name >= "03.00.01" for name in names)


def test_nothing_recorded_needs_nothing() -> None:
    """Only a schema that is not there has nothing recorded, and it gets the newest at once."""
    assert queue_schema.pending(None) == []


@pytest.mark.parametrize(
    ("text", "version"),
    [("3.10.0", (3, 10, 0)), ("03.10.00", (3, 10, 0)), ("4.0.0rc1", (4, 0, 0)), ("x", ())],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert queue_schema.parse(text) == version
