"""Log lines: which run they are of, as text and as JSON."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from durable import logs
from durable.errors import ConfigurationError


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.CHATTY}
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


log = logging.getLogger("shop")


def test_text(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    log.info("charged %d", 7, extra={"run": "r1", "workflow": "order", "step": "pay", "attempt": 1})
    log.warning("again", extra={"run": "r1", "attempt": 2, "cents": 99})
    log.debug("not shown")
    log.error("plain")
    lines = [line[24:] for line in stream.getvalue().splitlines()]
    assert lines == ["INFO [r1 order pay] charged 7", "WARNING [r1 attempt 2] again cents=99", "ERROR plain"]


def test_json(stream: io.StringIO) -> None:
    logs.configure("json", "debug", stream=stream)
    log.debug("charged %d", 7, extra={"run": "r1", "workflow": "order", "step": "pay", "attempt": 1, "cents": object})
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("+00:00")
    assert line.pop("cents").startswith("<class")
    assert line == {"level": "debug", "logger": "shop", "message": "charged 7", "run": "r1", "workflow": "order",
                    "step": "pay", "attempt": 1}  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_and_a_stack_are_kept(stream: io.StringIO, form: logs.LogFormat) -> None:
    logs.configure(form, stream=stream)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed", stack_info=True)
    assert "ValueError: why" in stream.getvalue()
    assert "test_logs.py" in stream.getvalue()
    if form == "json":
        assert len(stream.getvalue().splitlines()) == 1


def test_what_is_logged_inside_a_run_is_of_it(stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    with logs.inside(run="r1", workflow="order"), logs.inside(step="pay"):
        log.info("by a library")
        log.info("by somebody who knows better", extra={"step": "other"})
    log.info("outside")
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    assert (first["run"], first["workflow"], first["step"]) == ("r1", "order", "pay")
    assert (second["run"], second["step"]) == ("r1", "other")
    assert "run" not in third


def test_the_queue_is_quiet_unless_asked(stream: io.StringIO) -> None:
    logs.configure(stream=stream)
    logging.getLogger("procrastinate.worker").info("a line a job")
    assert stream.getvalue() == ""
    logs.configure(level="debug", stream=stream)
    logging.getLogger("procrastinate.worker").info("a line a job")
    assert "a line a job" in stream.getvalue()


def test_standard_error_is_the_default(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    log.info("here")
    assert "here" in capsys.readouterr().err
    assert sys.stderr is not stream


@pytest.mark.parametrize(("form", "level"), [("xml", "info"), ("text", "loud")])
def test_unknown_settings_are_refused(stream: io.StringIO, form: logs.LogFormat, level: str) -> None:
    with pytest.raises(ConfigurationError, match="must be one of"):
        logs.configure(form, level, stream=stream)
