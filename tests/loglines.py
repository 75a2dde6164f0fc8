"""The product's log as lines of JSON, whatever other tests of the process have done to logging.

A test module takes part by importing the fixture `lines`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import orjson
import pytest
import structlog

from tidegate.telemetry import logging as telemetry

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """All that was logged so far, from level debug on, as JSON lines."""
    root, written = logging.getLogger(), StringIO()
    level = root.level
    monkeypatch.setattr(telemetry, "_lines", None)  # as it is afterwards
    telemetry.configure_logging("json", "debug", process="test")
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)

    def read() -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in written.getvalue().splitlines()]

    yield read
    root.removeHandler(handler)
    root.setLevel(level)
    structlog.reset_defaults()
