"""Whether a plain answer in JSON has its end."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from tidegate.dialects import endpoint_of
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.spec import Dialect
from tidegate.errors import UpstreamUnavailable
from tidegate.record import CallRecord
from tidegate.spine.bodies import check_whole

NUMBERS = {"data": [{"embedding": [0.5, -1e-7] * (LARGE_BYTES // 10)}], "model": "[m}", "n": None}
TEXTS = {"choices": [{"message": {"content": 'said "x" and [\n' * (LARGE_BYTES // 12)}}]}


async def is_whole(answer: bytes) -> bool:
    endpoint = endpoint_of("POST", "/v1/embeddings", Dialect.OPENAI)
    assert endpoint is not None
    record = CallRecord("relay", "default", datetime.now(UTC))
    record.keep(answer)
    try:
        await check_whole(record, endpoint)
    except UpstreamUnavailable:
        return False
    return True


@pytest.mark.parametrize("form", [NUMBERS, TEXTS], ids=["numbers", "texts"])
async def test_a_large_answer_that_is_cut_anywhere_lacks_its_end(form: dict[str, object]) -> None:
    answer = orjson.dumps(form)
    assert len(answer) > LARGE_BYTES
    assert await is_whole(answer)
    assert await is_whole(b" \r\n" + answer + b"\n\n")
    for cut in (1, 2, 5, 8, 9, 12, 13, 17, 21, 25, 60, 1_000, len(answer) // 2, len(answer) - 2):
        assert not await is_whole(answer[:-cut]), cut
