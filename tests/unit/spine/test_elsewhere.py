"""Where a call is made whose upstream was drained while it waited, or whose budget is spent."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from tidegate.call import ANYBODY, Kind
from tidegate.dialects.spec import Dialect, Endpoint, Operation, RequestFacts
from tidegate.errors import NotFound
from tidegate.policy.access import AccessOptions, Paths
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.record import CallRecord
from tidegate.spine.detached import detached_call
from tidegate.spine.native import NativeExchange
from tidegate.spine.out import NothingOut
from tidegate.spine.routing import Targets

OWN = Upstream("own", {"gemini": "http://g"}, "k", ("veo-*",))
VERTEX = Upstream(
    "vertex",
    {"gemini": "http://v"},
    "",
    ("veo-*", "imagen-*"),
    access_options=AccessOptions(paths={"gemini": Paths.VERTEX}, prefix="/projects/p"),
)
VIDEO = Endpoint(Dialect.GEMINI, Operation.VIDEO, "/v1beta/models/{model}:predictLongRunning", "v")


def exchange(model: str) -> NativeExchange:
    asked = RequestFacts(model, Kind.IMAGE_GENERATION)
    call = detached_call(
        request_id=uuid4(),
        endpoint=VIDEO,
        body=b"{}",
        caller=ANYBODY,
        priority=0,
        deadline_ms=None,
    )
    record = CallRecord("relay", "default", datetime.now(UTC))
    no_wire: Any = None  # nothing is sent
    return NativeExchange(no_wire, {}, call, {}, asked, NothingOut(), record)


def test_work_that_goes_on_moves_to_no_upstream_where_it_cannot_be_read_again() -> None:
    targets = Targets(Deployment((OWN, VERTEX)), Random(1))
    video = exchange("veo-3")
    assert [one.upstream.name for one in video.elsewhere(targets)] == ["own"]
    assert [one.upstream.name for one in video.serving(targets, "veo-2")] == ["own"]
    with pytest.raises(NotFound, match="Vertex has others"):
        video.serving(targets, "imagen-4")
