"""The load generator, in front of its own upstream."""

from __future__ import annotations

import json
from pathlib import Path

from bench.gateway.programs import Load, Upstream
from tests.waiting import wait_until


async def test_a_load_that_is_ended_counts_all_that_it_has_sent(tmp_path: Path) -> None:
    """Native calls beside a batch last as long as the batch, whose end nobody knows before."""
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "bench"}))
    with Upstream() as upstream:
        upstream.behave(delay_ms=20)
        load = Load(upstream.port, "/v1/chat/completions", body, rate=200, seconds=600.0)
        try:
            await wait_until(lambda: upstream.stats()["answers"] > 20, 20, "some answers")
            figures = load.end()
        finally:
            load.stop()
        assert figures["ok"] == figures["sent"] == upstream.stats()["requests"] > 20
        assert figures["seconds"] < 60
