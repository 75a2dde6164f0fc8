"""The usage event that nobody asked for leaves the stream; all else stays as it was."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tidegate.dialects.answers import WithoutUsageEvent, asking_for_usage

USAGE = b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":1}}\n\n'
EVENTS = [
    b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n',
    b": a comment\n\n",
    b'data: {"choices": [ ], "error": {"message": "no"}}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\"choices\\":[] \\"usage\\""}}]}\r\n\r\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1},"error":{"message":"no"}}\n\n',
    b'data: {"choices":[],"moderation":{"results":[{"flagged":false}]},"usage":null}\n\n',
    b"data: [DONE]\n\n",
    b"data:[DONE]\r\n\r\n",
]
event = st.sampled_from([*EVENTS, USAGE])


@given(st.lists(event), st.data())
def test_only_usage_events_go_however_the_bytes_arrive(
    events: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    without = WithoutUsageEvent()
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    got = b"".join(without.take(piece) for piece in pieces) + without.rest()
    assert got == b"".join(one for one in events if one != USAGE)


def test_what_is_no_stream_of_events_goes_on_in_the_end() -> None:
    without = WithoutUsageEvent()
    data = b"x" * 1_200_000
    assert without.take(data) + without.rest() == data
    assert WithoutUsageEvent().rest() == b""


def test_the_body_is_only_added_to() -> None:
    raw = b' {"model": "m", "stream":true,  "odd" : 1.10}'
    asked = asking_for_usage(raw, json.loads(raw))
    assert asked.endswith(b'"model": "m", "stream":true,  "odd" : 1.10}')
    assert json.loads(asked) == json.loads(raw) | {"stream_options": {"include_usage": True}}


def test_options_of_the_client_stay() -> None:
    body = {"model": "m", "stream_options": {"include_usage": False, "other": 1}}
    asked = json.loads(asking_for_usage(json.dumps(body).encode(), body))
    assert asked["stream_options"] == {"include_usage": True, "other": 1}
