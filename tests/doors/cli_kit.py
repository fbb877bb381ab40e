"""What the command line's tests share: calling it in this process, and waiting for facts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from durable import logs
from durable.cli import main

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
FLOWS: Final = "tests.doors.cli_flows"
LIMIT: Final = 180.0  # seconds; five processes may have to start on a machine that is busy


@dataclass(frozen=True)
class Said:
    """What a command has answered."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """The JSON lines of standard output."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def one(self) -> Any:
        (line,) = self.lines
        return line


class Cli:
    """``cli("start", "hello", ...)``: the command line on one database."""

    def __init__(self, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.dsn, self._capsys = dsn, capsys

    def __call__(self, *words: str) -> Said:
        return self.plain(*words, "--dsn", self.dsn)

    def plain(self, *words: str) -> Said:
        """Without a DSN."""
        self._capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as end:  # --help, --version
            code = int(end.code or 0)
        said = self._capsys.readouterr()
        return Said(code, said.out, said.err)

    def start(self, workflow: str, *words: str) -> str:
        """A new run; its id."""
        said = self("start", workflow, *words, "--import", FLOWS)
        assert said.code == 0, said.err
        return str(said.one["id"])


@contextmanager
def process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line has a process for itself elsewhere: its logging, its environment, its sys.path."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.CHATTY}
    for name in ("DURABLE_DATABASE_URL", "DATABASE_URL", "DURABLE_EMBEDDED"):
        monkeypatch.setenv(name, "")  # so that it is taken away afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def until(look: Callable[[], T], what: str) -> T:
    """Look until there is something."""
    end = time.monotonic() + LIMIT
    while not (found := look()):
        if time.monotonic() > end:
            pytest.fail(f"did not happen: {what}")
        time.sleep(0.02)
    return found


def spawn(*words: str, dsn: str | None, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, in the repository's root."""
    env: Mapping[str, str] = {k: v for k, v in os.environ.items() if not k.startswith("DURABLE_")} | environment
    if dsn is not None:
        env = {**env, "DURABLE_DATABASE_URL": dsn}
    return subprocess.Popen(
        [sys.executable, "-m", "durable.cli", *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
